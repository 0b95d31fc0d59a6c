"""The corruption net over a pretrained network: a light decoder of its frozen feature maps. It is
not in the paper, whose own corruption net is `model.corruption`."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.classifier import GROUPS
from model.corruption import START_BIAS, bound_logits
from model.localization import Rule, map_box
from model.masking import mask_map
from model.pretrained import PretrainedClassifier

LOOK = 1.2  # sides of the part that is looked at again, over those of the box
LOOK_LEAST = 32  # pixels
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
    """Feature maps of strides 8, 16 and 32 -> logits of being masked [B, H/8, W/8]. channels: of
    the three maps. width: of the layers within, a multiple of 16; the finest have half of it. No
    layer knows positions, so images may have any size."""

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
        # Not a ReLU: where all of its outputs raise the logit, none can fall below the last bias.
        self.logit = nn.Sequential(nn.GroupNorm(GROUPS, width // 2), nn.SiLU(), last)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        fine, middle = self.fine(maps[0]), self.middle(maps[1])
        x = self.refine[0](self.coarse(maps[2]))
        x = self.refine[1](middle + resize(x, middle.shape[-2:]))
        x = self.refine[2](fine + resize(self.narrow(x), fine.shape[-2:]))
        return bound_logits(self.logit(x).squeeze(1), self.logit_limit)


class FeatureCorruptionNet(nn.Module):
    """Normalized images [B, 3, H, W] -> logits of being masked [B, H, W]. encoder: a pretrained
    network, of which nothing trains here and nothing is saved with this net. sides: the encoder
    sees images at the last of them. looks: a box rule, by which `look_closer` follows on logits
    averaged over all sides and the mirror image; None: one view alone."""

    def __init__(
        self, encoder: PretrainedClassifier, sides: Sequence[int], width: int, logit_limit: float
    ) -> None:
        super().__init__()
        self.decoder = Decoder(encoder.channels, width, logit_limit)
        self.sides = tuple(sides)
        self.looks: Rule | None = None
        self._encoder = (encoder,)  # in a tuple, into which torch does not look

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)(self.encoder, self.sides, 16, 0.0)
        copied.decoder, copied.looks = copy.deepcopy(self.decoder, memo), self.looks
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
        if self.looks is None:
            return self.view(images, self.sides[-1])
        sides = [self._both_views(images, side) for side in self.sides]
        return self.look_closer(images, torch.stack(sides).mean(dim=0), self.looks)

    def look_closer(self, images: Tensor, logits: Tensor, rule: Rule) -> Tensor:
        """Return the logits, those around each image's box averaged with those of that part alone,
        enlarged to the image's size: small objects get more of the encoder's cells."""
        height, width = images.shape[-2:]
        parts = [
            _around(map_box(values, rule), height, width)
            for values in logits.detach().cpu().numpy()
        ]
        crops = [
            resize(image[:, rows, columns].unsqueeze(0), (height, width))
            for image, (rows, columns) in zip(images, parts, strict=True)
        ]
        closer = self._both_views(torch.cat(crops), self.sides[-1])
        logits = logits.clone()
        for i, (rows, columns) in enumerate(parts):
            first = logits[i, rows, columns]
            second = resize(closer[i, None, None], first.shape)[0, 0]
            logits[i, rows, columns] = (first + second) / 2
        return logits

    def view(self, images: Tensor, side: int) -> Tensor:
        """Return the logits of images that the encoder sees at one side."""
        logits = self.decoder(self.encoder.encode(resize(images, (side, side))))
        return resize(logits.unsqueeze(1).float(), images.shape[-2:]).squeeze(1)  # of bfloat16

    def _both_views(self, images: Tensor, side: int) -> Tensor:
        return (self.view(images, side) + self.view(images.flip(3), side).flip(2)) / 2


def _around(box: np.ndarray | None, height: int, width: int) -> tuple[slice, slice]:
    """Return the rows and columns of an image that a box enlarged by LOOK covers; of no box, all.
    At least LOOK_LEAST pixels each way, where the image has them."""
    if box is None:
        return slice(0, height), slice(0, width)
    spans = []
    for low, high, size in ((box[1], box[3], height), (box[0], box[2], width)):
        length = max(LOOK * (high + 1 - low), LOOK_LEAST)
        start = max(math.floor((low + high + 1 - length) / 2), 0)
        spans.append(slice(start, min(math.ceil((low + high + 1 + length) / 2), size)))
    return spans[0], spans[1]


def object_map(corruption: nn.Module, images: Tensor, segments: Tensor, superpixels: int) -> Tensor:
    """Return the map that boxes are made of, float [B, H, W] in [0, 1]: the probability of masking
    each superpixel; over a pretrained network the logit of each pixel, 0.5 where it is 0."""
    if not isinstance(corruption, FeatureCorruptionNet):
        return mask_map(corruption, images, segments, superpixels)
    return 0.5 + corruption(images).float() / (2 * corruption.decoder.logit_limit)
