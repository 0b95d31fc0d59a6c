"""From a probability per pixel to a hard mask per superpixel (paper, section 2.2).

Shapes: B images, H x W pixels, K the largest number of superpixels in the data set. Images
with fewer leave the last columns of [B, K] tensors empty.
"""

import torch
from torch import Tensor, nn


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return images float32 of zero mean and unit deviation per channel.

    images: uint8 [B, 3, H, W]. mean, std: float32 [3] in 0..255, on the images' device. A masked
    pixel is set to 0 afterwards, that is, to the data set's mean colour.
    """
    shape = (1, 3, 1, 1)
    return (images.to(torch.float32) - mean.view(shape)) / std.view(shape)


def superpixel_mean(values: Tensor, segments: Tensor, superpixels: int) -> Tensor:
    """Return the mean of `values` (float [B, H, W]) over each superpixel: float [B, K].

    segments: int64 [B, H, W], labels below `superpixels` (K). An absent superpixel gets 0; it
    covers no pixel, so its value reaches nothing.
    """
    flat = segments.flatten(1)
    totals = values.new_zeros(len(values), superpixels).scatter_add(1, flat, values.flatten(1))
    ones = torch.ones_like(values.flatten(1))
    pixels = values.new_zeros(len(values), superpixels).scatter_add(1, flat, ones)
    return totals / pixels.clamp(min=1)


def paint(values: Tensor, segments: Tensor) -> Tensor:
    """Give each pixel its superpixel's value: [B, K] and int64 [B, H, W] -> [B, H, W]."""
    return values.gather(1, segments.flatten(1)).view(segments.shape)


def gumbel_difference(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return float32 z1 - z2 of two independent standard Gumbel variables.

    It is on the generator's device. z = -ln(-ln u) with u uniform in (0, 1); the paper prints
    -ln(-ln(-u)), which is not a number.
    """
    device = generator.device
    tiny = torch.finfo(torch.float32).tiny
    u = torch.rand((2, *shape), generator=generator, device=device).clamp(tiny, 1 - 2**-24)
    z = -torch.log(-torch.log(u))
    return z[0] - z[1]


def bernoulli_straight_through(probability: Tensor, noise: Tensor) -> Tensor:
    """Return exact Bernoulli(p) samples in {0, 1}, with the gradient of p itself.

    probability: float in [0, 1], any shape; noise: `gumbel_difference` of that shape. A sample
    is 1 where log p + z1 > log(1 - p) + z2 (the Gumbel-max rule); backwards it counts as p
    (the straight-through estimator).
    """
    tiny = torch.finfo(probability.dtype).tiny
    p = probability.detach()
    hard = torch.log(p.clamp(min=tiny)) + noise > torch.log((1 - p).clamp(min=tiny))
    return hard.to(probability.dtype) + (probability - p)


def pixel_segments(segments: Tensor) -> Tensor:
    """Return a superpixel of its own for each pixel: int64 [B, H, W], labels 0 to HW - 1."""
    _, height, width = segments.shape
    grid = torch.arange(height * width, device=segments.device).view(1, height, width)
    return grid.expand_as(segments)


def mask_probability(
    corruption: nn.Module, images: Tensor, segments: Tensor, superpixels: int
) -> Tensor:
    """Return the probability of masking each superpixel: float [B, K] in [0, 1]."""
    logits = corruption(images).to(images.dtype)  # autocast's are bfloat16
    return superpixel_mean(torch.sigmoid(logits), segments, superpixels)


def apply_mask(images: Tensor, mask: Tensor) -> Tensor:
    """Set masked pixels to 0: normalized [B, 3, H, W], mask [B, H, W] (1: masked)."""
    return images * (1 - mask).unsqueeze(1)


def mask_map(corruption: nn.Module, images: Tensor, segments: Tensor, superpixels: int) -> Tensor:
    """Return each pixel's probability of being masked, averaged over its superpixel.

    images: normalized float [B, 3, H, W]; segments: int64 [B, H, W], labels below `superpixels`.
    Returns float [B, H, W] in [0, 1].
    """
    return paint(mask_probability(corruption, images, segments, superpixels), segments)
