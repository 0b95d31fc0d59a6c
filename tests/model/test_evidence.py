import numpy as np
import pytest
import torch
from torch import Tensor

from model.classifier import Classifier
from model.corruption import CorruptionNet
from model.evidence import ENLARGEMENT, evidence
from model.losses import imitation_loss
from model.masking import mask_probability, paint
from model.saliency import layer_cams
from model.settings import Objective

SUPERPIXELS = 20  # of which the last four are absent


@pytest.fixture
def setting() -> tuple[Classifier, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    classifier = Classifier(3, 8).requires_grad_(False)
    rows = torch.tensor([0, 1, 2, 3]).repeat_interleave(torch.tensor([2, 14, 6, 10]))
    segments = (4 * rows[:, None] + rows[None, :]).expand(5, -1, -1)  # of unequal sizes
    return classifier, torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1]), segments


@pytest.mark.parametrize("blocks", [0, 1])
def test_evidence_adds_the_layers_maps_on_one_scale(
    setting: tuple[Classifier, Tensor, Tensor, Tensor], blocks: int
) -> None:
    """By NumPy, superpixel by superpixel."""
    _, images, labels, segments = setting
    classifier = Classifier(3, 8, residual_blocks=blocks).requires_grad_(False)
    result = evidence(classifier, images, labels, segments, SUPERPIXELS)
    maps = layer_cams(classifier, images, labels, enlargement=ENLARGEMENT)
    assert len(maps) == 2 + 2 * blocks
    for i, of in enumerate(segments.numpy()):
        total = np.zeros((32, 32))
        for values in (m[i].numpy() ** 0.5 for m in maps):
            level = np.zeros((32, 32))
            for number in np.unique(of):
                level[of == number] = values[of == number].mean()
            total += (level - level.mean()) / level.std()
        np.testing.assert_allclose(result[i], (total - total.mean()) / total.std(), atol=5e-3)


def test_evidence_is_of_the_label_and_leaves_no_gradient(
    setting: tuple[Classifier, Tensor, Tensor, Tensor],
) -> None:
    classifier, images, labels, segments = setting
    classifier.requires_grad_(True)
    values = evidence(classifier, images, labels, segments, SUPERPIXELS)
    other = evidence(classifier, images, (labels + 1) % 3, segments, SUPERPIXELS)
    assert not torch.allclose(values, other, atol=0.1)
    assert not values.requires_grad


def test_evidence_in_bfloat16_is_that_of_float32_but_for_rounding(
    setting: tuple[Classifier, Tensor, Tensor, Tensor],
) -> None:
    classifier, images, labels, segments = setting
    exact = evidence(classifier, images, labels, segments, SUPERPIXELS)
    with torch.autocast("cpu", torch.bfloat16):
        values = evidence(classifier, images, labels, segments, SUPERPIXELS)
    assert values.dtype == torch.float32
    assert torch.corrcoef(torch.stack([values.flatten(), exact.flatten()]))[0, 1] > 0.99
    assert not torch.equal(values, exact)


def test_maps_that_are_level_say_nothing(
    setting: tuple[Classifier, Tensor, Tensor, Tensor],
) -> None:
    classifier, images, labels, segments = setting
    whole = torch.zeros_like(segments)
    assert evidence(classifier, images, labels, whole, 1).abs().max() < 0.01
    torch.nn.init.zeros_(classifier.head.weight)
    assert not evidence(classifier, images, labels, segments, SUPERPIXELS).any()


def test_a_net_that_imitates_comes_to_mask_what_speaks_for_the_label(
    setting: tuple[Classifier, Tensor, Tensor, Tensor],
) -> None:
    """Without being told the label: its masks' logits and the evidence come to agree."""
    classifier, images, labels, segments = setting
    net = CorruptionNet((32, 32), 8, 16)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    values = evidence(classifier, images, labels, segments, SUPERPIXELS)

    def masks() -> Tensor:
        return paint(mask_probability(net, images, segments, SUPERPIXELS), segments)

    def agreement() -> float:
        pair = torch.stack([torch.logit(masks().detach()).flatten(), values.flatten()])
        return torch.corrcoef(pair)[0, 1].item()

    before = agreement()
    for _ in range(100):
        optimizer.zero_grad()
        imitation_loss(masks(), values, Objective()).mean().backward()
        optimizer.step()
    assert before < 0.5
    assert agreement() > 0.95
