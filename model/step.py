"""One training step of the two nets (paper, section 2.3): gradients and sums, no optimizer.
Gradients are of sums over the local images divided by the number of images over all ranks, so that
adding the ranks' gradients gives the gradient of the mean, however unevenly images lie."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.decoder import FeatureCorruptionNet, resize
from model.evidence import evidence, superpixel_evidence
from model.losses import area_penalty, classification_loss, confusion_loss, correct, imitation_loss
from model.masking import apply_mask, bernoulli_straight_through, paint, superpixel_mean
from model.pretrained import PretrainedClassifier
from model.saliency import AnyClassifier, layer_cams_of
from model.settings import Objective

Gradients = tuple[Tensor, ...]


@dataclass(frozen=True)
class TrainingNets:
    """clean_classifier: the classifier as the warm-up left it, which trains no further."""

    corruption: nn.Module
    classifier: AnyClassifier
    clean_classifier: AnyClassifier


@dataclass(frozen=True)
class Inputs:
    """One rank's share of a batch of `total` images over all ranks. images: normalized float [B, 3,
    H, W]; segments: int64 [B, H, W], below K; labels: int64 [B]; noise: Gumbel differences float
    [B, K], K the largest number of superpixels."""

    images: Tensor
    segments: Tensor
    labels: Tensor
    noise: Tensor
    total: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rank's result: gradients in the order of the nets' `trainable` parameters (None for a
    net that does not train), sums over its images by name (float32 scalars on the device), and
    the masks, float [B, H, W], where there are any."""

    corruption_gradients: Gradients | None = None
    classifier_gradients: Gradients | None = None
    sums: dict[str, Tensor]
    mask: Tensor | None = None


def trainable(net: nn.Module) -> list[nn.Parameter]:
    """Return the net's parameters but for those of a frozen part."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def clean_step(classifier: nn.Module, images: Tensor, labels: Tensor, total: int) -> Step:
    """Warm-up: train the classifier on clean images. total: number of images over all ranks."""
    logits = classifier(images).to(images.dtype)
    loss = classification_loss(logits, labels)
    gradients = torch.autograd.grad(loss.sum() / total, trainable(classifier))
    sums = {"classifier_loss": loss.detach().sum(), "correct": correct(logits, labels).sum()}
    return Step(classifier_gradients=gradients, sums=sums)


@dataclass(frozen=True)
class Masks:
    """probability: of masking each superpixel, float [B, K]. mask: float [B, H, W]. maps: of the
    pretrained network that the corruption net read, if it reads one."""

    probability: Tensor
    mask: Tensor
    maps: list[Tensor] | None


def masks_of(corruption: nn.Module, batch: Inputs, objective: Objective) -> Masks:
    """Return the masks of a batch: the probabilities, or samples of them."""
    if isinstance(corruption, FeatureCorruptionNet):
        maps = corruption.encode(batch.images)
        logits = corruption.decode(maps, batch.segments.shape[1:])
    else:
        maps, logits = None, corruption(batch.images)
    values = torch.sigmoid(logits.to(batch.images.dtype))  # autocast's are bfloat16
    probability = superpixel_mean(values, batch.segments, batch.noise.shape[1])
    chosen = probability if objective.soft else bernoulli_straight_through(probability, batch.noise)
    return Masks(probability, paint(chosen, batch.segments), maps)


def imitation(
    classifier: AnyClassifier, masks: Masks, batch: Inputs, objective: Objective
) -> Tensor:
    """Return `imitation_loss` of each image's mask probabilities: float [B]."""
    superpixels = batch.noise.shape[1]
    if masks.maps is None:
        shown = evidence(classifier, batch.images, batch.labels, batch.segments, superpixels)
    else:
        assert isinstance(classifier, PretrainedClassifier)
        cams = layer_cams_of(classifier, classifier.final(masks.maps), batch.labels)
        shown = superpixel_evidence(cams, batch.segments, superpixels)
    return imitation_loss(paint(masks.probability, batch.segments), shown, objective)


def adversary_view(images: Tensor, objective: Objective) -> Tensor:
    """Return images [B, 3, H, W] as the classifier sees them in adversarial training."""
    side = objective.adversary_side
    return images if side is None else resize(images, (side, side))


def imitation_step(nets: TrainingNets, batch: Inputs, objective: Objective) -> Step:
    """Warm-up over a pretrained network: the corruption net imitates the evidence, if that has a
    weight, and a new head of the classifier learns the classes from clean images, at the size at
    which it will name them."""
    head = trainable(nets.classifier)
    seen = batch.images if head else adversary_view(batch.images, objective)
    logits = nets.classifier(seen).to(batch.images.dtype)
    loss = classification_loss(logits, batch.labels)
    sums = {"classifier_loss": loss, "correct": correct(logits, batch.labels)}
    gradients = None
    if objective.imitation_weight:
        imitated = imitation(
            nets.classifier, masks_of(nets.corruption, batch, objective), batch, objective
        )
        gradients = torch.autograd.grad(imitated.sum() / batch.total, trainable(nets.corruption))
        sums["imitation_loss"] = imitated
    return Step(
        corruption_gradients=gradients,
        classifier_gradients=torch.autograd.grad(loss.sum() / batch.total, head) if head else None,
        sums={name: values.detach().sum() for name, values in sums.items()},
    )


def adversarial_step(
    nets: TrainingNets, batch: Inputs, objective: Objective, area_weight: Tensor, *, joint: bool
) -> Step:
    """Train the corruption net and, where `joint`, the classifier on the same masked images, each
    by its own loss alone. area_weight: lambda, a scalar. docs/method.md has the same five points.
    """
    images, labels, total = batch.images, batch.labels, batch.total
    # 1, 2. a probability per superpixel, and a sample of it
    masks = masks_of(nets.corruption, batch, objective)
    mask = masks.mask
    # 3. masked pixels become the mean colour
    masked = adversary_view(apply_mask(images, mask), objective)
    logits = nets.classifier(masked).to(images.dtype)
    # 4. the corruption net: confuse the classifier, by as small a mask as possible
    confused = confusion_loss(logits, labels, objective.confusion)
    area = area_penalty(mask, objective.area_power)
    loss = confused + area_weight * area
    sums = {"corruption_loss": confused, "area": mask.mean(dim=(1, 2)), "area_penalty": area}
    if objective.imitation_weight:
        imitated = imitation(nets.clean_classifier, masks, batch, objective)
        loss = loss + objective.imitation_weight * imitated
        sums["imitation_loss"] = imitated
    corruption_gradients = torch.autograd.grad(
        loss.sum() / total, trainable(nets.corruption), retain_graph=joint
    )
    # 5. the classifier: name the class all the same, of masked images and of clean ones
    classified = classification_loss(logits, labels)
    sums |= {"classifier_loss": classified, "correct": correct(logits, labels)}
    classifier_gradients = None
    if joint:
        mean = classified.sum() / total
        if objective.clean_weight:
            clean_logits = nets.classifier(adversary_view(images, objective)).to(images.dtype)
            clean = classification_loss(clean_logits, labels).sum() / total
            mean = (mean + objective.clean_weight * clean) / (1 + objective.clean_weight)
        classifier_gradients = torch.autograd.grad(mean, trainable(nets.classifier))
    return Step(
        corruption_gradients=corruption_gradients,
        classifier_gradients=classifier_gradients,
        sums={name: values.detach().sum() for name, values in sums.items()},
        mask=mask.detach(),
    )


@torch.no_grad()
def probe(
    nets: TrainingNets, batch: Inputs, objective: Objective, mask: Tensor
) -> dict[str, Tensor]:
    """Count right answers that tell good masks from bad ones; it changes nothing. clean_correct: of
    the classifier on clean images. context_correct: of the clean classifier on masked ones.
    swapped_correct: with each mask on the batch's next image; more, where masks hide objects."""

    def right(classifier: nn.Module, images: Tensor) -> Tensor:
        return correct(classifier(adversary_view(images, objective)), batch.labels).sum()

    swapped = apply_mask(batch.images, mask.roll(1, 0))
    return {
        "clean_correct": right(nets.classifier, batch.images),
        "context_correct": right(nets.clean_classifier, apply_mask(batch.images, mask)),
        "swapped_correct": right(nets.clean_classifier, swapped),
    }


@torch.no_grad()
def first_sums(nets: TrainingNets, batch: Inputs, objective: Objective) -> dict[str, Tensor]:
    """Return what the balance begins with: confusion without masks, right answers under masks."""
    mask = masks_of(nets.corruption, batch, objective).mask
    clean, masked = (
        nets.classifier(adversary_view(images, objective)).to(images.dtype)
        for images in (batch.images, apply_mask(batch.images, mask))
    )
    return {
        "confusion": confusion_loss(clean, batch.labels, objective.confusion).sum(),
        "correct": correct(masked, batch.labels).sum(),
    }
