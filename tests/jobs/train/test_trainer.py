"""The steps of a training, in this process."""

import copy
import math
import operator
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.train.state import TrainingError, adversarial_factor, warmup_factor
from jobs.train.trainer import LAG, Trainer
from tests.jobs.train.small import (
    batches_for,
    config_for,
    equal,
    metrics,
    new_trainer,
    train_epochs,
    train_logged,
    weights,
)


def test_the_same_seed_trains_the_same_nets_and_another_seed_others(small_set: Path) -> None:
    trainers = [new_trainer(config_for(small_set, seed=seed)) for seed in (3, 3, 4)]
    for trainer in trainers:
        train_epochs(trainer, 3)
    assert torch.equal(weights(trainers[0]), weights(trainers[1]))
    assert not torch.equal(weights(trainers[0]), weights(trainers[2]))


def test_warm_up_trains_the_classifier_alone_and_keeps_it_as_the_clean_one(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set))
    state = trainer.state
    before = copy.deepcopy(state.corruption)
    train_epochs(trainer, 2)
    assert equal(state.corruption, before)
    clean = copy.deepcopy(state.clean_classifier)
    assert equal(clean, state.classifier)
    train_epochs(trainer, 2)
    assert equal(clean, state.clean_classifier)
    assert not equal(state.corruption, before)


def test_below_the_target_both_nets_train_once_the_first_numbers_are_read(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set, target=1 - 1e-9))
    train_epochs(trainer, 3)
    assert trainer.state.epoch.joint_steps == trainer.epoch_steps - LAG
    train_epochs(trainer, 1)
    assert trainer.state.epoch.joint_steps == trainer.epoch_steps


def answer_class_0(trainer: Trainer) -> None:
    torch.nn.init.zeros_(trainer.state.classifier.head.weight)
    trainer.state.classifier.state_dict()["head.bias"].copy_(torch.eye(8)[0])


def test_above_the_target_the_classifier_stands_still(small_set: Path) -> None:
    """One batch is the whole set, and a classifier that always answers class 0 is right for an
    eighth of it."""
    trainer = new_trainer(config_for(small_set, target=0.1, batch_size=64, epochs=6))
    train_epochs(trainer, 2)
    answer_class_0(trainer)
    before = copy.deepcopy(trainer.state.classifier)
    for _ in range(6):
        train_epochs(trainer, 1)
        assert trainer.state.epoch.means()["accuracy"] == 0.125
        assert trainer.state.epoch.joint_steps == 0
    assert equal(trainer.state.classifier, before)


def test_target_is_the_stated_share_of_the_way_to_the_clean_accuracy(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set, target=None, target_share=0.25))
    train_epochs(trainer, 2)
    clean = trainer.state.clean_accuracy
    assert 0 <= clean <= 1
    assert trainer.state.target == pytest.approx(0.125 + 0.25 * (clean - 0.125))


@pytest.mark.parametrize(
    ("changes", "bad", "fault"),
    [
        ({}, "classifier.head.bias", r"classifier_loss became NaN .* step 1;.*learning"),
        ({"imitation_weight": 5.0}, "corruption.output.weight", "imitation_loss.* became NaN or"),
    ],
)
def test_not_a_number_stops_training_and_names_the_remedy(
    small_set: Path, changes: dict, bad: str, fault: str
) -> None:
    trainer = new_trainer(config_for(small_set, **changes))
    torch.nn.init.constant_(operator.attrgetter(bad)(trainer.state), math.nan)
    with pytest.raises(TrainingError, match=fault):
        train_epochs(trainer, 3)


def test_a_checkpoint_never_holds_a_weight_that_is_not_a_number(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set))
    train_epochs(trainer, 1)
    trainer.check_weights()
    with torch.no_grad():
        next(trainer.state.corruption_average.parameters())[3, 0, 1, 2] = math.inf
    with pytest.raises(TrainingError, match=r"weights of corruption_average .* step 4;"):
        trainer.check_weights()


def test_warm_up_rate_rises_then_falls_to_nothing() -> None:
    factors = [warmup_factor(step, 100) for step in range(100)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert factors[-1] < 0.001


def test_adversarial_rate_ramps_stays_and_decays() -> None:
    factors = [adversarial_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 50)
    assert set(factors[49:700]) == {1.0}
    assert factors[850] == pytest.approx(0.5)
    assert 0 < factors[999] < 0.004


def test_a_guide_changes_nothing_else_that_is_drawn(small_set: Path) -> None:
    plain, guided = (
        new_trainer(config_for(small_set, guide=guide)).state for guide in (False, True)
    )
    for name, net in plain.nets().items():
        other = guided.nets()[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in net.state_dict().items())


def test_intervals_hold_steps_of_one_phase_and_miss_none(small_set: Path, tmp_path: Path) -> None:
    """Warm-up ends at step 8, training at 16; lines come every 3 steps and at those two."""
    lines = train_logged(new_trainer(config_for(small_set, log_interval=3)), tmp_path / "a", 16)
    every = train_logged(new_trainer(config_for(small_set, log_interval=1)), tmp_path / "b", 16)
    assert [values["step"] for values in lines] == [3, 6, 8, 9, 12, 15, 16]
    assert [values["phase"] for values in lines] == ["warmup"] * 3 + ["adversarial"] * 4
    assert all(("area" in values) == (values["phase"] == "adversarial") for values in lines)
    areas = [values["area"] for values in every[8:12]]
    assert lines[3]["area"] == pytest.approx(areas[0])
    assert lines[4]["area"] == pytest.approx(sum(areas[1:]) / 3)


@pytest.mark.parametrize("confusion", ["top", "true-log-probability"])
def test_first_lambda_is_the_stated_multiple_of_the_loss_on_the_first_batch_without_masks(
    small_set: Path, confusion: str
) -> None:
    config = config_for(small_set, area_start=0.7, controller_rate=1e-12, confusion=confusion)
    trainer = new_trainer(config)
    batches = batches_for(trainer)
    for _ in range(trainer.warmup_steps):
        trainer.train_step(batches)
    batch = next(batches)
    mean, std = (np.array(v)[:, None, None] for v in (trainer.model.mean, trainer.model.std))
    images = torch.from_numpy((batch.images.numpy() - mean) / std).float()
    with torch.no_grad():
        logits = trainer.state.clean_classifier(images).double().numpy()
    top, classes = logits.max(axis=1), logits.shape[1]
    if confusion == "top":
        losses = top - (logits.sum(axis=1) - top) / (classes - 1)
    else:
        own = np.exp(logits)[np.arange(len(logits)), batch.labels.numpy()]
        losses = np.log(classes * own / np.exp(logits).sum(axis=1))
    trainer.train_step(iter([batch]))
    assert trainer.state.controller is not None
    assert trainer.state.controller.area_weight == pytest.approx(0.7 * losses.mean(), rel=1e-4)


def test_the_average_follows_the_corruption_net_by_hand(small_set: Path) -> None:
    """One step of an epoch of one batch: average = .9 x start + .1 x the net after the step."""
    trainer = new_trainer(config_for(small_set, averaging=0.9, batch_size=64))
    train_epochs(trainer, 2)
    start = [p.clone() for p in trainer.state.corruption.parameters()]
    train_epochs(trainer, 1)
    for before, after, average in zip(
        start,
        trainer.state.corruption.parameters(),
        trainer.state.corruption_average.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(average, 0.9 * before + 0.1 * after)


def test_collapse_is_noted_then_stops_training_unless_told_otherwise(
    small_set: Path, tmp_path: Path
) -> None:
    """A classifier that always answers class 0, with a rate that teaches it nothing."""
    options = {"collapse_steps": 10, "warmup_epochs": 14, "warmup_rate": 1e-9, "log_interval": 1}
    options |= {"batch_size": 64}  # a step is the whole set, of which an eighth is class 0

    def ignorant(**more: object) -> Trainer:
        trainer = new_trainer(config_for(small_set, **options, **more))
        answer_class_0(trainer)
        return trainer

    with pytest.raises(
        TrainingError, match=r"accuracy at chance.*--warmup-rate.* 10 steps on end, up to step 10"
    ):
        train_logged(ignorant(), tmp_path, 14)
    noted = [
        values["step"]
        for values in metrics(tmp_path)
        if any("accuracy at chance" in note for note in values.get("notes", []))
    ]
    assert noted == list(range(2, 10)), "from a fifth of the steps on"
    train_epochs(ignorant(stop_on_collapse=False), 14)


def test_the_frozen_classifier_keeps_its_weights_and_has_no_gate(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set, target=1 - 1e-9, co_trained="none"))
    train_epochs(trainer, 4)
    assert trainer.state.epoch.joint_steps == 0
    assert trainer.state.controller is not None
    assert trainer.state.controller.joint, "the gate would be open"
    assert (trainer.state.collapse.joint, trainer.state.collapse.closed) == (None, 0)
    assert equal(trainer.state.classifier, trainer.state.clean_classifier)


@pytest.mark.parametrize(
    "changes",
    [
        {"superpixel_masks": False},
        {"gumbel_noise": False},
        {"confusion": "true-log-probability"},
        {"logit_limit": 0.0},
        {"area_power": 1},
        {"precision": "bfloat16"},
        {"residual_blocks": 1},
        {"imitation_weight": 5.0},
        {"guide": True},
        {"guide": True, "imitation_weight": 5.0, "superpixel_masks": False, "gumbel_noise": False},
        {"guide": True, "imitation_weight": 5.0, "precision": "bfloat16"},
    ],
)
def test_each_ablation_trains_other_masks_from_the_same_start(
    small_set: Path, changes: dict
) -> None:
    plain, other = (new_trainer(config_for(small_set, **c)) for c in ({}, changes))
    if "logit_limit" in changes:  # which small nets do not reach
        for trainer in (plain, other):
            trainer.state.corruption.state_dict()["output.bias"].fill_(8.2)
    for trainer in (plain, other):
        train_epochs(trainer, 3)
    assert torch.isfinite(weights(other)).all()
    assert not torch.equal(weights(plain), weights(other))


def test_without_superpixels_pixels_of_one_superpixel_are_masked_apart(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set, superpixel_masks=False))
    _, _, segments, noise = trainer.adversarial_tensors(next(batches_for(trainer)))
    assert noise.shape == (16, 32 * 32)
    assert (segments.flatten(1).diff(dim=1) == 1).all()
