"""Layer-wise relevance against hand-computed values, and that it is conserved."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from model.classifier import Classifier
from model.relevance import layerwise_relevance


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
