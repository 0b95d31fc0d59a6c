"""A network in stages against the network itself, read by hooks."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.pretrained import Part, PretrainedClassifier
from model.saliency import class_activation_map, layer_cams

SIZE = 64
MAPS = ("5", "7", "9", "12", "15")  # the last of stride 8, two of 16, and two of 32
ENCODED = ("5", "9", "12")


class Block(nn.Module):
    """A residual block whose last batch norm follows no convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, 2 * outputs, 1, bias=False),
            nn.BatchNorm2d(2 * outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * outputs, outputs, 3, stride, 1),
        )
        self.skip = stride == 1 and inputs == outputs
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.norm(x + y if self.skip else y)


def network(outputs: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [(8, 8, 2), (8, 8, 2), (8, 8, 1)]  # strides 4, 8 and 8
    blocks += [(8, 12, 2), (12, 12, 1), (12, 16, 1), (16, 16, 1)]  # 16
    blocks += [(16, 24, 2), (24, 24, 1), (24, 24, 1)]  # 32
    stem = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.Conv2d(24, 32, 1), nn.BatchNorm2d(32), nn.ReLU()]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, outputs)]
    net = nn.Sequential(*stem, *(Block(*sizes) for sizes in blocks), *head, *pooled)
    with torch.no_grad():  # statistics and weights unlike those at the start
        for _ in range(8):
            net.train()(torch.randn((8, 3, SIZE, SIZE)) + 0.3)
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return net.eval()


@pytest.fixture(scope="module")
def own() -> nn.Sequential:
    return network()


@pytest.fixture
def staged(own: nn.Sequential) -> PretrainedClassifier:
    return PretrainedClassifier(deepcopy(own), SIZE)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn((3, 3, 64, 96), generator=torch.Generator().manual_seed(1))


def hooked(net: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits and the output of each of MAPS."""
    outputs: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda *call, name=name: outputs.update({name: call[2]})
        )
        for name in MAPS
    ]
    logits = net(images)
    for handle in handles:
        handle.remove()
    return logits, outputs


def test_stages_give_the_networks_own_maps_and_logits(
    own: nn.Sequential, staged: PretrainedClassifier, images: Tensor
) -> None:
    with torch.no_grad():
        logits, outputs = hooked(own, images)
        torch.testing.assert_close(staged(images), logits, rtol=1e-4, atol=1e-4)
        maps = staged.maps(images)
    assert [tuple(m.shape[1:]) for m in maps] == [
        *[(8, 8, 12), (12, 4, 6), (16, 4, 6)],
        *[(24, 2, 3), (32, 2, 3)],
    ]
    for values, name in zip(maps, MAPS, strict=True):
        torch.testing.assert_close(values, outputs[name], rtol=1e-4, atol=1e-4)
    for values, name in zip(staged.encode(images), ENCODED, strict=True):
        torch.testing.assert_close(values, outputs[name], rtol=1e-4, atol=1e-4)
    assert staged.channels == (8, 16, 24)
    again = [*staged.encode(images), *staged.final_maps(images), staged.features(images)]
    same = [*staged.encoded(maps), *staged.final(maps), maps[-1]]
    assert all(torch.equal(a, b) for a, b in zip(again, same, strict=True))


def test_layer_cam_and_cam_are_those_of_the_network_itself(
    own: nn.Sequential, staged: PretrainedClassifier, images: Tensor
) -> None:
    classes = torch.tensor([4, 0, 2])
    logits, outputs = hooked(own, images)
    score = logits.gather(1, classes.unsqueeze(1)).sum()
    slopes = torch.autograd.grad(score, [outputs[name] for name in MAPS[1:]])
    cams = layer_cams(staged, images, classes)
    for cam, name, slope in zip(cams, MAPS[1:], slopes, strict=True):
        cells = (outputs[name] * slope).clamp(min=0).sum(dim=1, keepdim=True)
        expected = functional.interpolate(cells, images.shape[-2:], mode="bilinear")
        torch.testing.assert_close(cam, expected.squeeze(1).detach(), rtol=1e-3, atol=1e-4)
        assert expected.max() > 0
    weights = own[-1].weight[classes]  # type: ignore[index]
    cells = torch.einsum("bc,bchw->bhw", weights, outputs["15"]).unsqueeze(1)
    expected = functional.interpolate(cells, images.shape[-2:], mode="bilinear").squeeze(1)
    cam = class_activation_map(staged, images, classes)
    torch.testing.assert_close(cam, expected.detach(), rtol=1e-3, atol=1e-4)


def test_gradients_reach_the_first_final_map_and_no_layer_below(
    staged: PretrainedClassifier, images: Tensor
) -> None:
    staged.train_only("all")
    first, *others = staged.final_maps(images.clone().requires_grad_())
    assert first.is_leaf
    assert first.requires_grad
    total = staged.classify(others[-1]).sum()
    weights = dict(staged.named_parameters())
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    reached = {n for n, g in zip(weights, gradients, strict=True) if g is not None}
    below = {n for n in weights if n.startswith(("stages.0.", "stages.1."))}
    assert below
    assert reached == set(weights) - below
    assert not any(values.requires_grad for values in staged.encode(images))


def test_training_changes_no_statistics_of_batch_norms(
    staged: PretrainedClassifier, images: Tensor
) -> None:
    staged.train_only("all").train()
    before = {name: values.clone() for name, values in staged.named_buffers()}
    assert len(before) == 3 * 5  # those of blocks with an identity; all others are merged
    alone, together = staged(images[:1]), staged(images)[:1]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    together.sum().backward()
    assert all(torch.equal(values, before[n]) for n, values in staged.named_buffers())


@pytest.mark.parametrize(
    ("part", "trains"),
    [
        ("none", ()),
        ("head", ("tail.",)),
        ("last", ("stages.3.", "stages.4.", "tail.")),
        ("all", ("stages.", "tail.")),
    ],
)
def test_a_copy_trains_its_part_and_shares_the_rest(
    staged: PretrainedClassifier, images: Tensor, part: Part, trains: tuple[str, ...]
) -> None:
    copy = staged.copy(part)
    tensors = copy.trained_tensors()
    assert set(tensors) == {n for n in staged.state_dict() if n.startswith(trains or "-")} - {
        name for name, _ in staged.named_buffers()
    }
    for (name, weight), original in zip(copy.named_parameters(), staged.parameters(), strict=True):
        assert (weight is original) == (name not in tensors)
        assert not original.requires_grad
    with torch.no_grad():
        for weight in copy.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
        changed = copy(images)
    assert torch.equal(changed, staged(images)) == (part == "none")
    other = staged.copy(part)
    other.load_state_dict(copy.trained_tensors(), strict=False)
    assert torch.equal(other(images), changed)


def test_outputs_are_chosen_ordered_and_new(staged: PretrainedClassifier, images: Tensor) -> None:
    before = staged(images)
    staged.train_only("head").set_outputs([3, None, 0])
    after = staged(images)
    torch.testing.assert_close(after[:, [0, 2]], before[:, [3, 0]])
    assert (after[:, 1] == 0).all()
    assert [tuple(values.shape) for values in staged.trained_tensors().values()] == [(3, 32), (3,)]


class Branches(nn.Sequential):
    """It does what its values tell it, which no fixed graph does."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x if x.sum() > 0 else -x)


class Random(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return functional.dropout(super().forward(x), training=True)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda net: Branches(*net), "cannot trace"),
        (lambda net: Random(*net), "other logits"),
        (lambda net: net[:6] + net[-3:], "1/16"),
        (lambda net: net[:-1], "not linear"),
    ],
)
def test_a_network_without_stages_is_refused(
    own: nn.Sequential, change: Callable[[nn.Sequential], nn.Module], fact: str
) -> None:
    net = deepcopy(own)
    if fact == "1/16":
        net[-1] = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=fact) as error:
        PretrainedClassifier(change(net), SIZE)
    assert "\n" not in str(error.value)
