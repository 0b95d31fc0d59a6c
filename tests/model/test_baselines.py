"""Constant boxes, CAM and gradient saliency against hand-computed and independent values."""

import numpy as np
import pytest
import torch

from model.baselines import (
    GRID,
    blur,
    centred_boxes,
    class_activation_map,
    fit_centred_box,
    gradient_saliency,
    whole_image_boxes,
)
from model.classifier import Classifier
from model.metrics import best_iou


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(3, 8).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn((2, 3, 32, 48), generator=torch.Generator().manual_seed(1))


def test_constant_boxes_by_hand() -> None:
    sizes = np.array([[375, 500], [1, 1]])
    assert whole_image_boxes(sizes).tolist() == [[0, 0, 499, 374], [0, 0, 0, 0]]
    # 10 high, 20 wide, shares .5 and .35: 5 high from (10 - 5) // 2, 7 wide from (20 - 7) // 2
    assert centred_boxes(np.array([[10, 20]]), (0.5, 0.35)).tolist() == [[6, 2, 12, 6]]
    assert centred_boxes(np.array([[3, 3]]), (0.01, 0.01)).tolist() == [[1, 1, 1, 1]]


def test_the_fitted_box_is_the_best_of_a_plain_search() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(30, 80, (40, 2))
    truths = []
    for height, width in sizes.tolist():
        boxes = []
        for _ in range(rng.integers(0, 3)):
            x0, y0 = rng.integers(0, width // 3), rng.integers(0, height // 3)
            boxes.append(
                [x0, y0, rng.integers(width // 2, width), rng.integers(height // 2, height)]
            )
        truths.append(boxes)

    def hits(height_share: float, width_share: float) -> int:
        return int(
            (best_iou(centred_boxes(sizes, (height_share, width_share)), truths) >= 0.5).sum()
        )

    scores = {(float(h), float(w)): hits(h, w) for h in GRID for w in GRID}
    best = max(scores.values())
    fitted = fit_centred_box(sizes, truths)
    assert fitted == min(pair for pair, score in scores.items() if score == best)
    assert best > hits(1.0, 1.0)


def test_there_is_no_fitted_box_without_boxes() -> None:
    assert fit_centred_box(np.array([[10, 10], [20, 20]]), [[], []]) is None


def test_cam_averages_to_the_logit_less_its_bias(
    classifier: Classifier, images: torch.Tensor
) -> None:
    classes = torch.tensor([2, 0])
    maps = class_activation_map(classifier, images, classes)
    assert maps.shape == (2, 32, 48)
    with torch.no_grad():
        logits = classifier(images)
        cells = classifier.features(images).numpy()
    weights = classifier.head.weight.detach().numpy()[[2, 0]]
    expected = (weights[:, :, None, None] * cells).sum(axis=1)
    bias = classifier.head.bias.detach()[classes]
    np.testing.assert_allclose(
        expected.mean(axis=(1, 2)), (logits[[0, 1], classes] - bias).numpy(), atol=1e-5
    )
    # Bilinear enlarging without aligned corners keeps the corner cells' own values there.
    np.testing.assert_allclose(maps[:, 0, 0], expected[:, 0, 0], atol=1e-6)
    np.testing.assert_allclose(maps[:, -1, -1], expected[:, -1, -1], atol=1e-6)


def test_gradient_saliency_is_the_largest_slope_over_channels(
    classifier: Classifier, images: torch.Tensor
) -> None:
    classes = torch.tensor([1, 2])
    saliency = gradient_saliency(classifier, images, classes)
    net, exact = classifier.double(), images.double()
    step = 1e-6
    for i, y, x in ((0, 5, 7), (1, 20, 40), (1, 0, 0)):
        slopes = []
        for channel in range(3):
            ends = []
            for sign in (1, -1):
                moved = exact[i : i + 1].clone()
                moved[0, channel, y, x] += sign * step
                with torch.no_grad():
                    ends.append(float(net(moved)[0, classes[i]]))
            slopes.append(abs(ends[0] - ends[1]) / (2 * step))
        assert float(saliency[i, y, x]) == pytest.approx(max(slopes), rel=1e-3, abs=1e-7)
    classifier.float()
    assert not images.requires_grad


def test_blur_has_three_pixels_deviation_at_64() -> None:
    spot = np.zeros((1, 64, 64), np.float32)
    spot[0, 32, 32] = 1
    blurred = blur(spot)[0].astype(np.float64)
    offsets = np.arange(64) - 32
    assert blurred.sum() == pytest.approx(1, rel=1e-4)
    assert (blurred.sum(axis=0) * offsets**2).sum() == pytest.approx(9, rel=0.02)
    gauss = np.exp(-(offsets**2) / 18)
    gauss /= gauss.sum()
    np.testing.assert_allclose(blurred, np.outer(gauss, gauss), atol=1e-5)
    wide = np.zeros((1, 64, 128), np.float32)
    wide[0, 32, 64] = 1
    spread = (blur(wide)[0].sum(axis=0) * (np.arange(128) - 64) ** 2).sum()
    assert spread == pytest.approx(36, rel=0.02)
