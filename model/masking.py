"""From a probability per pixel to a hard mask per superpixel (paper, section 2.2). Shapes: B
images, H x W pixels, K the largest number of superpixels in the data set (`superpixels`). Images
with fewer leave the last columns of [B, K] tensors empty. images: normalized float [B, 3, H, W],
unless stated otherwise; segments: int64 [B, H, W], labels below K."""

import torch
from torch import Tensor, nn


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return uint8 images [B, 3, H, W] as float32 of zero mean and unit deviation per channel.
    mean, std: float32 [3] in 0..255. So 0, to which masked pixels are set, is the mean colour."""
    return (images.to(torch.float32) - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def superpixel_mean(values: Tensor, segments: Tensor, superpixels: int) -> Tensor:
    """Return means over superpixels, 0 for absent ones: float [B, H, W] -> [B, K]."""
    flat, pixels = segments.flatten(1), values.flatten(1)
    zeros = values.new_zeros(len(values), superpixels)
    counts = zeros.scatter_add(1, flat, torch.ones_like(pixels))
    return zeros.scatter_add(1, flat, pixels) / counts.clamp(min=1)


def paint(values: Tensor, segments: Tensor) -> Tensor:
    """Give each pixel its superpixel's value: [B, K] and int64 [B, H, W] -> [B, H, W]."""
    return values.gather(1, segments.flatten(1)).view(segments.shape)


def gumbel_difference(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return float32 z1 - z2 of two independent standard Gumbel variables, on the generator's
    device. z = -ln(-ln u), u uniform in (0, 1); the paper's -ln(-ln(-u)) is not a number."""
    u = torch.rand((2, *shape), generator=generator, device=generator.device)
    z = -torch.log(-torch.log(u.clamp(torch.finfo(torch.float32).tiny, 1 - 2**-24)))
    return z[0] - z[1]


def bernoulli_straight_through(probability: Tensor, noise: Tensor) -> Tensor:
    """Return exact Bernoulli(p) samples in {0, 1}, 1 where log p + z1 > log(1 - p) + z2
    (Gumbel-max), with the gradient of p itself. noise: `gumbel_difference` of p's shape."""
    tiny = torch.finfo(probability.dtype).tiny
    p = probability.detach()
    hard = torch.log(p.clamp(min=tiny)) + noise > torch.log((1 - p).clamp(min=tiny))
    return hard.to(probability.dtype) + (probability - p)


def pixel_segments(segments: Tensor) -> Tensor:
    """Return a superpixel of its own for each pixel: int64 [B, H, W], labels 0 to HW - 1."""
    shape = segments.shape[1:]
    return torch.arange(shape.numel(), device=segments.device).view(shape).expand_as(segments)


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
    """Return each superpixel's probability of being masked at its pixels: float [B, H, W]."""
    return paint(mask_probability(corruption, images, segments, superpixels), segments)
