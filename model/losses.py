"""The paper's losses (section 2.3), one value per image so that any sharding can sum them."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

SHARPNESS = 2.0  # of the step from kept to masked, per standard deviation of the evidence
SHARE = 0.25  # how probably what is as telling as its image's average is to be masked

Confusion = Literal["top", "true-logit", "true-log-probability"]


def corruption_loss(logits: Tensor) -> Tensor:
    """Equation 1: the top logit minus the mean of the others; float [B, C] -> [B], at least 0.

    0 exactly where the classifier scores all classes alike, that is, in full confusion. The top
    class is the one predicted on the masked image, whatever the label.
    """
    top = logits.amax(dim=1)
    others = (logits.sum(dim=1) - top) / (logits.shape[1] - 1)
    return top - others


def confusion_loss(logits: Tensor, labels: Tensor, kind: Confusion) -> Tensor:
    """What the corruption net minimizes beside the area: float [B, C], int64 [B] -> [B]; 0 where
    the classifier scores all classes alike.

    top: equation 1, whatever the label. true-logit: the label's logit minus the mean of the
    others, which has no lower bound. true-log-probability: the logarithm of the label's softmax
    probability over 1/C. The two with the label are departures from the paper.
    """
    if kind == "top":
        return corruption_loss(logits)
    if kind == "true-log-probability":
        return math.log(logits.shape[1]) - classification_loss(logits, labels)
    true = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return true - (logits.sum(dim=1) - true) / (logits.shape[1] - 1)


def area_penalty(mask: Tensor, power: int) -> Tensor:
    """The masked share of each image, to the given power: float [B, H, W] -> [B] in [0, 1].

    power 1 is the paper's count of occluded pixels over the number of pixels. Power 2 costs
    nothing at the margin of an empty mask and ever more later, which keeps the corruption net
    from the empty optimum (section 2.4).
    """
    return mask.flatten(1).mean(dim=1) ** power


def imitation_loss(mask: Tensor, evidence: Tensor) -> Tensor:
    """How far masks are from what the evidence asks for: the binary cross-entropy between the
    probability of masking each pixel (float [B, H, W] in [0, 1]) and sigmoid(SHARPNESS * evidence
    + logit(SHARE)), averaged: [B]. evidence: see model/evidence.py. Not in the paper.
    """
    wanted = torch.sigmoid(SHARPNESS * evidence + math.log(SHARE / (1 - SHARE)))
    with torch.autocast(mask.device.type, enabled=False):  # it refuses probabilities
        losses = functional.binary_cross_entropy(mask.float(), wanted, reduction="none")
    return losses.mean(dim=(1, 2))


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy with the true label: float [B, C], int64 [B] -> [B]."""
    return functional.cross_entropy(logits, labels, reduction="none")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1.0 where the top class is the label: float [B]."""
    return (logits.argmax(dim=1) == labels).to(torch.float32)
