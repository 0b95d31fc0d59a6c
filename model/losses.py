"""The paper's losses (section 2.3) and ours beside them, one value per image so that any sharding
can sum them."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

EVIDENCE_SHARPNESS = 2.0  # by how much a deviation of the evidence raises the wanted logit
EVIDENCE_SHARE = 0.25  # how probably what is as telling as its image's average is to be masked
SMALLEST_PROBABILITY = 1e-6

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
    probability of masking each pixel (float [B, H, W] in [0, 1]) and sigmoid(EVIDENCE_SHARPNESS *
    evidence + logit(EVIDENCE_SHARE)), averaged: [B]. evidence: see model/evidence.py. Not in the
    paper. NaN where a probability is NaN (torch's own loss would end the process).
    """
    average = math.log(EVIDENCE_SHARE / (1 - EVIDENCE_SHARE))
    wanted = torch.sigmoid(EVIDENCE_SHARPNESS * evidence + average)
    p = mask.clamp(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    losses = -(wanted * torch.log(p) + (1 - wanted) * torch.log1p(-p))
    return losses.mean(dim=(1, 2))


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy with the true label: float [B, C], int64 [B] -> [B]."""
    return functional.cross_entropy(logits, labels, reduction="none")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1.0 where the top class is the label: float [B]."""
    return (logits.argmax(dim=1) == labels).to(torch.float32)
