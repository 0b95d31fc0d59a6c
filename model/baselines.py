"""The rows that every table prints beside the method's own: constant boxes, CAM, gradient saliency.

Boxes are [x0, y0, x1, y1] in inclusive pixels; sizes are (height, width). Maps are of a given
class per image. For GT-known localization that is the true class ("the class given"); top-1
localization needs no second map, since it counts an image only where the predicted class is the
true one.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.classifier import Classifier
from model.protocols import IOU_THRESHOLD, box_area

GRID = np.arange(1, 41) / 40  # shares of a side that the search tries
MAX_FIT_IMAGES = 20_000
HALF_AREA = (math.sqrt(0.5), math.sqrt(0.5))  # a centred box of half the image's area
BLUR_SHARE = 3 / 64  # standard deviation of the blur, as a share of the side


def whole_image_boxes(sizes: np.ndarray) -> np.ndarray:
    """The box that covers each image: integer [N, 2] -> int64 [N, 4]."""
    return centred_boxes(sizes, (1.0, 1.0))


def centred_boxes(sizes: np.ndarray, shares: tuple[float, float]) -> np.ndarray:
    """A centred box in each image: integer [N, 2] -> int64 [N, 4].

    shares: its (height, width) as shares of the image's, in (0, 1]; rounded to whole pixels, at
    least one. An odd margin's extra pixel lies right of and below the box.
    """
    extent = np.maximum(np.rint(sizes * np.array(shares)), 1).astype(np.int64)
    first = (sizes - extent) // 2
    return np.concatenate([first[:, ::-1], (first + extent - 1)[:, ::-1]], axis=1)


def _overlaps(
    sizes: np.ndarray, low: np.ndarray, high: np.ndarray, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis (0: y, 1: x), for each share of GRID and each truth: extent of the centred
    box, and pixels it shares with the truth; int64 [len(GRID), M] each."""
    extents, shared = [], []
    for share in GRID:
        boxes = centred_boxes(sizes, (share, share))
        start, stop = boxes[:, 1 - axis], boxes[:, 3 - axis]
        extents.append(stop - start + 1)
        shared.append(np.clip(np.minimum(stop, high) - np.maximum(start, low) + 1, 0, None))
    return np.stack(extents), np.stack(shared)


def fit_centred_box(
    sizes: np.ndarray, truths: Sequence[Sequence[Sequence[int]]]
) -> tuple[float, float] | None:
    """The (height, width) shares whose centred box has the best GT-known localization.

    sizes: integer [N, 2]; truths: for each image its boxes, possibly none. Every pair of shares
    1/40, 2/40 ... 1 is tried, on at most 20,000 images spread evenly over the set; of equally
    good pairs the one with the smallest height, then width, wins. None where no box is known.
    """
    usable = np.array([i for i, boxes in enumerate(truths) if boxes], np.int64)
    if not len(usable):
        return None
    step = -(-len(usable) // MAX_FIT_IMAGES)
    usable = usable[::step]
    flat = np.concatenate([np.array(truths[i], np.int64).reshape(-1, 4) for i in usable])
    amounts = np.array([len(truths[i]) for i in usable])
    starts = np.cumsum(amounts) - amounts
    sizes_m = np.repeat(sizes[usable], amounts, axis=0)
    heights, shared_y = _overlaps(sizes_m, flat[:, 1], flat[:, 3], axis=0)
    widths, shared_x = _overlaps(sizes_m, flat[:, 0], flat[:, 2], axis=1)
    truth_areas = box_area(flat)
    hits = np.zeros((len(GRID), len(GRID)), np.int64)
    for i in range(len(GRID)):
        intersection = shared_y[i] * shared_x  # [widths, M]
        union = heights[i] * widths + truth_areas - intersection
        right = intersection >= IOU_THRESHOLD * union
        hits[i] = np.logical_or.reduceat(right, starts, axis=1).sum(axis=1)
    best = np.unravel_index(int(hits.argmax()), hits.shape)
    return float(GRID[best[0]]), float(GRID[best[1]])


def class_activation_map(classifier: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """CAM (Zhou et al. 2016): the last features weighted as the class's logit weights them.

    images: normalized float [B, 3, H, W]; classes: int64 [B]. Returns float32 [B, H, W], enlarged
    bilinearly; its mean at the features' own size is the class's logit less the bias.
    """
    with torch.no_grad():
        weights = classifier.head.weight[classes]
        maps = torch.einsum("bc,bchw->bhw", weights, classifier.features(images))
        size = images.shape[-2:]
        return functional.interpolate(
            maps.unsqueeze(1), size=size, mode="bilinear", align_corners=False
        ).squeeze(1)


def gradient_saliency(classifier: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """The class logit's gradient with respect to the image (Simonyan et al. 2014): magnitude.

    The largest absolute value over the channels; float32 [B, H, W], at least 0. images: normalized
    float [B, 3, H, W]; classes: int64 [B].
    """
    images = images.detach().requires_grad_()
    score = classifier(images).gather(1, classes.unsqueeze(1)).sum()
    (gradient,) = torch.autograd.grad(score, images)
    return gradient.abs().amax(dim=1)


def blur(maps: np.ndarray) -> np.ndarray:
    """Gaussian blur of each map: float32 [B, H, W] -> the same; its standard deviation is 3
    pixels for a side of 64, in proportion for others."""
    height, width = maps.shape[1:]
    sigmas = {"sigmaX": BLUR_SHARE * width, "sigmaY": BLUR_SHARE * height}
    blurred = [cv2.GaussianBlur(values, (0, 0), **sigmas) for values in maps]
    return np.stack(blurred) if blurred else maps
