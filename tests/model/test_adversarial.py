import pytest
import torch
from torch import nn

from model.adversarial import adversarial_step, apply_mask, clean_step, normalize
from model.classifier import Classifier
from model.corruption import CorruptionNet
from model.losses import corruption_loss
from model.masking import bernoulli_straight_through, gumbel_difference, paint, superpixel_mean

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
