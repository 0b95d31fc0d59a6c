from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model.classifier import Classifier
from model.controller import ControllerState, update
from model.corruption import CorruptionNet
from model.evidence import evidence
from model.losses import confusion_loss, corruption_loss, imitation_loss
from model.masking import (
    apply_mask,
    bernoulli_straight_through,
    gumbel_difference,
    paint,
    superpixel_mean,
)
from model.settings import LOGIT_LIMIT, Objective
from model.step import (
    Gradients,
    Inputs,
    Step,
    TrainingNets,
    adversarial_step,
    clean_step,
    first_sums,
    probe,
)

SUPERPIXELS = 16
GRID = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)


@pytest.fixture
def nets() -> TrainingNets:
    torch.manual_seed(0)
    return TrainingNets(
        corruption=CorruptionNet((32, 32), 8, 16).double(),
        classifier=Classifier(3, 8).double(),
        clean_classifier=Classifier(3, 8).double().requires_grad_(False),
    )


@pytest.fixture
def batch(nets: TrainingNets) -> Inputs:
    return Inputs(
        images=torch.randn(5, 3, 32, 32, dtype=torch.float64),
        segments=GRID.expand(5, -1, -1),
        labels=torch.tensor([0, 1, 2, 0, 1]),
        noise=gumbel_difference((5, SUPERPIXELS), torch.Generator().manual_seed(3)).double(),
        total=5,
    )


def step(
    nets: TrainingNets,
    batch: Inputs,
    *,
    joint: bool = True,
    area_weight: float = 0.7,
    **changes: object,
) -> Step:
    objective = Objective(**({"clean_weight": 0.0} | changes))  # type: ignore[arg-type]
    return adversarial_step(nets, batch, objective, torch.tensor(area_weight), joint=joint)


def probabilities(nets: TrainingNets, batch: Inputs) -> Tensor:
    values = torch.sigmoid(nets.corruption(batch.images))
    return superpixel_mean(values, batch.segments, SUPERPIXELS)


def masked_logits(nets: TrainingNets, batch: Inputs) -> tuple[Tensor, Tensor]:
    """What a step computes, written out: the logits of masked images, and the masks."""
    chosen = bernoulli_straight_through(probabilities(nets, batch), batch.noise)
    mask = paint(chosen, batch.segments)
    return nets.classifier(apply_mask(batch.images, mask)), mask


def assert_gradients(net: nn.Module, loss: Tensor, gradients: Gradients | None) -> None:
    """The gradients are those of the loss by the net's parameters."""
    assert gradients is not None
    expected = torch.autograd.grad(loss, list(net.parameters()))
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-8)


def equal(first: Gradients | None, second: Gradients | None) -> bool:
    assert first is not None
    assert second is not None
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_corruption_gradient_is_that_of_confusion_plus_weighted_area(
    nets: TrainingNets, batch: Inputs
) -> None:
    result = step(nets, batch)
    logits, mask = masked_logits(nets, batch)
    loss = (corruption_loss(logits) + 0.7 * mask.mean(dim=(1, 2)) ** 2).mean()
    assert_gradients(nets.corruption, loss, result.corruption_gradients)


def test_imitation_enters_the_corruption_gradient_alone_with_its_weight(
    nets: TrainingNets, batch: Inputs
) -> None:
    result, alone = step(nets, batch, imitation_weight=3.0), step(nets, batch)
    logits, mask = masked_logits(nets, batch)
    shown = evidence(nets.clean_classifier, batch.images, batch.labels, batch.segments, SUPERPIXELS)
    probability = paint(probabilities(nets, batch), batch.segments)
    imitated = imitation_loss(probability, shown, Objective())
    area = mask.mean(dim=(1, 2)) ** 2
    loss = (corruption_loss(logits) + 0.7 * area + 3 * imitated).mean()
    assert_gradients(nets.corruption, loss, result.corruption_gradients)
    assert result.sums["imitation_loss"].item() == pytest.approx(imitated.sum().item())
    assert equal(result.classifier_gradients, alone.classifier_gradients)
    assert "imitation_loss" not in alone.sums


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_classifier_gradient_is_that_of_the_cross_entropy_on_masked_and_weighted_clean_images(
    nets: TrainingNets, batch: Inputs, weight: float
) -> None:
    result = step(nets, batch, clean_weight=weight)
    masked = cross_entropy(masked_logits(nets, batch)[0], batch.labels)
    clean = cross_entropy(nets.classifier(batch.images), batch.labels)
    loss = (masked + weight * clean) / (1 + weight)
    assert_gradients(nets.classifier, loss, result.classifier_gradients)


def test_with_a_closed_gate_no_gradient_of_the_classifier_exists(
    nets: TrainingNets, batch: Inputs
) -> None:
    closed, opened = step(nets, batch, joint=False), step(nets, batch)
    assert closed.classifier_gradients is None
    assert all(p.grad is None for p in nets.classifier.parameters())
    assert equal(closed.corruption_gradients, opened.corruption_gradients)


def test_the_classifiers_labels_do_not_reach_the_corruption_gradient(
    nets: TrainingNets, batch: Inputs
) -> None:
    first = step(nets, batch)
    second = step(nets, replace(batch, labels=(batch.labels + 1) % 3))
    assert equal(first.corruption_gradients, second.corruption_gradients)
    assert not equal(first.classifier_gradients, second.classifier_gradients)


def test_the_area_weight_does_not_reach_the_classifier(nets: TrainingNets, batch: Inputs) -> None:
    light, heavy = step(nets, batch, area_weight=0.0), step(nets, batch, area_weight=50.0)
    assert equal(light.classifier_gradients, heavy.classifier_gradients)
    assert not equal(light.corruption_gradients, heavy.corruption_gradients)


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, gradients: Gradients | None) -> None:
    if gradients is None:
        return
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def test_parts_of_a_batch_sum_to_the_whole(nets: TrainingNets, batch: Inputs) -> None:
    def everything(result: Step) -> list[Tensor]:
        assert result.corruption_gradients is not None
        assert result.classifier_gradients is not None
        sums = [result.sums[name] for name in sorted(result.sums)]
        return [*result.corruption_gradients, *result.classifier_gradients, *sums]

    names = ("images", "segments", "labels", "noise")
    first, second = (
        replace(batch, **{name: getattr(batch, name)[part] for name in names})
        for part in (slice(0, 2), slice(2, 5))
    )
    results = (everything(step(nets, part)) for part in (batch, first, second))
    for total, first_part, second_part in zip(*results, strict=True):
        torch.testing.assert_close(total, first_part + second_part)


def test_clean_step_is_plain_cross_entropy(nets: TrainingNets, batch: Inputs) -> None:
    result = clean_step(nets.classifier, batch.images, batch.labels, 5)
    loss = cross_entropy(nets.classifier(batch.images), batch.labels)
    assert_gradients(nets.classifier, loss, result.classifier_gradients)
    torch.testing.assert_close(result.sums["classifier_loss"] / 5, loss.detach())


def test_soft_masks_are_the_probabilities_and_noise_does_not_reach_them(
    nets: TrainingNets, batch: Inputs
) -> None:
    result = step(nets, batch, soft=True, area_power=1)
    mask = paint(probabilities(nets, batch), batch.segments)
    logits = nets.classifier(apply_mask(batch.images, mask))
    loss = (corruption_loss(logits) + 0.7 * mask.mean(dim=(1, 2))).mean()
    assert_gradients(nets.corruption, loss, result.corruption_gradients)
    again = step(nets, replace(batch, noise=-batch.noise), soft=True, area_power=1)
    assert equal(again.corruption_gradients, result.corruption_gradients)


def test_true_class_confusion_takes_the_place_of_equation_1(
    nets: TrainingNets, batch: Inputs
) -> None:
    result = step(nets, batch, confusion="true-log-probability", area_weight=0.0)
    logits, _ = masked_logits(nets, batch)
    loss = torch.log_softmax(logits, dim=1)[torch.arange(5), batch.labels].mean()
    assert_gradients(nets.corruption, loss, result.corruption_gradients)
    assert equal(result.classifier_gradients, step(nets, batch).classifier_gradients)


def test_clean_context_and_swapped_accuracy_are_of_the_stated_nets_on_the_stated_images(
    nets: TrainingNets, batch: Inputs
) -> None:
    images, mask = batch.images, step(nets, batch).mask
    assert mask is not None
    torch.testing.assert_close(mask, masked_logits(nets, batch)[1].detach())
    sums = probe(nets, batch, Objective(), mask)
    others = torch.stack([mask[i - 1] for i in range(len(mask))])
    answers = {
        "clean_correct": nets.classifier(images),
        "context_correct": nets.clean_classifier(images * (1 - mask).unsqueeze(1)),
        "swapped_correct": nets.clean_classifier(images * (1 - others).unsqueeze(1)),
    }
    for name, logits in answers.items():
        assert sums[name] == (logits.argmax(dim=1) == batch.labels).sum()


def test_the_balance_begins_with_the_loss_without_masks_and_the_accuracy_under_them(
    nets: TrainingNets, batch: Inputs
) -> None:
    sums = first_sums(nets, batch, Objective(confusion="true-logit"))
    clean = confusion_loss(nets.classifier(batch.images), batch.labels, "true-logit").sum()
    torch.testing.assert_close(sums["confusion"], clean.detach())
    assert sums["correct"] == step(nets, batch).sums["correct"]


def areas_from_full_masks(logit_limit: float, steps: int) -> list[float]:
    """Masked areas of a small fight that starts with every logit at about 20: four classes told
    by the colour of a square in the middle, and a classifier that knows them."""
    torch.manual_seed(0)
    corruption, classifier = CorruptionNet((32, 32), 8, 16, logit_limit), Classifier(4, 8)
    nn.init.constant_(corruption.output.bias, 20.0)  # type: ignore[arg-type]
    nets = TrainingNets(corruption=corruption, classifier=classifier, clean_classifier=classifier)
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(16) % 4
    colours = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 2, 0]])
    images = 0.3 * torch.randn(16, 3, 32, 32, generator=random)
    images[:, :, 8:24, 8:24] += colours[labels].view(16, 3, 1, 1)
    corruption_adam, classifier_adam = (
        torch.optim.Adam(net.parameters(), 2e-3, (0.5, 0.999)) for net in (corruption, classifier)
    )
    for _ in range(60):
        result = clean_step(classifier, images, labels, 16)
        descend(classifier, classifier_adam, result.classifier_gradients)
    state = ControllerState(area_weight=1.0, accuracy=0.25)
    areas = []
    for _ in range(steps):
        noise = gumbel_difference((16, SUPERPIXELS), random)
        batch = Inputs(images, GRID.expand(16, -1, -1), labels, noise, 16)
        weight = torch.tensor(state.area_weight)
        result = adversarial_step(nets, batch, Objective(), weight, joint=state.joint)
        descend(corruption, corruption_adam, result.corruption_gradients)
        descend(classifier, classifier_adam, result.classifier_gradients)
        state = update(state, float(result.sums["correct"]), 16, target=0.6, rate=0.006)
        areas.append(float(result.sums["area"]) / 16)
    return areas


@pytest.mark.slow
def test_masks_that_cover_everything_come_back_where_logits_are_bounded() -> None:
    areas = areas_from_full_masks(LOGIT_LIMIT, steps=160)
    assert areas[0] > 0.99
    assert min(areas) < 0.85


@pytest.mark.slow
def test_without_a_bound_masks_that_cover_everything_stay() -> None:
    assert min(areas_from_full_masks(0.0, steps=160)) == 1.0
