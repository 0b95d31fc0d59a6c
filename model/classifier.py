"""The 4-layer convolutional classifier (paper, section 3.3), optionally deeper."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = 8
CROP_SHARE = 7 / 8  # of the image's sides


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """Return a convolution, group norm and ReLU. Unlike with batch norm a step is the same on any
    number of workers, clean and masked images share no statistics, and training is as evaluation.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside an identity (He et al. 2016), which it is at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        norm = nn.GroupNorm(GROUPS, channels)
        nn.init.zeros_(norm.weight)
        self.body = nn.Sequential(
            convolution(channels, channels, 3, 1),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            norm,
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.body(x))


class Classifier(nn.Module):
    """Normalized images [B, 3, H, W] -> logits [B, classes]. width: channels of the first layer (a
    multiple of 8); the others have 2, 4 and 5.33 times as many. residual_blocks: after each layer
    but the first (the paper's: 0). Its mean goes to one linear layer, so that CAM is defined."""

    def __init__(self, classes: int, width: int, residual_blocks: int = 0) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 16 * width // 3 // GROUPS * GROUPS)
        layers: list[nn.Module] = [convolution(3, widths[0], 5, 2)]
        for inputs, outputs, kernel, stride in (
            (widths[0], widths[1], 5, 2),
            (widths[1], widths[2], 3, 2),
            (widths[2], widths[3], 3, 1),
        ):
            layers.append(convolution(inputs, outputs, kernel, stride))
            layers += [Residual(outputs) for _ in range(residual_blocks)]
        self.first_final = 2 + residual_blocks  # of the layers whose map has the last one's size
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[3], classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the last feature map: float [B, C, H/8, W/8], at least 0."""
        return self.layers(images)

    def final_maps(self, images: Tensor) -> list[Tensor]:
        """Return the output [B, C, H/8, W/8] of each layer that has the last feature map's size.
        Gradients reach the first of them and no layer below it."""
        with torch.no_grad():
            x = self.layers[: self.first_final + 1](images)
        maps = [x.detach().requires_grad_()]
        for layer in list(self.layers)[self.first_final + 1 :]:
            maps.append(layer(maps[-1]))
        return maps

    def classify(self, features: Tensor) -> Tensor:
        """Return logits [B, classes] of the last feature map."""
        return self.head(functional.adaptive_avg_pool2d(features, 1).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))


def ten_crops(images: Tensor) -> Iterator[Tensor]:
    """Yield the corners and the centre, 7/8 of the sides, each also mirrored, enlarged to the
    images' own size: ten times float [B, 3, H, W] (Krizhevsky et al. 2012 do not enlarge them)."""
    size = images.shape[-2:]
    h, w = (round(CROP_SHARE * side) for side in size)
    below, right = size[0] - h, size[1] - w
    corners = ((0, 0), (0, right), (below, 0), (below, right), (below // 2, right // 2))
    for top, left in corners:
        crop = images[:, :, top : top + h, left : left + w]
        crop = functional.interpolate(crop, size, mode="bilinear", align_corners=False)
        yield crop
        yield crop.flip(3)


def class_probabilities(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, *, crops: bool
) -> Tensor:
    """Return softmax probabilities, float [B, classes]; of `crops` the mean over `ten_crops`."""
    views = ten_crops(images) if crops else [images]
    return torch.stack([torch.softmax(logits_of(view), dim=1) for view in views]).mean(dim=0)
