"""Checkpoints of a training: it goes on as if never interrupted."""

from pathlib import Path

import cv2
import pytest
import torch

from jobs.runs import load_nets, save_nets
from jobs.train.examples import load_examples
from jobs.train.log import TrainingLog
from jobs.train.state import TrainingError, finished_nets
from jobs.train.worker import resume, write_state
from model.corruption import CorruptionNet
from pipeline.shards.format import read_manifest
from tests.jobs.train.small import (
    CPU,
    State,
    assert_same_state,
    batches_for,
    config_for,
    equal,
    new_trainer,
    state_of,
    train_epochs,
    train_logged,
    train_steps,
    weights,
)

TIMED = {"seconds", "images_per_second", "waiting", "first_batch_seconds", "eta_seconds"}


@pytest.fixture(scope="module")
def uninterrupted(small_set: Path) -> State:
    trainer = new_trainer(config_for(small_set))
    train_steps(trainer, 15)  # of 16: in the middle of an epoch, with numbers still pending
    return state_of(trainer)


@pytest.mark.parametrize("stop", [1, 4, 6, 8, 9, 12, 14])  # epochs have 4 steps, the warm-up 8
def test_a_training_stopped_at_any_step_and_resumed_equals_the_uninterrupted_one_to_the_last_bit(
    uninterrupted: State, small_set: Path, tmp_path: Path, stop: int
) -> None:
    config = config_for(small_set, output=tmp_path)
    first, second = new_trainer(config), new_trainer(config)
    train_steps(first, stop)
    write_state(first)
    assert resume(second) == [f"went on from the checkpoint of step {stop}"]
    train_steps(second, 15 - stop)
    assert_same_state(second, uninterrupted)


def test_writing_checkpoints_changes_no_bit(
    uninterrupted: State, small_set: Path, tmp_path: Path
) -> None:
    trainer = new_trainer(config_for(small_set, output=tmp_path, checkpoint_interval=3))
    batches = batches_for(trainer)
    kept = []
    for _ in range(15):
        trainer.train_step(batches)
        if trainer.at_checkpoint:
            write_state(trainer)
            kept.append(trainer.state.step)
    assert kept == [3, 4, 6, 8, 9, 12, 15]
    assert_same_state(trainer, uninterrupted)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000000012",
        "step-000000015",
    ]


@pytest.mark.parametrize(("at_once", "expected"), [(True, [2, 4, 6, 8]), (False, [3, 4, 7, 8])])
def test_a_rank_that_asks_in_steps_2_and_6_gets_a_checkpoint_on_a_gpu_a_step_later(
    at_once: bool, expected: list[int], uninterrupted: State, small_set: Path, tmp_path: Path
) -> None:
    trainer = new_trainer(config_for(small_set, output=tmp_path))
    trainer.reads_at_once = at_once
    trainer.due = lambda: trainer.state.step in (1, 5)
    batches, kept = batches_for(trainer), []
    for _ in range(15):
        trainer.train_step(batches)
        if trainer.at_checkpoint:
            write_state(trainer)
            kept.append(trainer.state.step)
    assert kept == [*expected, 12]
    assert_same_state(trainer, uninterrupted)


def test_a_resumed_log_equals_the_uninterrupted_one_but_for_times(
    small_set: Path, tmp_path: Path
) -> None:
    config = config_for(small_set, output=tmp_path / "stopped", log_interval=3)
    whole = train_logged(new_trainer(config), tmp_path / "whole", 16)
    first, second = new_trainer(config), new_trainer(config)
    train_logged(first, tmp_path / "stopped", 9)
    assert len(first.state.pending) == 1  # so the line of step 9 is not yet written
    write_state(first)
    train_logged(first, tmp_path / "stopped", 4)  # lost, but for their lines
    resume(second)
    stopped = train_logged(second, tmp_path / "stopped", 7)
    for values in (*whole, *stopped):
        for name in TIMED:
            del values[name]
    assert stopped == whole


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    small_set: Path, tmp_path: Path
) -> None:
    config = config_for(small_set, output=tmp_path)
    trainer, again = new_trainer(config), new_trainer(config)
    for _ in range(2):
        train_steps(trainer, 3)
        write_state(trainer)
    newest = tmp_path / "checkpoints" / "step-000000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    damaged, resumed = resume(again)
    assert "step-000000006/state.safetensors has" in damaged
    assert resumed == "went on from the checkpoint of step 3"
    assert again.state.step == 3


def test_a_run_begins_with_the_clean_classifier_of_another_run_and_resumes_as_any(
    small_set: Path, tmp_path: Path
) -> None:
    source = new_trainer(config_for(small_set, output=tmp_path / "source", target=None))
    train_epochs(source, 1)
    write_state(source)
    config = config_for(
        small_set, output=tmp_path / "run", target=None, warmup_from=tmp_path / "source", seed=1
    )
    trainer, resumed = new_trainer(config), new_trainer(config)
    with pytest.raises(TrainingError, match="no checkpoint past its warm-up"):
        trainer.take_warmup(tmp_path / "source")
    train_epochs(source, 2)
    write_state(source)
    trainer.take_warmup(tmp_path / "source")
    assert (trainer.steps, trainer.warming_up) == (2 * trainer.epoch_steps, False)
    assert trainer.state.clean_accuracy == source.state.clean_accuracy > 0
    assert trainer.state.target == source.state.target
    for net in (trainer.state.classifier, trainer.state.clean_classifier):
        assert equal(net, source.state.clean_classifier)

    train_steps(trainer, 3)
    write_state(trainer)
    train_steps(trainer, 3)
    assert resume(resumed) == ["went on from the checkpoint of step 3"]
    train_steps(resumed, 3)
    assert torch.equal(weights(resumed), weights(trainer))
    assert not equal(trainer.state.classifier, trainer.state.clean_classifier)


def test_a_guided_net_sees_the_clean_classifier_which_stays_as_it_is(
    small_set: Path, tmp_path: Path
) -> None:
    options = {"guide": True, "imitation_weight": 5.0}
    config = config_for(small_set, output=tmp_path, **options)
    whole, first, second = (new_trainer(config) for _ in range(3))
    state, fresh = whole.state, first.state.corruption
    assert isinstance(state.corruption, CorruptionNet)
    assert isinstance(fresh, CorruptionNet)
    assert state.corruption.mix is not None
    assert fresh.mix is not None
    before = [p.clone() for p in fresh.mix.parameters()]
    train_epochs(whole, 3)
    for net in (state.corruption, state.corruption_average):
        assert isinstance(net, CorruptionNet)
        assert net.guide is not None
        assert equal(net.guide, state.clean_classifier)
    learned = zip(state.corruption.mix.parameters(), before, strict=True)
    assert not any(torch.equal(now, start) for now, start in learned)

    train_steps(first, 11)
    write_state(first)
    resume(second)
    train_steps(second, 3 * second.epoch_steps - 11)
    assert torch.equal(weights(second), weights(whole))

    other = new_trainer(
        config_for(small_set, output=tmp_path / "x", warmup_from=tmp_path, **options)
    )
    other.take_warmup(tmp_path)
    for net in (other.state.corruption, other.state.corruption_average):
        assert isinstance(net, CorruptionNet)
        assert net.guide is not None
        assert equal(net.guide, first.state.clean_classifier)

    save_nets(tmp_path, finished_nets(state, whole.model), {})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            load_nets(tmp_path).corruption(images), state.corruption_average(images)
        )


def test_example_pictures_show_fixed_images_as_their_masks_change(
    small_set: Path, tmp_path: Path
) -> None:
    trainer = new_trainer(config_for(small_set, output=tmp_path))
    trainer.log = TrainingLog(tmp_path, 0)
    examples = load_examples(trainer.config.loading, read_manifest(small_set), CPU)
    for _ in range(4):
        train_epochs(trainer, 1)
        write_state(trainer, examples)
    trainer.log.close()
    first, last = (
        cv2.imread(str(tmp_path / "examples" / f"step-{step:06}.png")) for step in (8, 16)
    )
    assert first is not None
    assert last is not None
    side = 32 * 4 + 4
    assert first.shape == last.shape == (3 * side + 4, 8 * side + 4, 3)
    assert (first[:side] == last[:side]).all(), "the images themselves"
    assert (first[side:] != last[side:]).any(), "their masks"
    stored = examples[0][3].permute(1, 2, 0).numpy()
    assert (first[6:132:4, 3 * side + 6 : 4 * side : 4, ::-1] == stored).all()
