import pytest
import torch
from torch import nn

from model.classifier import Classifier
from model.controller import ControllerConfig, ControllerState, update
from model.corruption import LOGIT_LIMIT, CorruptionNet
from model.losses import corruption_loss, imitation_loss
from model.masking import (
    apply_mask,
    bernoulli_straight_through,
    gumbel_difference,
    normalize,
    paint,
    superpixel_mean,
)
from model.step import adversarial_step, clean_step

SUPERPIXELS = 16


@pytest.fixture
def setting() -> dict:
    torch.manual_seed(0)
    segments = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    return {
        "corruption": CorruptionNet((32, 32), 8, 16).double(),
        "classifier": Classifier(3, 8).double(),
        "images": torch.randn(5, 3, 32, 32, dtype=torch.float64),
        "segments": segments.expand(5, -1, -1),
        "labels": torch.tensor([0, 1, 2, 0, 1]),
        "noise": gumbel_difference((5, SUPERPIXELS), torch.Generator().manual_seed(3)).double(),
    }


def step(setting: dict, **changes: object):  # type: ignore[no-untyped-def]
    options: dict = {
        "total": 5,
        "joint": True,
        "area_weight": 0.7,
        "area_power": 2,
        "clean_weight": 0.0,
    }
    return adversarial_step(**setting, **(options | changes))


def masked_logits(setting: dict) -> tuple[torch.Tensor, torch.Tensor]:
    probability = superpixel_mean(
        torch.sigmoid(setting["corruption"](setting["images"])), setting["segments"], SUPERPIXELS
    )
    mask = paint(bernoulli_straight_through(probability, setting["noise"]), setting["segments"])
    return setting["classifier"](apply_mask(setting["images"], mask)), mask


def assert_equal_gradients(net: nn.Module, gradients: tuple[torch.Tensor, ...] | None) -> None:
    assert gradients is not None
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_corruption_gradient_is_that_of_confusion_plus_weighted_area(setting: dict) -> None:
    result = step(setting)
    logits, mask = masked_logits(setting)
    area = mask.mean(dim=(1, 2)) ** 2
    (corruption_loss(logits) + 0.7 * area).mean().backward()
    assert_equal_gradients(setting["corruption"], result.corruption_gradients)


def test_imitation_enters_the_corruption_gradient_alone_with_its_weight(setting: dict) -> None:
    segments, evidence = setting["segments"], torch.randn(5, 32, 32)
    result = step(setting, evidence=evidence, imitation_weight=3.0)
    logits, mask = masked_logits(setting)
    pixels = torch.sigmoid(setting["corruption"](setting["images"]))
    probability = paint(superpixel_mean(pixels, segments, SUPERPIXELS), segments)
    imitated = imitation_loss(probability, evidence)
    area = mask.mean(dim=(1, 2)) ** 2
    (corruption_loss(logits) + 0.7 * area + 3 * imitated).mean().backward()
    assert result.corruption_gradients is not None
    for parameter, gradient in zip(
        setting["corruption"].parameters(), result.corruption_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-8)
    assert result.sums["imitation_loss"].item() == pytest.approx(imitated.sum().item())
    alone = step(setting)
    assert alone.classifier_gradients is not None
    assert result.classifier_gradients is not None
    for with_it, without in zip(
        result.classifier_gradients, alone.classifier_gradients, strict=True
    ):
        assert torch.equal(with_it, without)


def test_classifier_gradient_is_that_of_the_cross_entropy_on_masked_images(setting: dict) -> None:
    result = step(setting)
    logits, _ = masked_logits(setting)
    nn.functional.cross_entropy(logits, setting["labels"]).backward()
    assert_equal_gradients(setting["classifier"], result.classifier_gradients)


def test_clean_images_enter_the_classifiers_gradient_with_their_weight(setting: dict) -> None:
    result = step(setting, clean_weight=3.0)
    logits, _ = masked_logits(setting)
    clean = setting["classifier"](setting["images"])
    labels = setting["labels"]
    cross_entropy = nn.functional.cross_entropy
    (cross_entropy(logits, labels) / 4 + 3 * cross_entropy(clean, labels) / 4).backward()
    assert_equal_gradients(setting["classifier"], result.classifier_gradients)


def test_with_a_closed_gate_no_gradient_of_the_classifier_exists(setting: dict) -> None:
    closed, opened = step(setting, joint=False), step(setting, joint=True)
    assert closed.classifier_gradients is None
    assert all(p.grad is None for p in setting["classifier"].parameters())
    pairs = zip(closed.corruption_gradients, opened.corruption_gradients, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_classifiers_labels_do_not_reach_the_corruption_gradient(setting: dict) -> None:
    first = step(setting)
    setting["labels"] = (setting["labels"] + 1) % 3
    second = step(setting)
    pairs = zip(first.corruption_gradients, second.corruption_gradients, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.classifier_gradients[0], second.classifier_gradients[0])


def test_the_area_weight_does_not_reach_the_classifier(setting: dict) -> None:
    light, heavy = step(setting, area_weight=0.0), step(setting, area_weight=50.0)
    pairs = zip(light.classifier_gradients, heavy.classifier_gradients, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(light.corruption_gradients[-1], heavy.corruption_gradients[-1])


def test_descending_the_corruption_gradient_lowers_a_fully_masked_objective(setting: dict) -> None:
    """With an area weight above every logit the net must learn to mask less."""
    optimizer = torch.optim.Adam(setting["corruption"].parameters(), 1e-2)
    areas = []
    for _ in range(30):
        result = step(setting, area_weight=100.0, area_power=1, joint=False)
        for parameter, gradient in zip(
            setting["corruption"].parameters(), result.corruption_gradients, strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        areas.append(float(result.sums["area"]) / 5)
    assert areas[-1] < 0.5 * areas[0]


def test_parts_of_a_batch_sum_to_the_whole(setting: dict) -> None:
    whole = step(setting)
    parts = []
    for part in (slice(0, 2), slice(2, 5)):
        names = ("images", "segments", "labels", "noise")
        parts.append(step(setting | {name: setting[name][part] for name in names}))
    for total, first, second in zip(
        whole.corruption_gradients + whole.classifier_gradients,
        parts[0].corruption_gradients + parts[0].classifier_gradients,
        parts[1].corruption_gradients + parts[1].classifier_gradients,
        strict=True,
    ):
        torch.testing.assert_close(total, first + second)
    for name, value in whole.sums.items():
        torch.testing.assert_close(value, parts[0].sums[name] + parts[1].sums[name])


def test_clean_step_is_plain_cross_entropy(setting: dict) -> None:
    result = clean_step(setting["classifier"], setting["images"], setting["labels"], 5)
    logits = setting["classifier"](setting["images"])
    loss = nn.functional.cross_entropy(logits, setting["labels"])
    loss.backward()
    assert_equal_gradients(setting["classifier"], result.classifier_gradients)
    torch.testing.assert_close(result.sums["classifier_loss"] / 5, loss.detach())


def test_normalizing_the_mean_colour_gives_the_value_of_a_masked_pixel() -> None:
    images = torch.tensor([100, 150, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    mean, std = torch.tensor([100.0, 150.0, 200.0]), torch.tensor([50.0, 75.0, 100.0])
    assert normalize(images, mean, std).abs().max() == 0
    assert normalize(images, torch.zeros(3), std).unique().tolist() == [2.0]


def gradients_of(setting: dict, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(setting["corruption"].parameters())))


def assert_close(found: tuple[torch.Tensor, ...] | None, expected: list[torch.Tensor]) -> None:
    assert found is not None
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_soft_masks_are_the_probabilities_and_noise_does_not_reach_them(setting: dict) -> None:
    result = step(setting, soft=True, area_power=1)
    probability = superpixel_mean(
        torch.sigmoid(setting["corruption"](setting["images"])), setting["segments"], SUPERPIXELS
    )
    mask = paint(probability, setting["segments"])
    logits = setting["classifier"](apply_mask(setting["images"], mask))
    loss = (corruption_loss(logits) + 0.7 * mask.mean(dim=(1, 2))).mean()
    assert_close(result.corruption_gradients, gradients_of(setting, loss))
    again = step(setting | {"noise": -setting["noise"]}, soft=True, area_power=1)
    assert_close(again.corruption_gradients, list(result.corruption_gradients))


def test_true_class_confusion_takes_the_place_of_equation_1(setting: dict) -> None:
    result = step(setting, confusion="true-log-probability", area_weight=0.0)
    logits, _ = masked_logits(setting)
    loss = torch.log_softmax(logits, dim=1)[torch.arange(5), setting["labels"]].mean()
    assert_close(result.corruption_gradients, gradients_of(setting, loss))
    plain = step(setting)
    assert_close(result.classifier_gradients, list(plain.classifier_gradients))


def test_the_complement_term_asks_for_the_label_where_only_the_masked_part_is_shown(
    setting: dict,
) -> None:
    result = step(setting, complement_weight=0.5)
    logits, mask = masked_logits(setting)
    shown = setting["classifier"](setting["images"] * mask.unsqueeze(1))
    complement = nn.functional.cross_entropy(shown, setting["labels"])
    area = mask.mean(dim=(1, 2)) ** 2
    loss = (corruption_loss(logits) + 0.7 * area).mean() + 0.5 * complement
    assert_close(result.corruption_gradients, gradients_of(setting, loss))
    torch.testing.assert_close(result.sums["complement_loss"] / 5, complement.detach())
    assert_close(result.classifier_gradients, list(step(setting).classifier_gradients))


def test_clean_context_and_swapped_accuracy_are_of_the_stated_nets_on_the_stated_images(
    setting: dict,
) -> None:
    torch.manual_seed(1)
    clean_net = Classifier(3, 8).double()
    result = step(setting, clean_classifier=clean_net)
    probability = superpixel_mean(
        torch.sigmoid(setting["corruption"](setting["images"])), setting["segments"], SUPERPIXELS
    )
    mask = paint(bernoulli_straight_through(probability, setting["noise"]), setting["segments"])
    with torch.no_grad():
        clean = setting["classifier"](setting["images"]).argmax(dim=1)
        context = clean_net(setting["images"] * (1 - mask).unsqueeze(1)).argmax(dim=1)
        others = torch.stack([mask[i - 1] for i in range(len(mask))])
        swapped = clean_net(setting["images"] * (1 - others).unsqueeze(1)).argmax(dim=1)
    assert result.sums["clean_correct"] == (clean == setting["labels"]).sum()
    assert result.sums["context_correct"] == (context == setting["labels"]).sum()
    assert result.sums["swapped_correct"] == (swapped == setting["labels"]).sum()
    plain = step(setting)
    assert all(
        torch.equal(a, b)
        for a, b in zip(result.corruption_gradients, plain.corruption_gradients, strict=True)
    ), "looking changes nothing"


@pytest.mark.parametrize("size", [128, 224])
def test_a_joint_step_runs_at_larger_inputs(size: int) -> None:
    torch.manual_seed(0)
    rows = torch.arange(size) * 20 // size
    segments = (rows[:, None] * 20 + rows).expand(2, -1, -1)  # 400 squares
    result = adversarial_step(
        CorruptionNet((size, size), 8, 16),
        Classifier(5, 8),
        torch.randn(2, 3, size, size),
        segments,
        torch.tensor([0, 4]),
        gumbel_difference((2, 400), torch.Generator().manual_seed(0)),
        total=2,
        joint=True,
        area_weight=1.0,
        area_power=2,
        clean_weight=1.0,
    )
    assert 0 < result.sums["area"] / 2 < 1
    for gradients in (result.corruption_gradients, result.classifier_gradients):
        assert gradients is not None
        assert all(g.isfinite().all() for g in gradients)
        assert max(float(g.abs().max()) for g in gradients) > 0


def areas_from_full_masks(logit_limit: float, steps: int) -> list[float]:
    """Masked areas of a small fight that starts with every logit at about 20: four classes told
    by the colour of a square in the middle, and a classifier that knows them."""
    torch.manual_seed(0)
    corruption, classifier = CorruptionNet((32, 32), 8, 16, logit_limit), Classifier(4, 8)
    nn.init.constant_(corruption.output.bias, 20.0)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(16) % 4
    colours = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 2, 0]])
    images = 0.3 * torch.randn(16, 3, 32, 32, generator=random)
    images[:, :, 8:24, 8:24] += colours[labels].view(16, 3, 1, 1)
    segments = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    optimizers: dict[nn.Module, torch.optim.Optimizer] = {
        net: torch.optim.Adam(net.parameters(), 2e-3, (0.5, 0.999))
        for net in (corruption, classifier)
    }

    def descend(net: nn.Module, gradients: tuple[torch.Tensor, ...]) -> None:
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizers[net].step()

    for _ in range(60):
        descend(classifier, clean_step(classifier, images, labels, 16).classifier_gradients)  # type: ignore[arg-type]
    state = ControllerState(area_weight=1.0, accuracy=0.25)
    areas = []
    for _ in range(steps):
        result = adversarial_step(
            corruption,
            classifier,
            images,
            segments.expand(16, -1, -1),
            labels,
            gumbel_difference((16, SUPERPIXELS), random),
            total=16,
            joint=state.joint,
            area_weight=state.area_weight,
            area_power=2,
            clean_weight=1.0,
        )
        descend(corruption, result.corruption_gradients)  # type: ignore[arg-type]
        if result.classifier_gradients is not None:
            descend(classifier, result.classifier_gradients)
        config = ControllerConfig(target=0.6)
        state = update(state, config, float(result.sums["correct"]), 16)
        areas.append(float(result.sums["area"]) / 16)
    return areas


def test_masks_that_cover_everything_come_back_where_logits_are_bounded() -> None:
    areas = areas_from_full_masks(LOGIT_LIMIT, steps=160)
    assert areas[0] > 0.99
    assert min(areas) < 0.85


def test_without_a_bound_masks_that_cover_everything_stay() -> None:
    assert min(areas_from_full_masks(0.0, steps=160)) == 1.0
