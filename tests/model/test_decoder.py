"""The corruption net over a pretrained network, of which a small one stands for any."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.decoder import Decoder, FeatureCorruptionNet, object_map, resize
from model.localization import map_box
from model.masking import paint, superpixel_mean
from model.pretrained import PretrainedClassifier
from model.settings import Objective
from model.step import Inputs, TrainingNets, adversarial_step, imitation_step, trainable

SIDE, SUPERPIXELS, CLASSES = 96, 16, 3


def network() -> PretrainedClassifier:
    torch.manual_seed(0)
    widths = (3, 8, 8, 16, 16, 16, 24, 24)
    strides = (2, 2, 2, 2, 1, 2, 1)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip(widths, widths[1:], strides, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU()]
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES))
    return PretrainedClassifier(body, SIDE)


@pytest.fixture
def nets() -> TrainingNets:
    clean = network()
    return TrainingNets(FeatureCorruptionNet(clean, (64, SIDE), 16, 8.0), clean.copy("last"), clean)


@pytest.fixture
def batch() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((4, 3, 64, 64), generator=generator)
    segments = (torch.arange(64)[:, None] // 16 * 4 + torch.arange(64)[None] // 16).expand(
        4, 64, 64
    )
    labels = torch.tensor([0, 1, 2, 0])
    return Inputs(images, segments, labels, torch.zeros(4, SUPERPIXELS), 8)


def test_a_decoder_takes_maps_of_any_size_and_any_scale() -> None:
    decoder = Decoder((8, 16, 24), 16, 8.0)
    for height, width in ((64, 64), (96, 160)):
        maps = [
            torch.rand(2, c, height // s, width // s)
            for c, s in zip((8, 16, 24), (8, 16, 32), strict=True)
        ]
        logits = decoder(maps)
        assert logits.shape == (2, height // 8, width // 8)
        torch.testing.assert_close(decoder([100 * x for x in maps]), logits, rtol=1e-3, atol=1e-4)


def test_the_encoder_is_neither_saved_nor_trained_nor_copied_with_the_net(
    nets: TrainingNets,
) -> None:
    corruption = nets.corruption
    assert all(name.startswith("decoder.") for name in corruption.state_dict())
    copied = copy.deepcopy(corruption)
    assert isinstance(copied, FeatureCorruptionNet)
    assert copied.encoder is nets.clean_classifier
    mine = {p.data_ptr() for p in corruption.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in copied.parameters())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(copied(images), corruption(images), rtol=0, atol=0)


def test_accurate_logits_are_a_mean_of_views_seen_again_around_the_box(nets: TrainingNets) -> None:
    corruption, images = nets.corruption, torch.randn(2, 3, 64, 64)
    assert isinstance(corruption, FeatureCorruptionNet)

    def logits_of(views: Tensor, side: int) -> Tensor:
        maps = corruption.encoder.encode(resize(views, (side, side)))
        small = corruption.decoder(maps).unsqueeze(1)
        return functional.interpolate(small, (64, 64), mode="bilinear")[:, 0]

    def both(views: Tensor, side: int) -> Tensor:
        return (logits_of(views, side) + logits_of(views.flip(3), side).flip(2)).detach() / 2

    torch.testing.assert_close(corruption(images), logits_of(images, SIDE))
    corruption.looks = "mean"
    expected = ((both(images, 64) + both(images, SIDE)) / 2).detach()
    for i, image in enumerate(images):
        box = map_box(expected[i].numpy(), "mean")
        assert box is not None
        margins = 0.1 * np.array([*(box[:2] - box[2:] - 1), *(box[2:] + 1 - box[:2])])
        # inclusive corners, enlarged to 1.2 times the sides and outward to whole pixels
        x0, y0 = np.maximum(np.floor(box[:2] + margins[:2]), 0).astype(int)
        x1, y1 = np.minimum(np.ceil(box[2:] + 1 + margins[2:]), 64).astype(int)
        part = functional.interpolate(image[None, :, y0:y1, x0:x1], (64, 64), mode="bilinear")
        expected[i, y0:y1, x0:x1] /= 2
        expected[i, y0:y1, x0:x1] += resize(both(part, SIDE)[None], (y1 - y0, x1 - x0))[0, 0] / 2
    torch.testing.assert_close(corruption(images), expected)


def test_the_object_map_is_the_logit_of_each_pixel_in_0_to_1(
    nets: TrainingNets, batch: Inputs
) -> None:
    values = object_map(nets.corruption, batch.images, batch.segments, SUPERPIXELS)
    torch.testing.assert_close(values, 0.5 + nets.corruption(batch.images) / 16)
    assert 0 <= values.min() <= values.max() <= 1


def test_smaller_images_are_means_of_the_pixels_under_them() -> None:
    images = torch.zeros(1, 1, 8, 8)
    images[..., ::2] = 1
    inner = resize(images, (4, 4))[..., 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5))
    assert resize(images, (8, 8)) is images


@pytest.mark.parametrize("imitation_weight", [0.0, 3.0])
def test_a_step_over_a_network_trains_the_decoder_and_the_last_stages(
    nets: TrainingNets, batch: Inputs, imitation_weight: float
) -> None:
    objective = Objective(
        confusion="true-logit", imitation_weight=imitation_weight, soft=True, adversary_side=64
    )
    before = {n: p.clone() for n, p in nets.clean_classifier.state_dict().items()}
    step = adversarial_step(nets, batch, objective, torch.tensor(2.0), joint=True)
    assert step.corruption_gradients is not None
    assert step.classifier_gradients is not None
    assert len(step.corruption_gradients) == len(list(nets.corruption.parameters()))
    assert len(step.classifier_gradients) == len(trainable(nets.classifier)) > 0
    assert all(g.isfinite().all() for g in step.corruption_gradients + step.classifier_gradients)
    assert max(float(g.abs().max()) for g in step.corruption_gradients) > 0
    after = nets.clean_classifier.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before)
    # the mask is the mean probability of each superpixel
    probability = torch.sigmoid(nets.corruption(batch.images))
    expected = paint(superpixel_mean(probability, batch.segments, SUPERPIXELS), batch.segments)
    assert step.mask is not None
    torch.testing.assert_close(step.mask, expected.detach())


def test_the_warm_up_imitates_and_trains_a_new_head(nets: TrainingNets, batch: Inputs) -> None:
    imitating = Objective(imitation_weight=10, adversary_side=64)
    known = TrainingNets(nets.corruption, network(), nets.clean_classifier)
    assert imitation_step(known, batch, imitating).classifier_gradients is None
    assert imitation_step(nets, batch, Objective()).corruption_gradients is None
    nets.classifier.train_only("head")  # type: ignore[operator]
    step = imitation_step(nets, batch, imitating)
    assert step.classifier_gradients is not None
    head = nets.classifier.head
    logits = nets.classifier(batch.images)
    loss = functional.cross_entropy(logits, batch.labels, reduction="sum") / batch.total
    expected = torch.autograd.grad(loss, [head.weight])[0]
    torch.testing.assert_close(step.classifier_gradients[0], expected)
    optimizer = torch.optim.Adam(nets.corruption.parameters(), 0.01)
    losses = []
    for _ in range(60):
        step = imitation_step(nets, batch, imitating)
        losses.append(float(step.sums["imitation_loss"]))
        assert step.corruption_gradients is not None
        for parameter, gradient in zip(
            nets.corruption.parameters(), step.corruption_gradients, strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
