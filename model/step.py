"""One training step of the two nets (paper, section 2.3): gradients and sums, no optimizer.

Gradients are of sums over the local images divided by the number of images over all ranks, so
that adding the ranks' gradients gives the gradient of the mean, however unevenly images lie.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.losses import (
    Confusion,
    area_penalty,
    classification_loss,
    confusion_loss,
    correct,
    imitation_loss,
)
from model.masking import (
    apply_mask,
    bernoulli_straight_through,
    mask_probability,
    paint,
)

Gradients = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one rank computed: gradients in the order of the nets' `trainable` parameters (None for
    a net that does not train in this step) and sums over its images, float32 scalars on the
    device."""

    corruption_gradients: Gradients | None
    classifier_gradients: Gradients | None
    sums: dict[str, Tensor]


def trainable(net: nn.Module) -> list[nn.Parameter]:
    """The net's parameters but for those of a frozen part."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def clean_step(classifier: nn.Module, images: Tensor, labels: Tensor, total: int) -> Step:
    """Warm-up: the classifier on clean images. total: number of images over all ranks."""
    logits = classifier(images).to(images.dtype)
    loss = classification_loss(logits, labels)
    gradients = torch.autograd.grad(loss.sum() / total, trainable(classifier))
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
    area_weight: float | Tensor,
    area_power: int,
    clean_weight: float,
    confusion: Confusion = "top",
    complement_weight: float = 0.0,
    soft: bool = False,
    evidence: Tensor | None = None,
    imitation_weight: float = 0.0,
    clean_classifier: nn.Module | None = None,
) -> Step:
    """The corruption net's step and, where `joint`, the classifier's on the same masked images.

    images: normalized float [B, 3, H, W]; segments int64 [B, H, W]; labels int64 [B];
    noise: Gumbel differences [B, K], which also says K. total: images over all ranks.
    clean_weight: weight of the classifier's loss on the clean images in a joint step (0: the
    paper's). confusion: which loss, see `confusion_loss`. complement_weight: weight, in the
    corruption net's loss, of the classifier's cross-entropy on the masked part alone. soft: the
    mask is the probability itself, without sampling. evidence: float [B, H, W], which
    the corruption net imitates as well, see `imitation_loss`, with that weight in its loss. Each
    loss's gradient reaches its own net only.

    With a `clean_classifier` the sums also hold "clean_correct", the classifier's right answers on
    the clean images, "context_correct", those of the clean classifier on the masked ones: what
    the context alone tells where the masks hide the objects, and "swapped_correct", the same with
    each mask on the batch's next image: as many as "context_correct" where masks do not depend on
    the image, more where they hide its own object. In a batch of one image they are equal.
    """
    probability = mask_probability(corruption, images, segments, noise.shape[1])
    chosen = probability if soft else bernoulli_straight_through(probability, noise)
    mask = paint(chosen, segments)
    masked = apply_mask(images, mask)
    logits = classifier(masked).to(images.dtype)
    confused = confusion_loss(logits, labels, confusion)
    area = area_penalty(mask, area_power)
    sums = {"corruption_loss": confused.detach().sum()}
    objective = confused + area_weight * area
    if complement_weight:
        kept = classifier(apply_mask(images, 1 - mask)).to(images.dtype)
        complement = classification_loss(kept, labels)
        objective = objective + complement_weight * complement
        sums["complement_loss"] = complement.detach().sum()
    if evidence is not None:
        imitated = imitation_loss(paint(probability, segments), evidence)
        objective = objective + imitation_weight * imitated
        sums["imitation_loss"] = imitated.detach().sum()
    corruption_gradients = torch.autograd.grad(
        objective.sum() / total, trainable(corruption), retain_graph=joint
    )
    loss = classification_loss(logits, labels)
    classifier_gradients = None
    if joint:
        mean = loss.sum() / total
        if clean_weight:
            clean_logits = classifier(images).to(images.dtype)
            clean = classification_loss(clean_logits, labels).sum() / total
            mean = (mean + clean_weight * clean) / (1 + clean_weight)
        classifier_gradients = torch.autograd.grad(mean, trainable(classifier))
    sums |= {
        "classifier_loss": loss.detach().sum(),
        "area": mask.detach().mean(dim=(1, 2)).sum(),
        "area_penalty": area.detach().sum(),
        "correct": correct(logits, labels).sum(),
    }
    if clean_classifier is not None:
        with torch.no_grad():
            sums["clean_correct"] = correct(classifier(images), labels).sum()
            sums["context_correct"] = correct(clean_classifier(masked), labels).sum()
            swapped = apply_mask(images, mask.roll(1, 0))
            sums["swapped_correct"] = correct(clean_classifier(swapped), labels).sum()
    return Step(
        corruption_gradients=corruption_gradients,
        classifier_gradients=classifier_gradients,
        sums=sums,
    )
