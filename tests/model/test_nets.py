import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from model.classifier import Classifier, class_probabilities, ten_crops
from model.corruption import CorruptionNet, bound_logits
from model.step import trainable


def test_logits_are_the_head_applied_to_the_mean_feature_so_class_activation_maps_exist() -> None:
    net, images = Classifier(5, 8), torch.randn(2, 3, 32, 32)
    maps = functional.conv2d(net.features(images), net.head.weight[:, :, None, None])
    expected = maps.mean(dim=(2, 3)) + net.head.bias
    torch.testing.assert_close(net(images), expected)


def test_residual_blocks_begin_as_identities_and_then_learn() -> None:
    plain, deep = Classifier(5, 8), Classifier(5, 8, residual_blocks=2)
    assert len([m for m in deep.modules() if isinstance(m, torch.nn.Conv2d)]) == 4 + 3 * 2 * 2
    layers = [layer for layer in deep.layers if isinstance(layer, torch.nn.Sequential)]
    for own, other in zip(layers, plain.layers, strict=True):
        own.load_state_dict(other.state_dict())
    deep.head.load_state_dict(plain.head.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(deep(images), plain(images))
    loss = functional.cross_entropy(deep(images), torch.arange(4))
    norms = [p for name, p in deep.named_parameters() if name.endswith("body.2.weight")]
    assert len(norms) == 6
    assert all(not norm.any() for norm in norms)
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, norms))


def test_each_image_is_classified_alone_whatever_the_batch() -> None:
    net, images = Classifier(5, 8), torch.randn(6, 3, 32, 32)
    together = net(images)
    alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(together, alone)


def test_a_guide_says_what_it_sees_and_is_never_trained() -> None:
    torch.manual_seed(0)
    guide = Classifier(5, 8, residual_blocks=1)
    net = CorruptionNet((32, 32), 8, 16, guide=guide)
    frozen = {id(parameter) for parameter in guide.parameters()}
    learning = trainable(net)
    assert len(frozen) + len(learning) == len(list(net.parameters()))
    assert not frozen & {id(parameter) for parameter in learning}
    images = torch.randn(2, 3, 32, 32)
    before = net(images)
    assert all(gradient.any() for gradient in torch.autograd.grad(before.sum(), learning))
    with torch.no_grad():
        guide.layers[0][0].weight.mul_(-1)  # type: ignore[index]
    assert not torch.equal(net(images), before)


def test_first_masks_cover_about_a_quarter() -> None:
    torch.manual_seed(0)
    share = torch.sigmoid(CorruptionNet((64, 64), 24, 64)(torch.randn(4, 3, 64, 64))).mean()
    assert 0.1 < share < 0.45


def test_bottleneck_lets_every_pixel_see_the_whole_image() -> None:
    """The far corner reaches a pixel through the fully connected layers alone."""
    net = CorruptionNet((128, 128), 8, 32)
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    net(images)[0, 0, 0].backward()
    assert images.grad is not None
    assert images.grad[0, :, -1, -1].abs().sum() > 0


def test_skips_carry_local_detail_past_a_silent_bottleneck() -> None:
    net = CorruptionNet((64, 64), 8, 16)
    silent = ("encoder.3.", "bottleneck.", "decoder.0.deconvolution.")
    for name, parameter in net.named_parameters():
        if name.startswith(silent):
            torch.nn.init.zeros_(parameter)
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[0, :, 20:24, 20:24] += 3
    moved = (net(changed) - net(images)).abs()[0]
    assert moved[20:24, 20:24].mean() > 5 * moved[50:, 50:].mean()


def test_bounded_logits_are_the_logits_within_and_the_bound_beyond() -> None:
    logits = torch.tensor([-30.0, -5.0, -1.5, 0.0, 4.9, 5.0, 1e30])
    assert bound_logits(logits, 5.0).tolist() == pytest.approx([-5, -5, -1.5, 0, 4.9, 5, 5])
    assert bound_logits(logits, 0.0) is logits


def test_at_a_bound_descent_may_go_back_but_not_on() -> None:
    logits = torch.tensor([9.0, 9.0, -9.0, -9.0, 1.0, 1.0], requires_grad=True)
    gradient = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # descent goes against it
    bound_logits(logits, 5.0).backward(gradient)
    assert logits.grad is not None
    assert logits.grad.tolist() == [1, 0, 0, -1, 1, -1]


def test_ten_crops_are_corners_and_centre_enlarged_each_beside_its_mirror_image() -> None:
    images = torch.randn(2, 3, 16, 32)
    crops = list(ten_crops(images))
    pixels = images.permute(0, 2, 3, 1).numpy()
    corners = [(0, 0), (0, 4), (2, 0), (2, 4), (1, 2)]
    assert len(crops) == 10
    for (top, left), crop, mirrored in zip(corners, crops[::2], crops[1::2], strict=True):
        for image, enlarged in zip(pixels, crop, strict=True):
            cut = np.ascontiguousarray(image[top : top + 14, left : left + 28])
            expected = cv2.resize(cut, (32, 16), interpolation=cv2.INTER_LINEAR)
            np.testing.assert_allclose(enlarged.permute(1, 2, 0).numpy(), expected, atol=1e-5)
        assert torch.equal(mirrored.flip(3), crop)


def test_class_probabilities_are_the_mean_over_the_crops() -> None:
    torch.manual_seed(0)
    net, images = Classifier(5, 8), torch.randn(3, 3, 32, 32)
    alone = torch.softmax(net(images), dim=1)
    torch.testing.assert_close(class_probabilities(net, images, crops=False), alone)
    views = [torch.softmax(net(view), dim=1) for view in ten_crops(images)]
    torch.testing.assert_close(class_probabilities(net, images, crops=True), sum(views) / 10)
