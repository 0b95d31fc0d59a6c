"""The corruption net over a pretrained network: a light decoder of its frozen feature maps. It is
not in the paper, whose own corruption net is `model.corruption`."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.classifier import GROUPS
from model.corruption import START_BIAS, bound_logits
from model.masking import mask_map
from model.pretrained import PretrainedClassifier

START_DEVIATION = 0.02  # of the last layer's weights, so that the first masks are nearly level


class Refine(nn.Module):
    """A map plus a 3 x 3 convolution of its normalized values."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _entry(inputs: int, outputs: int) -> nn.Sequential:
    """Return a layer that takes in a network's map, whatever its scale. (Torch 2.13's group norm
    with weights of its own crashes where a channels-last input needs no gradient.)"""
    return nn.Sequential(nn.GroupNorm(1, inputs, affine=False), nn.Conv2d(inputs, outputs, 1))


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps [B, C, h, w] at another size, bilinearly. Smaller, each pixel is a weighted mean
    of all that lie under it, so that none is skipped."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    smaller = size[0] < maps.shape[-2]
    return functional.interpolate(
        maps, tuple(size), mode="bilinear", align_corners=False, antialias=smaller
    )


class Decoder(nn.Module):
    """Feature maps of strides 8, 16 and 32 -> logits of being masked [B, H/8, W/8].

    channels: of the three maps. width: of the layers within, a multiple of 16; the finest have half
    of it. No layer knows positions, so images may have any size.
    """

    def __init__(self, channels: Sequence[int], width: int, logit_limit: float) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.logit_limit = logit_limit
        self.coarse, self.middle = _entry(coarse, width), _entry(middle, width)
        self.fine, self.narrow = _entry(fine, width // 2), nn.Conv2d(width, width // 2, 1)
        self.refine = nn.ModuleList([Refine(width), Refine(width), Refine(width // 2)])
        last = nn.Conv2d(width // 2, 1, 1)
        nn.init.normal_(last.weight, std=START_DEVIATION)
        nn.init.constant_(last.bias, START_BIAS)  # type: ignore[arg-type]
        self.output = nn.Sequential(nn.GroupNorm(GROUPS, width // 2), nn.ReLU(), last)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        fine, middle = self.fine(maps[0]), self.middle(maps[1])
        x = self.refine[0](self.coarse(maps[2]))
        x = self.refine[1](middle + resize(x, middle.shape[-2:]))
        x = self.refine[2](fine + resize(self.narrow(x), fine.shape[-2:]))
        return bound_logits(self.output(x).squeeze(1), self.logit_limit)


class FeatureCorruptionNet(nn.Module):
    """Normalized images [B, 3, H, W] -> logits of being masked [B, H, W].

    encoder: a pretrained network, of which nothing trains here and nothing is saved with this net.
    sides: the encoder sees images at the last of them. averaged: logits are averaged over all
    sides, and over the image and its mirror image.
    """

    def __init__(
        self, encoder: PretrainedClassifier, sides: Sequence[int], width: int, logit_limit: float
    ) -> None:
        super().__init__()
        self.decoder = Decoder(encoder.channels, width, logit_limit)
        self.sides, self.averaged = tuple(sides), False
        self._encoder = (encoder,)  # in a tuple, into which torch does not look

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)(self.encoder, self.sides, 16, 0.0)
        copied.decoder, copied.averaged = copy.deepcopy(self.decoder, memo), self.averaged
        return copied

    @property
    def encoder(self) -> PretrainedClassifier:
        """The pretrained network."""
        return self._encoder[0]

    def encode(self, images: Tensor) -> list[Tensor]:
        """Return the encoder's maps of the images at the last side, for `decode` and evidence."""
        return self.encoder.maps(resize(images, (self.sides[-1], self.sides[-1])))

    def decode(self, maps: list[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits [B, H, W] of a size (H, W)."""
        logits = self.decoder(self.encoder.encoded(maps))
        return resize(logits.unsqueeze(1), size).squeeze(1)

    def forward(self, images: Tensor) -> Tensor:
        size, sides = images.shape[-2:], self.sides if self.averaged else self.sides[-1:]
        views = [images, images.flip(3)] if self.averaged else [images]
        total = torch.zeros((len(images), *size), device=images.device)
        for side in sides:
            for number, view in enumerate(views):
                maps = self.encoder.encode(resize(view, (side, side)))
                logits = resize(self.decoder(maps).unsqueeze(1), size).squeeze(1)
                total = total + (logits.flip(2) if number else logits)
        return total / (len(sides) * len(views))


def object_map(corruption: nn.Module, images: Tensor, segments: Tensor, superpixels: int) -> Tensor:
    """Return the map that boxes are made of, float [B, H, W] in [0, 1]: the probability of masking
    each superpixel; over a pretrained network the logit of each pixel, 0.5 where it is 0."""
    if not isinstance(corruption, FeatureCorruptionNet):
        return mask_map(corruption, images, segments, superpixels)
    return 0.5 + corruption(images).float() / (2 * corruption.decoder.logit_limit)
