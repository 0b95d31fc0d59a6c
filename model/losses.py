"""The paper's losses (section 2.3), one value per image so that any sharding can sum them."""

import torch
from torch import Tensor
from torch.nn import functional


def corruption_loss(logits: Tensor) -> Tensor:
    """Equation 1: the top logit minus the mean of the others; float [B, C] -> [B], at least 0.

    0 exactly where the classifier scores all classes alike, that is, in full confusion. The top
    class is the one predicted on the masked image, whatever the label.
    """
    top = logits.amax(dim=1)
    others = (logits.sum(dim=1) - top) / (logits.shape[1] - 1)
    return top - others


def area_penalty(mask: Tensor, power: int) -> Tensor:
    """The masked share of each image, to the given power: float [B, H, W] -> [B] in [0, 1].

    power 1 is the paper's count of occluded pixels over the number of pixels. Power 2 costs
    nothing at the margin of an empty mask and ever more later, which keeps the corruption net
    from the empty optimum (section 2.4).
    """
    return mask.flatten(1).mean(dim=1) ** power


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy with the true label: float [B, C], int64 [B] -> [B]."""
    return functional.cross_entropy(logits, labels, reduction="none")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1.0 where the top class is the label: float [B]."""
    return (logits.argmax(dim=1) == labels).to(torch.float32)
