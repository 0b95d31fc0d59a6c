"""One training step of the two nets (paper, section 2.3): gradients and sums, no optimizer.

Gradients are of sums over the local images divided by the number of images over all ranks, so
that adding the ranks' gradients gives the gradient of the mean, however unevenly images lie.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.losses import area_penalty, classification_loss, correct, corruption_loss
from model.masking import bernoulli_straight_through, paint, superpixel_mean

Gradients = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one rank computed: gradients in the order of the nets' parameters (None for a net
    that does not train in this step) and sums over its images, float32 scalars on the device."""

    corruption_gradients: Gradients | None
    classifier_gradients: Gradients | None
    sums: dict[str, Tensor]


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] in 0..255 -> float32 of zero mean and unit deviation per channel.

    mean, std: float32 [3] on the images' device. A masked pixel is set to 0 afterwards, that is,
    to the data set's mean colour.
    """
    shape = (1, 3, 1, 1)
    return (images.to(torch.float32) - mean.view(shape)) / std.view(shape)


def mask_probability(
    corruption: nn.Module, images: Tensor, segments: Tensor, superpixels: int
) -> Tensor:
    """The corruption net's probability of masking each superpixel: float [B, K] in [0, 1]."""
    return superpixel_mean(torch.sigmoid(corruption(images)), segments, superpixels)


def apply_mask(images: Tensor, mask: Tensor) -> Tensor:
    """Set masked pixels to 0: normalized [B, 3, H, W], mask [B, H, W] (1: masked)."""
    return images * (1 - mask).unsqueeze(1)


def _parameters(net: nn.Module) -> list[nn.Parameter]:
    return list(net.parameters())


def clean_step(classifier: nn.Module, images: Tensor, labels: Tensor, total: int) -> Step:
    """Warm-up: the classifier on clean images. total: number of images over all ranks."""
    logits = classifier(images)
    loss = classification_loss(logits, labels)
    gradients = torch.autograd.grad(loss.sum() / total, _parameters(classifier))
    sums = {"classifier_loss": loss.detach().sum(), "correct": correct(logits, labels).sum()}
    return Step(corruption_gradients=None, classifier_gradients=gradients, sums=sums)


def adversarial_step(
    corruption: nn.Module,
    classifier: nn.Module,
    images: Tensor,
    segments: Tensor,
    labels: Tensor,
    noise: Tensor,
    *,
    total: int,
    joint: bool,
    area_weight: float,
    area_power: int,
    clean_weight: float,
) -> Step:
    """The corruption net's step and, where `joint`, the classifier's on the same masked images.

    images: normalized float [B, 3, H, W]; segments int64 [B, H, W]; labels int64 [B];
    noise: Gumbel differences [B, K], which also says K. total: images over all ranks.
    clean_weight: weight of the classifier's loss on the clean images in a joint step (0: the
    paper's). Each loss's gradient reaches its own net only.
    """
    probability = mask_probability(corruption, images, segments, noise.shape[1])
    mask = paint(bernoulli_straight_through(probability, noise), segments)
    masked = apply_mask(images, mask)
    logits = classifier(masked)
    confusion = corruption_loss(logits)
    area = area_penalty(mask, area_power)
    objective = (confusion + area_weight * area).sum() / total
    corruption_gradients = torch.autograd.grad(
        objective, _parameters(corruption), retain_graph=joint
    )
    loss = classification_loss(logits, labels)
    classifier_gradients = None
    if joint:
        mean = loss.sum() / total
        if clean_weight:
            clean = classification_loss(classifier(images), labels).sum() / total
            mean = (mean + clean_weight * clean) / (1 + clean_weight)
        classifier_gradients = torch.autograd.grad(mean, _parameters(classifier))
    sums = {
        "corruption_loss": confusion.detach().sum(),
        "classifier_loss": loss.detach().sum(),
        "area": mask.detach().mean(dim=(1, 2)).sum(),
        "area_penalty": area.detach().sum(),
        "correct": correct(logits, labels).sum(),
    }
    return Step(
        corruption_gradients=corruption_gradients,
        classifier_gradients=classifier_gradients,
        sums=sums,
    )
