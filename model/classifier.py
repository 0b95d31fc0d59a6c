"""The 4-layer convolutional classifier (paper, section 3.3)."""

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


class Classifier(nn.Module):
    """Normalized images [B, 3, H, W] -> logits [B, classes].

    width: channels of the first layer (a multiple of 8); the others have 2, 4 and 5.33 times as
    many. The feature map has H/8 x W/8 cells; its mean goes to one linear layer, so that class
    activation maps (CAM) are defined.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 16 * width // 3 // GROUPS * GROUPS)
        self.layers = nn.Sequential(
            convolution(3, widths[0], 5, 2),
            convolution(widths[0], widths[1], 5, 2),
            convolution(widths[1], widths[2], 3, 2),
            convolution(widths[2], widths[3], 3, 1),
        )
        self.head = nn.Linear(widths[3], classes)

    def features(self, images: Tensor) -> Tensor:
        """The last feature map, float [B, C, H/8, W/8], at least 0."""
        return self.layers(images)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        return self.head(functional.adaptive_avg_pool2d(features, 1).flatten(1))
