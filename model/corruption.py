"""The corruption net: which pixels to mask (paper, section 2.1)."""

from typing import Any

import torch
from torch import Tensor, nn

from model.classifier import GROUPS, Classifier, convolution
from model.settings import LOGIT_LIMIT

STRIDE = 16  # of the bottleneck: image sides must be multiples of it
START_BIAS = -1.0  # the first masks cover about a quarter of the image
GUIDED_LAYER = 2  # of the encoder: its map has the size of the classifier's last


class _Projection(torch.autograd.Function):
    """Clamp to [-limit, limit]; a gradient passes a bound only towards the inside."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.limit = limit
        return logits.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (logits,), (gradient,) = ctx.saved_tensors, gradients
        # descent moves against the gradient
        above = (logits >= ctx.limit) & (gradient < 0)
        below = (logits <= -ctx.limit) & (gradient > 0)
        return gradient.masked_fill(above | below, 0), None


def bound_logits(logits: Tensor, limit: float) -> Tensor:
    """Project logits onto [-limit, limit] (0: not at all), so that no probability stays saturated:
    a sigmoid's slope vanishes at large logits, and from a bound descent can only move back
    inside."""
    return _Projection.apply(logits, limit) if limit else logits


class Up(nn.Module):
    """Deconvolution to twice the size, plus the encoder's map, plus a residual convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.deconvolution = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        self.residual = nn.Sequential(
            nn.GroupNorm(GROUPS, outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.deconvolution(x) + skip
        return x + self.residual(x)


class CorruptionNet(nn.Module):
    """Normalized images [B, 3, H, W] -> logits of being masked [B, H, W]. A stride-2 encoder, a
    fully connected bottleneck over the whole image, and deconvolutions with an additive connection
    from every encoder layer. size: (H, W), multiples of 16. guide: a classifier, not trained
    further, whose last feature map is mixed into the encoder (not in the paper)."""

    def __init__(
        self,
        size: tuple[int, int],
        width: int,
        bottleneck: int,
        logit_limit: float = LOGIT_LIMIT,
        guide: Classifier | None = None,
    ) -> None:
        super().__init__()
        self.logit_limit, self.guide = logit_limit, guide
        widths = (width, 2 * width, 4 * width, 16 * width // 3 // GROUPS * GROUPS)
        self.encoder = nn.ModuleList(
            [
                convolution(3, widths[0], 5, 2),
                convolution(widths[0], widths[1], 5, 2),
                convolution(widths[1], widths[2], 3, 2),
                convolution(widths[2], widths[3], 3, 2),
            ]
        )
        cells = (size[0] // STRIDE) * (size[1] // STRIDE)
        self.bottleneck = nn.Sequential(
            nn.Flatten(),
            nn.Linear(widths[3] * cells, bottleneck),
            nn.ReLU(),
            nn.Linear(bottleneck, widths[3] * cells),
        )
        self.decoder = nn.ModuleList(
            [Up(widths[3], widths[2]), Up(widths[2], widths[1]), Up(widths[1], widths[0])]
        )
        self.output = nn.ConvTranspose2d(widths[0], 1, 2, 2)
        nn.init.constant_(self.output.bias, START_BIAS)  # type: ignore[arg-type]
        self.mix: nn.Module | None = None
        if guide is not None:
            guide.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):  # what is drawn next is as without a guide
                self.mix = convolution(guide.head.in_features, widths[2], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, skips = images, []
        for number, layer in enumerate(self.encoder):
            x = layer(x)
            if number == GUIDED_LAYER and self.guide is not None and self.mix is not None:
                with torch.no_grad():
                    features = self.guide.features(images)
                x = x + self.mix(features)
            skips.append(x)
        x = x + self.bottleneck(x).view_as(x)
        for layer, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            x = layer(x, skip)
        return bound_logits(self.output(x).squeeze(1), self.logit_limit)
