"""Constant boxes, class activation maps, gradient saliency and relevance against hand-computed
and independent values."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from model.classifier import Classifier
from model.relevance import layerwise_relevance
from model.saliency import (
    blur,
    class_activation_map,
    gradient_saliency,
    gradient_weighted_cam,
    layer_cams,
)
from pipeline.evaluation.constant_boxes import (
    GRID,
    centred_boxes,
    fit_centred_box,
    whole_image_boxes,
)
from pipeline.evaluation.protocols import best_iou


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

    flat = np.concatenate([np.array(boxes).reshape(-1, 4) for boxes in truths])
    starts = np.cumsum([0, *map(len, truths)])

    def hits(height_share: float, width_share: float) -> int:
        boxes = centred_boxes(sizes, (height_share, width_share))
        return int((best_iou(boxes, flat, starts) >= 0.5).sum())

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
            found = float(maps[number][i, corner, corner])
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_layer_cam_of_an_enlarged_image_has_more_cells_brought_to_the_images_size(
    classifier: Classifier, images: torch.Tensor
) -> None:
    classes = torch.tensor([1, 1])
    larger = functional.interpolate(images, (64, 96), mode="bilinear", align_corners=False)
    cells = classifier.final_maps(larger)
    assert [values.shape[-2:] for values in cells] == [(8, 12), (8, 12)]
    score = classifier.classify(cells[-1])[:, 1].sum()
    slopes = torch.autograd.grad(score, cells)
    found = layer_cams(classifier, images, classes, enlargement=2.0)
    for values, own, slope in zip(found, cells, slopes, strict=True):
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


def test_gradient_weighted_cam_is_cam_before_pooling_and_one_linear_layer(
    classifier: Classifier, images: torch.Tensor
) -> None:
    classes = torch.tensor([2, 1])
    expected = class_activation_map(classifier, images, classes)
    actual = gradient_weighted_cam(classifier, classifier.layers, images, classes)
    assert float(expected.min()) < 0 < float(expected.max())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert not classifier.layers._forward_hooks
    assert all(weight.grad is None for weight in classifier.parameters())


def test_gradient_weighted_cam_by_hand_before_two_linear_layers() -> None:
    first, second = nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False)
    net = nn.Sequential(nn.Identity(), nn.Flatten(), first, nn.ReLU(), second)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2, 3, 4], [-1, -1, -1, -1]]))
        second.weight.copy_(torch.tensor([[0.5, 9.0]]))
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    # The second unit is off, so the gradient is 0.5 (1, 2, 3, 4), over the positions 5.
    maps = gradient_weighted_cam(net, net[0], image, torch.tensor([0]))
    torch.testing.assert_close(maps, 5 * image[:, 0])


def test_relevance_by_hand() -> None:
    """Two convolutions of one row and a linear layer: z+ above, an even share at the bottom."""
    bottom = nn.Conv2d(1, 2, (1, 2), bias=False)
    top = nn.Conv2d(2, 1, (1, 2), bias=False)
    head = nn.Linear(2, 2)
    net = nn.Sequential(bottom, nn.ReLU(), top, nn.ReLU(), nn.Flatten(), head)
    with torch.no_grad():
        bottom.weight.copy_(torch.tensor([[[[1.0, 1.0]]], [[[1.0, -1.0]]]]))
        top.weight.copy_(torch.tensor([[[[2.0, 1.0]], [[-1.0, 3.0]]]]))
        head.weight.copy_(torch.tensor([[0.0, 0.0], [2.0, -1.0]]))
        head.bias.copy_(torch.tensor([0.0, 7.0]))
    image = torch.tensor([[[[2.0, 1.0, 3.0, 1.0]]]])
    # bottom: a = (3, 4, 4), b = relu(1, -2, 2) = (1, 0, 2)
    # top: c0 = 6 + 4 - 1 + 0 = 9 of the positive terms 10; c1 = 8 + 4 + 0 + 6 = 18 of 18
    # class 1: R(c0) = 2 * 9 = 18, R(c1) = -18; the bias 7 keeps its own
    # R(a0) = 6/10 18, R(a1) = 4/10 18 - 8/18 18, R(a2) = -4/18 18, R(b2) = -6/18 18
    cells = torch.tensor([10.8, 7.2 - 8.0, -4.0 - 6.0])
    expected = [cells[0] / 2, (cells[0] + cells[1]) / 2, (cells[1] + cells[2]) / 2, cells[2] / 2]
    relevance = layerwise_relevance(net, image, torch.tensor([1]))
    assert relevance.shape == (1, 1, 4)
    torch.testing.assert_close(relevance[0, 0], torch.stack(expected))
    assert float(relevance.sum()) == pytest.approx(net(image)[0, 1].item() - 7, abs=1e-5)


class EveryLayer(nn.Module):
    """A small net of what convnets are made of. No linear layer has a bias, and convolutions see
    so many terms that some are positive. signs: the smallest scale of the group norm."""

    def __init__(self, signs: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.group_norm = nn.GroupNorm(2, 8)
        self.project = nn.Conv2d(8, 8, 3, padding=1)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.activation = nn.SiLU(inplace=True)
        self.hidden = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 5, bias=False)
        for statistic in (s for s in self.norm.buffers() if s.is_floating_point()):
            statistic.uniform_(0.1, 1)
        with torch.no_grad():
            self.norm.bias.fill_(1)
            self.group_norm.weight.copy_(torch.linspace(signs, 1, 8))
            self.group_norm.bias.normal_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.stem(images)), inplace=True), 2)
        branch = self.activation(self.group_norm(self.grouped(x)))
        x = functional.hardswish(self.project(branch)) + x
        gate = torch.sigmoid(self.squeeze(functional.adaptive_avg_pool2d(x, 1)))
        x = torch.cat([x * gate, functional.avg_pool2d(x, 3, 1, 1)], dim=1)[:, 4:12]
        return self.head(functional.gelu(self.hidden(x.mean(dim=(2, 3)))))


@pytest.mark.parametrize("signs", [1.0, -1.0])
def test_relevance_is_conserved_through_every_kind_of_layer(signs: float) -> None:
    torch.manual_seed(3)
    net = EveryLayer(signs).eval().double()
    images = torch.randn((4, 3, 24, 32), dtype=torch.float64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        logits = net(images)
    for number in range(5):
        classes = torch.full((4,), number)
        relevance = layerwise_relevance(net, images, classes)
        torch.testing.assert_close(relevance.sum(dim=(1, 2)), logits[:, number])
    # Nothing of the rules is left behind.
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in net.parameters())
    with torch.no_grad():
        assert torch.equal(net(images), logits)


def test_relevance_of_a_negated_channel_follows_its_negative_weights() -> None:
    """conv -> norm of scale -1: what the convolution's negative weights see made the channel."""
    conv, norm = nn.Conv2d(1, 1, (1, 2), bias=False), nn.BatchNorm2d(1, eps=0)
    identity = nn.Conv2d(1, 1, 1, bias=False)
    net = nn.Sequential(identity, conv, norm, nn.ReLU(), nn.Flatten()).eval()
    with torch.no_grad():
        identity.weight.fill_(1)
        conv.weight.copy_(torch.tensor([[[[1.0, -2.0]]]]))
        norm.weight.fill_(-1)
    image = torch.tensor([[[[1.0, 3.0]]]])  # conv 1 - 6 = -5, norm 5
    relevance = layerwise_relevance(net, image, torch.tensor([0]))
    torch.testing.assert_close(relevance, torch.tensor([[[0.0, 5.0]]]))


def test_relevance_of_the_classifier_is_conserved_and_of_each_image_alone(
    classifier: Classifier, images: torch.Tensor
) -> None:
    classes = torch.tensor([1, 2])
    together = layerwise_relevance(classifier, images, classes)
    assert together.shape == (2, 32, 48)
    assert together.dtype == torch.float32
    with torch.no_grad():
        logits = classifier(images).gather(1, classes.unsqueeze(1)).squeeze(1)
    bias = classifier.head.bias.detach()[classes]
    torch.testing.assert_close(together.sum(dim=(1, 2)), logits - bias, rtol=1e-3, atol=1e-4)
    for i in range(2):
        alone = layerwise_relevance(classifier, images[i : i + 1], classes[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-6)


def test_relevance_lies_where_the_only_features_are() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))
    net = nn.Sequential(net, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image = torch.zeros((1, 3, 20, 20))
    image[:, :, 6:10, 12:15] = 1
    relevance = layerwise_relevance(net, image, net(image).argmax(dim=1))[0]
    inside = relevance[2:14, 8:19].sum()  # what a 5 x 5 window at a feature can see
    assert float(inside) == pytest.approx(float(relevance.sum()), rel=1e-5)
    assert float(inside) > 0


def test_relevance_needs_a_convolution() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ValueError, match="no convolution"):
        layerwise_relevance(net, torch.zeros((1, 3, 2, 2)), torch.tensor([0]))


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
