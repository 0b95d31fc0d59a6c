"""The 4-layer convolutional classifier (paper, section 3.3), deeper where asked for."""

from torch import Tensor, nn
from torch.nn import functional

GROUPS = 8


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """Convolution, group norm, ReLU.

    Group norm rather than batch norm: a step is then the same on any number of workers, clean
    and masked images do not share statistics, and training equals evaluation.
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
    """Normalized images [B, 3, H, W] -> logits [B, classes].

    width: channels of the first layer (a multiple of 8); the others have 2, 4 and 5.33 times as
    many. residual_blocks: how many follow each layer but the first, which has four times the
    pixels of the next (the paper's: 0). The feature map has H/8 x W/8 cells; its mean goes to one
    linear layer, so that class activation maps (CAM) are defined.
    """

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
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[3], classes)

    def features(self, images: Tensor) -> Tensor:
        """The last feature map, float [B, C, H/8, W/8], at least 0."""
        return self.layers(images)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        return self.head(functional.adaptive_avg_pool2d(features, 1).flatten(1))
