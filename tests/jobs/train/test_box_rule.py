"""The box rule that a training over a network records."""

import numpy as np
import pytest
import torch

from jobs.runs import ModelConfig, Nets
from jobs.train.box_rule import agreement, choose_rule
from model.decoder import FeatureCorruptionNet
from model.localization import map_box
from model.masking import normalize
from model.pretrained import PretrainedClassifier
from tests.model.test_decoder import network

MEAN, STD = (100.0, 110.0, 120.0), (60.0, 50.0, 70.0)


@pytest.mark.parametrize(
    ("otsu", "medoid", "rule"),
    [(0.9, 0.88, "medoid"), (0.9, 0.87, "otsu"), (0.8, 0.9, "medoid"), (0.5, 0.475, "medoid")],
)
def test_the_medoid_needs_to_agree_almost_as_well(otsu: float, medoid: float, rule: str) -> None:
    assert choose_rule({"otsu": otsu, "medoid": medoid}) == rule


def nets_of(network: PretrainedClassifier, sides: tuple[int, int]) -> Nets:
    config = ModelConfig(
        classes=("a", "b", "c"),
        class_names=("a", "b", "c"),
        height=64,
        width=64,
        mean=MEAN,
        std=STD,
        superpixels=16,
        compactness=10.0,
        net_width=8,
        bottleneck=8,
        sides=sides,
    )
    return Nets(config, FeatureCorruptionNet(network, sides, 16, 8.0), network, network)


def test_agreement_is_the_mean_iou_of_boxes_at_two_sides() -> None:
    nets = nets_of(network(), (64, 96))
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    assert agreement(nets_of(network(), (64, 64)), [images]) == {"otsu": 1.0, "medoid": 1.0}

    def pixels(image: torch.Tensor, side: int) -> np.ndarray:
        x = normalize(image[None], torch.tensor(MEAN), torch.tensor(STD))
        assert isinstance(nets.corruption, FeatureCorruptionNet)
        box = map_box(nets.corruption.view(x, side)[0].detach().numpy(), "otsu")
        assert box is not None
        inside = np.zeros((64, 64), bool)
        inside[box[1] : box[3] + 1, box[0] : box[2] + 1] = True
        return inside

    pairs = [(pixels(image, 64), pixels(image, 96)) for image in images]
    expected = np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs])
    assert expected < 1
    result = agreement(nets, [images[:2], images[2:]])
    assert result["otsu"] == pytest.approx(expected, abs=1e-3)
