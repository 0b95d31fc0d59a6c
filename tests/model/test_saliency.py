"""Class activation maps and gradient saliency against hand-computed and independent values."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from model.classifier import Classifier
from model.saliency import blur, class_activation_map, gradient_saliency, layer_cams


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


def test_layer_cam_sums_what_each_feature_adds_to_the_logit_where_it_adds(
    images: torch.Tensor,
) -> None:
    """By moving single features of the corner cells, which bilinear enlarging keeps."""
    torch.manual_seed(0)
    classifier = Classifier(3, 8, residual_blocks=1).requires_grad_(False)
    classes = torch.tensor([2, 0])
    maps = layer_cams(classifier, images, classes)
    assert len(maps) == 4  # two convolutions, a block behind each
    assert all(m.shape == (2, 32, 48) and m.dtype == torch.float32 for m in maps)
    exact, step = classifier.double(), 1e-6
    features = [values.detach() for values in exact.final_maps(images.double())]
    layers = list(exact.layers)[-4:]
    for number, own in enumerate(features):
        for i, corner in ((0, 0), (1, -1)):
            expected = 0.0
            for channel in range(own.shape[1]):
                ends = []
                for sign in (1, -1):
                    moved = own[i : i + 1].clone()
                    moved[0, channel, corner, corner] += sign * step
                    for layer in layers[number + 1 :]:
                        moved = layer(moved)
                    ends.append(float(exact.classify(moved)[0, classes[i]]))
                slope = (ends[0] - ends[1]) / (2 * step)
                expected += max(0.0, float(own[i, channel, corner, corner]) * slope)
            assert expected > 0
            value = float(maps[number][i, corner, corner])
            assert value == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_layer_cam_of_an_enlarged_image_has_more_cells_brought_to_the_images_size(
    classifier: Classifier, images: torch.Tensor
) -> None:
    classes = torch.tensor([1, 1])
    larger = functional.interpolate(images, (64, 96), mode="bilinear", align_corners=False)
    cells = classifier.final_maps(larger)
    assert [values.shape[-2:] for values in cells] == [(8, 12), (8, 12)]
    score = classifier.classify(cells[-1])[:, 1].sum()
    slopes = torch.autograd.grad(score, cells)
    maps = layer_cams(classifier, images, classes, enlargement=2.0)
    for values, own, slope in zip(maps, cells, slopes, strict=True):
        kept = np.maximum(own.detach().numpy() * slope.numpy(), 0).sum(axis=1)
        for i in range(2):
            expected = cv2.resize(kept[i], (48, 32), interpolation=cv2.INTER_LINEAR)
            np.testing.assert_allclose(values[i], expected, rtol=1e-4, atol=1e-7)
    assert not images.requires_grad


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


def test_cam_before_two_linear_layers_weights_features_by_their_summed_gradient() -> None:
    class Net(Classifier):
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def classify(self, features: torch.Tensor) -> torch.Tensor:
            return self.head(features.flatten(1))

    net = Net(1, 8)
    first, second = nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False)
    net.head = nn.Sequential(first, nn.ReLU(), second)  # type: ignore[assignment]
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2, 3, 4], [-1, -1, -1, -1]]))
        second.weight.copy_(torch.tensor([[0.5, 9.0]]))
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    # The second unit is off, so the gradient is 0.5 (1, 2, 3, 4), over the positions 5.
    torch.testing.assert_close(class_activation_map(net, image, torch.tensor([0])), 5 * image[:, 0])


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
