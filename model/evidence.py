"""Evidence: maps of the clean classifier that the corruption net may imitate (not in the paper). On
photographs of many classes the classifier's loss teaches it slowly; LayerCAM names what the
classifier reacts to, for the label, which the net does not see."""

import torch
from torch import Tensor

from model.masking import paint, superpixel_mean
from model.saliency import AnyClassifier, layer_cams, resize_maps

ENLARGEMENT = 1.5  # of the image's sides; docs/log.md compares others, of one classifier
LEVEL = 1e-4  # a map whose deviation is a smaller part of its values says nothing


def _standardized(values: Tensor) -> Tensor:
    """Return each image's map less its mean, over its deviation; a level map becomes 0."""
    centred = values - values.mean(dim=(1, 2), keepdim=True)
    deviation = centred.square().mean(dim=(1, 2), keepdim=True).sqrt()
    floor = LEVEL * values.abs().amax(dim=(1, 2), keepdim=True)
    return centred / (deviation + floor).clamp(min=torch.finfo(torch.float32).tiny)


def combined_cams(cams: list[Tensor]) -> Tensor:
    """Return the sum of the roots of LayerCAMs [B, H, W], each standardized, standardized again."""
    return _standardized(sum((_standardized(cam.sqrt()) for cam in cams), cams[0].new_zeros(())))


def evidence(
    classifier: AnyClassifier, images: Tensor, labels: Tensor, segments: Tensor, superpixels: int
) -> Tensor:
    """Return how much each superpixel speaks for its image's label: float32 [B, H, W] of mean 0 and
    deviation 1 in each image, without a gradient. The roots of `layer_cams` (a few large values
    would rule), averaged over superpixels and standardized; their sum, standardized."""
    cams = layer_cams(classifier, images, labels, enlargement=ENLARGEMENT)
    return superpixel_evidence(cams, segments, superpixels)


def superpixel_evidence(cams: list[Tensor], segments: Tensor, superpixels: int) -> Tensor:
    """Return `evidence` of the LayerCAMs of several layers, float [B, h, w] each."""
    total = torch.zeros(segments.shape, device=segments.device)
    for cam in cams:
        means = superpixel_mean(resize_maps(cam.sqrt(), segments), segments, superpixels)
        total = total + _standardized(paint(means, segments))
    return _standardized(total)
