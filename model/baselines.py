"""The rows that every table prints beside the method's own: constant boxes, class activation maps
of the last layer or of several, gradient saliency, layer-wise relevance.

Boxes are [x0, y0, x1, y1] in inclusive pixels; sizes are (height, width). Maps are of a given
class per image. For GT-known localization that is the true class ("the class given"); top-1
localization needs no second map, since it counts an image only where the predicted class is the
true one.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from model.classifier import Classifier
from model.protocols import IOU_THRESHOLD, box_area

GRID = np.arange(1, 41) / 40  # shares of a side that the search tries
MAX_FIT_IMAGES = 20_000
HALF_AREA = (math.sqrt(0.5), math.sqrt(0.5))  # a centred box of half the image's area
BLUR_SHARE = 3 / 64  # standard deviation of the blur, as a share of the side
SMALLEST_PART = 1e-9  # layer-wise relevance: a part nearer to 0 than this gets none

# What layer-wise relevance treats alike; a normalization with the place of its weight.
NORMALIZATIONS = {
    functional.batch_norm: 3,
    functional.instance_norm: 3,
    functional.group_norm: 2,
    functional.layer_norm: 2,
}
ACTIVATIONS = {
    functional.silu,
    functional.hardswish,
    functional.gelu,
    functional.mish,
    functional.elu,
    functional.relu6,
    functional.hardtanh,
}
GATES = {
    functional.sigmoid,
    functional.hardsigmoid,
    functional.softmax,
    torch.sigmoid,
    torch.softmax,
    Tensor.sigmoid,
    Tensor.sigmoid_,
    Tensor.softmax,
}


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
        return _resized(maps, images)


def gradient_weighted_cam(
    network: nn.Module, layer: nn.Module, images: Tensor, classes: Tensor
) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) without its final ReLU: CAM for any network of logits.

    layer: the module within `network` whose output [B, C, h, w] is read. Each of its channels is
    weighted by the class logit's gradient summed over positions. So where only global average
    pooling and one linear layer follow, the map is that of `class_activation_map`, which has
    negative values too; elsewhere it is Grad-CAM times h * w, a factor that moves no box. images:
    normalized float [B, 3, H, W]; classes: int64 [B]. Returns float32 [B, H, W], enlarged
    bilinearly.
    """
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        with torch.enable_grad():
            logits = network(images.detach().requires_grad_())
    finally:
        handle.remove()
    features = outputs[-1]
    score = logits.gather(1, classes.unsqueeze(1)).sum()
    (gradient,) = torch.autograd.grad(score, features)
    maps = torch.einsum("bc,bchw->bhw", gradient.sum(dim=(2, 3)), features.detach())
    return _resized(maps, images)


def layer_cams(
    classifier: Classifier, images: Tensor, classes: Tensor, *, enlargement: float = 1.0
) -> list[Tensor]:
    """LayerCAM (Jiang et al. 2021) of every layer whose map has the size of the last one: what
    each position's features add to the class's logit to the first order, as far as it speaks for
    the class; summed over channels.

    The gradient at a position, not its mean over positions as in CAM, says where a layer's
    features count, so earlier layers have maps too. enlargement: of the image's sides, bilinearly,
    before the classifier sees it; its maps then have as many times the cells. images: normalized
    float [B, 3, H, W]; classes: int64 [B]. Returns float32 [B, H, W] each, at least 0.
    """
    views = images.detach()
    if enlargement != 1:
        views = functional.interpolate(
            views, scale_factor=enlargement, mode="bilinear", align_corners=False
        )
    with torch.enable_grad():
        maps = classifier.final_maps(views)
        score = classifier.classify(maps[-1]).gather(1, classes.unsqueeze(1)).sum()
    gradients = torch.autograd.grad(score, maps)
    return [
        _resized((values.detach().float() * gradient.float()).clamp(min=0).sum(dim=1), images)
        for values, gradient in zip(maps, gradients, strict=True)
    ]


def gradient_saliency(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The class logit's gradient with respect to the image (Simonyan et al. 2014): magnitude.

    The largest absolute value over the channels; float32 [B, H, W], at least 0. images: normalized
    float [B, 3, H, W]; classes: int64 [B].
    """
    images = images.detach().requires_grad_()
    score = network(images).gather(1, classes.unsqueeze(1)).sum()
    (gradient,) = torch.autograd.grad(score, images)
    return gradient.abs().amax(dim=1)


def _resized(maps: Tensor, images: Tensor) -> Tensor:
    """Maps [B, h, w] at the images' size, bilinearly."""
    return functional.interpolate(
        maps.unsqueeze(1), size=images.shape[-2:], mode="bilinear", align_corners=False
    ).squeeze(1)


class _Explained(torch.autograd.Function):
    """A value whose gradient x input passes its relevance on to `part`, in proportion."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, part: Tensor) -> Tensor:
        small = part.abs() <= SMALLEST_PART
        ctx.save_for_backward((value / part).masked_fill_(small, 0))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (ratio,) = ctx.saved_tensors
        return None, gradient * ratio


class _RelevanceRules(TorchFunctionMode):
    """While entered, gradient x input of what torch computes is layer-wise relevance.

    Values stay what they are; only their gradients change. What is not named here (linear layers,
    pooling, sums, ReLU) keeps its gradient, which shares relevance in proportion already.

    ones: 1 for each pixel that the first convolution reads, [B, 1, H, W]; None before it. Their
    gradient is the relevance of the pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ones: Tensor | None = None
        self._convolved: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func is functional.conv2d:
            return self._convolution(*args, **named)
        if func in NORMALIZATIONS:
            place = NORMALIZATIONS[func]
            scale = named.get("weight", args[place] if len(args) > place else None)
            # As one fixed factor per value: all relevance goes to the value that is normalized.
            return self._normalization(args[0], func(*args, **named).detach(), scale)
        if func in ACTIVATIONS:
            value = func(args[0].detach().clone(), *args[1:], **named)  # may work in place
            return _Explained.apply(value, args[0])
        if func in GATES:
            return func(args[0].detach().clone(), *args[1:], **named)  # a factor, no signal
        return func(*args, **named)

    def _convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        weight = weight.detach()
        place = (stride, padding, dilation)
        with torch.no_grad():
            value = functional.conv2d(x, weight, bias, *place, groups)
        if self.ones is None:
            self.ones = torch.ones_like(x[:, :1]).requires_grad_()
            window = torch.ones_like(weight[:1, :1])
            return _Explained.apply(value, functional.conv2d(self.ones, window, None, *place))

        def positive(weight: Tensor) -> Tensor:
            """The sum of the positive terms x * weight alone."""
            above, below = weight.clamp(min=0), weight.clamp(max=0)
            if not bool((x.detach() < 0).any()):  # as after a ReLU: half the cost
                return functional.conv2d(x, above, None, *place, groups)
            high = functional.conv2d(x.clamp(min=0), above, None, *place, groups)
            return high + functional.conv2d(x.clamp(max=0), below, None, *place, groups)

        output = _Explained.apply(value, positive(weight))
        self._convolved = output, lambda signs: positive(weight * signs.view(-1, 1, 1, 1))
        return output

    def _normalization(self, x: Tensor, value: Tensor, scale: Tensor | None) -> Tensor:
        convolved, self._convolved = self._convolved, None
        if scale is not None and convolved is not None and x is convolved[0]:
            signs = scale.detach().sign()
            if bool((signs < 0).any()):  # what was negative before is positive after
                return _Explained.apply(value, convolved[1](signs))
        return _Explained.apply(value, x)


def layerwise_relevance(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Layer-wise relevance propagation (LRP, Bach et al. 2015) of the class's logit to the pixels.

    Positive values speak for the class, negative ones against it. They sum up to the logit less
    what biases keep: those of linear layers, and those that made a value on their own. Rules:
    linear layers share relevance by their terms x * weight, convolutions by the positive terms
    alone (z+; the bias gets none), the first one evenly over its window (flat), so that brightness
    does not count; normalizations and activations pass it on whole; sums share it in proportion,
    maxima give it to the largest; gates (sigmoid, softmax) are factors.

    network: logits from convolutions, in evaluation mode; anything made of torch.nn layers or
    torch.nn.functional calls, uncompiled. Its weights and modules are not touched, and images do
    not affect each other. images: normalized float [B, 3, H, W]; classes: int64 [B]. Returns
    float32 [B, H, W]; where the first convolution sees another size (padding, a rearranging
    stem), the map is resized bilinearly from there. Raises ValueError for a network without a
    convolution.

    Blur the signed map before a box is found. Measured on the generated set (1,000 images, GT-known
    by the paper's rule, interval +-2.3 points), blurred: signed 84.1 %, positive part 84.1 %,
    absolute value 84.8 %; not blurred: 45 % each. Other rules, signed and blurred: gamma 0.25
    74.8 %, epsilon 13.2 %.
    """
    rules = _RelevanceRules()
    with torch.enable_grad(), rules:
        logits = network(images.detach())
    if rules.ones is None:
        raise ValueError(
            f"{type(network).__name__} has no convolution, where relevance would reach the pixels; "
            "layer-wise relevance is for convolutional networks."
        )
    score = logits.gather(1, classes.unsqueeze(1)).sum()
    (relevance,) = torch.autograd.grad(score, rules.ones)
    maps = relevance.squeeze(1)
    return maps if maps.shape[-2:] == images.shape[-2:] else _resized(maps, images)


def blur(maps: np.ndarray) -> np.ndarray:
    """Gaussian blur of each map: float32 [B, H, W] -> the same; its standard deviation is 3
    pixels for a side of 64, in proportion for others."""
    height, width = maps.shape[1:]
    sigmas = {"sigmaX": BLUR_SHARE * width, "sigmaY": BLUR_SHARE * height}
    blurred = [cv2.GaussianBlur(values, (0, 0), **sigmas) for values in maps]
    return np.stack(blurred) if blurred else maps
