import math

import numpy as np
import pytest
import torch

from model.losses import (
    area_penalty,
    classification_loss,
    confusion_loss,
    correct,
    corruption_loss,
    imitation_loss,
)
from model.settings import Objective

OBJECTIVE = Objective(evidence_sharpness=2.0, evidence_share=0.25)


def test_corruption_loss_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, -1.0], [0.0, 2.0, 2.0]])
    # 3 - (1 - 1) / 2, and 2 - (0 + 2) / 2: one of two equal tops counts among the others
    assert corruption_loss(logits).tolist() == [3.0, 1.0]


def test_corruption_loss_equals_equation_1_written_out() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 9))
    expected = np.zeros(20)
    for n in range(20):
        top = logits[n].argmax()
        for j in range(9):
            indicator = float(j == top)
            expected[n] += indicator * logits[n, j] - (1 - indicator) * logits[n, j] / 8
    np.testing.assert_allclose(corruption_loss(torch.tensor(logits)).numpy(), expected, rtol=1e-12)


def test_area_penalty_by_hand() -> None:
    mask = torch.zeros(2, 2, 4)
    mask[0, 0] = 1
    mask[1] = 1
    assert area_penalty(mask, 1).tolist() == [0.5, 1.0]
    assert area_penalty(mask, 2).tolist() == [0.25, 1.0]


def test_squared_area_costs_nothing_at_the_margin_of_an_empty_mask() -> None:
    mask = torch.zeros(1, 4, 4, requires_grad=True)
    area_penalty(mask, 2).sum().backward()
    assert mask.grad is not None
    assert mask.grad.abs().max() == 0


def test_classification_loss_equals_minus_log_softmax() -> None:
    logits = np.random.default_rng(1).normal(size=(6, 5))
    labels = np.array([0, 1, 2, 3, 4, 0])
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(shares[np.arange(6), labels])
    result = classification_loss(torch.tensor(logits), torch.tensor(labels)).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_correct_counts_top_classes_that_are_the_label() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert correct(logits, torch.tensor([1, 1, 1])).tolist() == [1.0, 0.0, 1.0]


def test_confusion_by_the_true_class_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, -1.0], [0.0, 2.0, 4.0]], dtype=torch.float64)
    labels = torch.tensor([1, 2])
    assert confusion_loss(logits, labels, "top").tolist() == [3.0, 3.0]
    # 1 - (3 - 1) / 2, and 4 - (0 + 2) / 2
    assert confusion_loss(logits, labels, "true-logit").tolist() == [0.0, 3.0]
    shares = np.exp([[3, 1, -1], [0, 2, 4]])
    shares /= shares.sum(axis=1, keepdims=True)
    expected = np.log(shares[[0, 1], [1, 2]] / (1 / 3))
    losses = confusion_loss(logits, labels, "true-log-probability").numpy()
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["top", "true-logit", "true-log-probability"])
def test_every_confusion_loss_is_zero_where_all_classes_score_alike(kind: str) -> None:
    logits = torch.full((2, 5), 3.5, dtype=torch.float64)
    losses = confusion_loss(logits, torch.tensor([0, 4]), kind)  # type: ignore[arg-type]
    assert losses.abs().max() < 1e-12


def test_imitation_loss_by_hand() -> None:
    """Average evidence asks for a mask of 1/4, evidence of ln(3)/2 for one of 1/2."""
    evidence = torch.tensor([[[0.0, math.log(3) / 2]]])
    mask = torch.tensor([[[0.25, 0.2]]])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    half = -(math.log(0.2) + math.log(0.8)) / 2
    assert imitation_loss(mask, evidence, OBJECTIVE).item() == pytest.approx((entropy + half) / 2)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_imitation_loss_and_its_gradient_stay_finite_at_certain_masks(value: float) -> None:
    mask = torch.full((1, 2, 2), value, requires_grad=True)
    loss = imitation_loss(mask, torch.randn(1, 2, 2), OBJECTIVE)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert mask.grad is not None
    assert mask.grad.isfinite().all()
    unknown = torch.full((1, 2, 2), math.nan)
    assert imitation_loss(unknown, torch.randn(1, 2, 2), OBJECTIVE).isnan().all()


@pytest.mark.parametrize("value", [-2.0, 0.0, 1.0, 3.0])
def test_imitation_loss_is_least_where_the_mask_is_what_the_evidence_asks_for(value: float) -> None:
    masks = torch.linspace(0.001, 0.999, 999)
    losses = imitation_loss(masks.view(-1, 1, 1), torch.full((999, 1, 1), value), OBJECTIVE)
    wanted = 1 / (1 + math.exp(-2 * value) * 3)
    assert masks[losses.argmin()].item() == pytest.approx(wanted, abs=0.001)
