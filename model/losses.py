"""The losses (paper, section 2.3), one value per image so that any sharding can sum them."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from model.settings import Confusion, Objective

SMALLEST_PROBABILITY = 1e-6


def corruption_loss(logits: Tensor) -> Tensor:
    """Return equation 1, the top logit minus the mean of the others: float [B, C] -> [B], at least
    0, and 0 where all classes score alike."""
    top = logits.amax(dim=1)
    return top - (logits.sum(dim=1) - top) / (logits.shape[1] - 1)


def confusion_loss(logits: Tensor, labels: Tensor, kind: Confusion) -> Tensor:
    """Return what the corruption net minimizes beside the area: float [B, C], int64 [B] -> [B].
    top: equation 1, whatever the label. Not in the paper: true-logit, the label's logit minus the
    mean of the others; true-log-probability, the logarithm of the label's probability over 1/C."""
    if kind == "top":
        return corruption_loss(logits)
    if kind == "true-log-probability":
        return math.log(logits.shape[1]) - classification_loss(logits, labels)
    true = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return true - (logits.sum(dim=1) - true) / (logits.shape[1] - 1)


def area_penalty(mask: Tensor, power: int) -> Tensor:
    """Return each image's masked share to the power: float [B, H, W] -> [B]. Power 1 is the
    paper's. Power 2 costs nothing at an empty mask, which keeps the net from it."""
    return mask.flatten(1).mean(dim=1) ** power


def imitation_loss(mask: Tensor, evidence: Tensor, objective: Objective) -> Tensor:
    """Return the binary cross-entropy between the probability of masking each pixel and
    sigmoid(sharpness * evidence + logit(share)): float [B, H, W] each -> [B]. Not in the paper. NaN
    where a probability is NaN (torch's own loss would end the process)."""
    average = math.log(objective.evidence_share / (1 - objective.evidence_share))
    wanted = torch.sigmoid(objective.evidence_sharpness * evidence + average)
    p = mask.clamp(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    losses = -(wanted * torch.log(p) + (1 - wanted) * torch.log1p(-p))
    return losses.mean(dim=(1, 2))


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the softmax cross-entropy with the true label: float [B, C], int64 [B] -> [B]."""
    return functional.cross_entropy(logits, labels, reduction="none")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1.0 where the top class is the label, else 0.0: float32 [B]."""
    return (logits.argmax(dim=1) == labels).to(torch.float32)
