import json
import math
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.cli import duration, parse
from jobs.runs import load_nets, save_nets
from jobs.train.__main__ import check_data, check_warmup, claim_output
from jobs.train.__main__ import train as train_job
from jobs.train.config import PRESETS, TrainConfig
from jobs.train.examples import load_examples
from jobs.train.log import METRICS_NAME, MlflowLog, TrainingLog, line, summary, waiting_summary
from jobs.train.state import (
    TrainingError,
    adversarial_factor,
    finished_nets,
    state_numbers,
    state_tensors,
    warmup_factor,
)
from jobs.train.trainer import LAG, Trainer, checkpoint, model_config, resume
from model.controller import ControllerState
from model.step import trainable
from pipeline.errors import UserError
from pipeline.loading.augmentation import Augmentation
from pipeline.loading.cache import GIB, cached_bytes
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.order import Order
from pipeline.shards.format import read_manifest

CPU = torch.device("cpu")


def config_for(data: Path | str, **changes: object) -> TrainConfig:
    options: dict = {
        "data": str(data),
        "output": Path(data).parent / "run",
        "warmup_epochs": 2,
        "epochs": 2,
        "batch_size": 16,
        "net_width": 8,
        "bottleneck": 16,
        "target": 0.2,
    }
    return TrainConfig(**(options | changes))


def new_trainer(config: TrainConfig) -> Trainer:
    manifest = read_manifest(config.data)
    return Trainer(config, model_config(config, manifest), manifest, CPU, ranks=1)


def batches_for(trainer: Trainer) -> Iterator[Batch]:
    config = trainer.config
    loader = Loader(config.data, read_manifest(config.data))
    order = Order(batch_size=config.batch_size, seed=config.seed)
    return loader.train(order, Augmentation(), start=trainer.position)


def train_steps(trainer: Trainer, steps: int) -> None:
    batches = batches_for(trainer)
    for _ in range(steps):
        trainer.train_step(batches)


def train_epochs(trainer: Trainer, epochs: int) -> None:
    train_steps(trainer, epochs * trainer.epoch_steps)


def weights(trainer: Trainer) -> torch.Tensor:
    nets = trainer.state.nets().values()
    return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])


def everything(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict]:
    """All that a checkpoint holds, but for times."""
    numbers = state_numbers(trainer.state)
    for name in ("interval", "epoch"):
        for time in ("seconds", "waiting", "first_batch"):
            del numbers[name][time]
    return state_tensors(trainer.state), numbers


@pytest.fixture(scope="module")
def uninterrupted(small_set: Path) -> tuple[dict[str, torch.Tensor], dict]:
    trainer = new_trainer(config_for(small_set))
    train_steps(trainer, 15)  # of 16: in the middle of an epoch, with numbers still pending
    return everything(trainer)


@pytest.mark.parametrize("stop", range(1, 15))
def test_a_training_stopped_at_any_step_and_resumed_equals_the_uninterrupted_one_to_the_last_bit(
    uninterrupted: tuple, small_set: Path, tmp_path: Path, stop: int
) -> None:
    config = config_for(small_set, output=tmp_path)
    first = new_trainer(config)
    train_steps(first, stop)
    checkpoint(first)
    second = new_trainer(config)
    assert resume(second) == [f"went on from the checkpoint of step {stop}"]
    train_steps(second, 15 - stop)
    tensors, numbers = everything(second)
    assert numbers == uninterrupted[1]
    assert tensors.keys() == uninterrupted[0].keys()
    assert all(torch.equal(tensors[name], uninterrupted[0][name]) for name in tensors)


def test_writing_checkpoints_changes_no_bit(
    uninterrupted: tuple, small_set: Path, tmp_path: Path
) -> None:
    trainer = new_trainer(config_for(small_set, output=tmp_path, checkpoint_interval=3))
    batches = batches_for(trainer)
    kept = []
    for _ in range(15):
        trainer.train_step(batches)
        if trainer.at_checkpoint:
            checkpoint(trainer)
            kept.append(trainer.state.step)
    assert kept == [3, 4, 6, 8, 9, 12, 15]
    tensors, numbers = everything(trainer)
    assert numbers == uninterrupted[1]
    assert all(torch.equal(tensors[name], uninterrupted[0][name]) for name in tensors)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000000012",
        "step-000000015",
    ]


def test_a_resumed_log_equals_the_uninterrupted_one_but_for_times(
    small_set: Path, tmp_path: Path
) -> None:
    def lines(run: Path) -> list[dict]:
        timed = {"seconds", "images_per_second", "waiting", "first_batch_seconds", "eta_seconds"}
        found = [json.loads(text) for text in (run / METRICS_NAME).read_text().splitlines()]
        return [{k: v for k, v in values.items() if k not in timed} for values in found]

    config = config_for(small_set, output=tmp_path / "stopped", log_interval=3)
    whole = new_trainer(config)
    (tmp_path / "whole").mkdir()
    whole.log = TrainingLog(tmp_path / "whole", 0)
    train_steps(whole, 16)
    whole.log.close()
    first = new_trainer(config)
    (tmp_path / "stopped").mkdir()
    first.log = TrainingLog(tmp_path / "stopped", 0)
    train_steps(first, 9)
    assert len(first.state.pending) == 1  # so the line of step 9 is not yet written
    checkpoint(first)
    train_steps(first, 4)  # lost, but for their lines
    first.log.close()
    second = new_trainer(config)
    resume(second)
    second.log = TrainingLog(tmp_path / "stopped", second.read_step)
    train_steps(second, 7)
    second.log.close()
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_the_same_seed_trains_the_same_nets_and_another_seed_others(small_set: Path) -> None:
    trainers = [new_trainer(config_for(small_set, seed=seed)) for seed in (3, 3, 4)]
    for trainer in trainers:
        train_epochs(trainer, 3)
    assert torch.equal(weights(trainers[0]), weights(trainers[1]))
    assert not torch.equal(weights(trainers[0]), weights(trainers[2]))


def test_warm_up_trains_the_classifier_alone_and_keeps_it_as_the_clean_one(
    small_set: Path,
) -> None:
    trainer = new_trainer(config_for(small_set))
    before = [p.clone() for p in trainer.state.corruption.parameters()]
    train_epochs(trainer, 2)
    after = trainer.state.corruption.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    clean = [p.clone() for p in trainer.state.clean_classifier.parameters()]
    pairs = zip(clean, trainer.state.classifier.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    train_epochs(trainer, 2)
    pairs = zip(clean, trainer.state.clean_classifier.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(before[0], next(trainer.state.corruption.parameters()))


def test_below_the_target_both_nets_train_once_the_first_numbers_are_read(
    small_set: Path,
) -> None:
    trainer = new_trainer(config_for(small_set, target=1 - 1e-9))
    train_epochs(trainer, 3)
    assert trainer.state.epoch.joint_steps == trainer.epoch_steps - LAG
    train_epochs(trainer, 1)
    assert trainer.state.epoch.joint_steps == trainer.epoch_steps


def test_above_the_target_the_classifier_stands_still(small_set: Path) -> None:
    """One batch is the whole set, and a classifier that always answers class 0 is right for an
    eighth of it."""
    trainer = new_trainer(config_for(small_set, target=0.1, batch_size=64, epochs=6))
    train_epochs(trainer, 2)
    torch.nn.init.zeros_(trainer.state.classifier.head.weight)
    trainer.state.classifier.head.bias.data = torch.eye(8)[0]
    before = [p.clone() for p in trainer.state.classifier.parameters()]
    for _ in range(6):
        train_epochs(trainer, 1)
        assert trainer.state.epoch.means()["accuracy"] == 0.125
        assert trainer.state.epoch.joint_steps == 0
    after = trainer.state.classifier.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_target_is_the_stated_share_of_the_way_to_the_clean_accuracy(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set, target=None, target_share=0.25))
    train_epochs(trainer, 2)
    clean = trainer.state.clean_accuracy
    assert 0 <= clean <= 1
    assert trainer.state.target == pytest.approx(0.125 + 0.25 * (clean - 0.125))


def test_not_a_number_stops_training_and_names_the_remedy(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set))
    torch.nn.init.constant_(trainer.state.classifier.head.bias, math.nan)
    with pytest.raises(TrainingError, match=r"classifier_loss became NaN .* step 1;.*learning"):
        train_epochs(trainer, 1)


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


def test_a_resumed_log_holds_every_step_once(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write({"step": step, "phase": "warmup", "accuracy": 0.5})
    log.close()
    with (tmp_path / METRICS_NAME).open("a") as file:
        file.write('{"step": 40, "ph')  # killed while writing
    log = TrainingLog(tmp_path, 20)
    log.write({"step": 30, "phase": "warmup", "accuracy": 0.6})
    log.close()
    found = [json.loads(text) for text in (tmp_path / METRICS_NAME).read_text().splitlines()]
    assert [(values["step"], values["accuracy"]) for values in found] == [
        (10, 0.5),
        (20, 0.5),
        (30, 0.6),
    ]


def test_a_line_names_all_that_is_watched() -> None:
    values = {
        "step": 60,
        "steps": 100,
        "epoch": 3,
        "phase": "adversarial",
        "accuracy": 0.51,
        "target": 0.5,
        "area_weight": 4.25,
        "joint_share": 0.4,
        "area": 0.21,
        "corruption_loss": 1.5,
        "classifier_loss": 0.9,
        "images_per_second": 812.3,
        "waiting": 0.012,
        "eta_seconds": 3723,
    }
    assert line(values) == (
        "step 60/100 | epoch 4 | joint 40% | corruption loss 1.500 | classifier loss 0.900 | "
        "masked accuracy 0.510 (target 0.500) | lambda 4.25 | area 0.210 | 812 images/s | "
        "waiting 1.2% | ETA 1:02:03"
    )
    imitating = line(values | {"imitation_loss": 0.52})
    assert "| corruption loss 1.500 | imitation loss 0.520 | classifier loss" in imitating


def test_a_run_begins_with_the_clean_classifier_of_another_run_and_resumes_as_any(
    small_set: Path, tmp_path: Path
) -> None:
    source = new_trainer(config_for(small_set, output=tmp_path / "source", target=None))
    train_epochs(source, 1)
    checkpoint(source)
    config = config_for(
        small_set, output=tmp_path / "run", target=None, warmup_from=tmp_path / "source", seed=1
    )
    with pytest.raises(TrainingError, match="no checkpoint past its warm-up"):
        new_trainer(config).take_warmup(tmp_path / "source")
    train_epochs(source, 2)
    checkpoint(source)

    trainer = new_trainer(config)
    trainer.take_warmup(tmp_path / "source")
    assert (trainer.steps, trainer.warming_up) == (2 * trainer.epoch_steps, False)
    assert trainer.state.clean_accuracy == source.state.clean_accuracy > 0
    assert trainer.state.target == source.state.target
    clean = source.state.clean_classifier.state_dict()
    for net in (trainer.state.classifier, trainer.state.clean_classifier):
        assert all(torch.equal(value, clean[name]) for name, value in net.state_dict().items())

    train_steps(trainer, 3)
    checkpoint(trainer)
    train_steps(trainer, 3)
    resumed = new_trainer(config)
    assert resume(resumed) == ["went on from the checkpoint of step 3"]
    train_steps(resumed, 3)
    assert torch.equal(weights(resumed), weights(trainer))
    assert not torch.equal(
        trainer.state.classifier.head.weight, trainer.state.clean_classifier.head.weight
    )


def test_a_guided_net_sees_the_clean_classifier_which_stays_as_it_is(
    small_set: Path, tmp_path: Path
) -> None:
    config = config_for(small_set, output=tmp_path, guide=True, imitation_weight=5.0)
    whole = new_trainer(config)
    train_epochs(whole, 3)
    state = whole.state
    clean = state.clean_classifier.state_dict()
    for net in (state.corruption, state.corruption_average):
        assert net.guide is not None
        seen = net.guide.state_dict()
        assert all(torch.equal(seen[name], value) for name, value in clean.items())
    fresh = new_trainer(config).state.corruption
    assert state.corruption.mix is not None
    assert fresh.mix is not None
    learned = zip(state.corruption.mix.parameters(), fresh.mix.parameters(), strict=True)
    assert not any(torch.equal(now, before) for now, before in learned)

    first = new_trainer(config)
    train_steps(first, 11)
    checkpoint(first)
    second = new_trainer(config)
    resume(second)
    train_steps(second, 3 * second.epoch_steps - 11)
    assert torch.equal(weights(second), weights(whole))

    other = new_trainer(replace(config, output=tmp_path / "other", warmup_from=tmp_path))
    other.take_warmup(tmp_path)
    clean = first.state.clean_classifier.state_dict()
    for net in (other.state.corruption, other.state.corruption_average):
        assert net.guide is not None
        seen = net.guide.state_dict()
        assert all(torch.equal(seen[name], value) for name, value in clean.items())

    save_nets(tmp_path, finished_nets(state, whole.model), {})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        said = load_nets(tmp_path).corruption(images)
        torch.testing.assert_close(said, state.corruption_average(images))


def test_a_guide_changes_nothing_else_that_is_drawn(small_set: Path) -> None:
    plain, guided = (
        new_trainer(config_for(small_set, guide=guide)).state for guide in (False, True)
    )
    for name, net in plain.nets().items():
        other = guided.nets()[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in net.state_dict().items())


def test_masks_that_are_no_numbers_end_an_imitating_run_by_name(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set, imitation_weight=5.0))
    train_epochs(trainer, 2)
    torch.nn.init.constant_(trainer.state.corruption.output.weight, math.nan)
    with pytest.raises(TrainingError, match=r"imitation_loss.* became NaN or infinite"):
        train_epochs(trainer, 1)


def test_a_warm_up_on_other_images_or_of_other_nets_is_refused_one_on_other_superpixels_taken(
    small_set: Path, tmp_path: Path
) -> None:
    source, manifest = config_for(small_set, output=tmp_path / "source"), read_manifest(small_set)
    claim_output(source, manifest, {"configuration": {"net_width": 8, "residual_blocks": 0}})
    from_source = config_for(small_set, warmup_from=tmp_path / "source")
    check_warmup(from_source, manifest)
    finer = replace(manifest, max_superpixels=400, ledger="0" * 64, versions={"numpy": "3"})
    check_warmup(from_source, finer)
    others = [
        replace(manifest, classes=(*manifest.classes[1:], manifest.classes[0])),
        replace(manifest, width=manifest.width + 16),
        replace(manifest, mean=(1.0, *manifest.mean[1:])),
    ]
    for other in others:
        with pytest.raises(UserError, match="was trained on other images than"):
            check_warmup(from_source, other)
    with pytest.raises(UserError, match=r"has nets of --net-width 8, not 16"):
        check_warmup(replace(from_source, net_width=16), manifest)
    with pytest.raises(UserError, match=r"has nets of --residual-blocks 0, not 2"):
        check_warmup(replace(from_source, residual_blocks=2), manifest)
    with pytest.raises(UserError, match=r"holds no run\.json"):
        check_warmup(replace(from_source, warmup_from=tmp_path), manifest)


def test_notes_end_the_line() -> None:
    values = dict.fromkeys(
        ("step", "steps", "epoch", "accuracy", "target", "area_weight", "joint_share", "area"), 1
    )
    values |= dict.fromkeys(
        ("corruption_loss", "classifier_loss", "images_per_second", "waiting", "eta_seconds"), 1
    )
    text = line(values | {"phase": "adversarial", "notes": ["masks are empty", "and more"]})
    assert text.endswith(" | NOTE: masks are empty | NOTE: and more")


def test_durations_under_an_hour_show_minutes() -> None:
    assert [duration(seconds) for seconds in (0, 61, 3600)] == ["0:00", "1:01", "1:00:00"]


def test_another_configuration_on_the_same_output_is_refused(
    small_set: Path, tmp_path: Path
) -> None:
    def record(config: TrainConfig) -> dict:
        return {"configuration": json.loads(json.dumps(vars(config), default=str))}

    manifest = read_manifest(small_set)
    config = config_for(small_set, output=tmp_path / "run")
    claim_output(config, manifest, record(config))
    more_workers = config_for(small_set, output=tmp_path / "run", workers="3:5")
    claim_output(more_workers, manifest, record(more_workers))
    for name, value, message in (
        ("seed", 9, r"seed \(there 0, now 9\)"),
        ("batch_size", 32, r"batch_size \(there 16, now 32\)"),
        ("translation", 0.1, r"translation \(there 0.0, now 0.1\)"),
    ):
        other = config_for(small_set, output=tmp_path / "run", **{name: value})
        with pytest.raises(UserError, match=f"another configuration: {message}"):
            claim_output(other, manifest, record(other))
    copied = tmp_path / "shards"
    shutil.copytree(small_set, copied)
    (copied / "dataset.json").write_text((copied / "dataset.json").read_text() + " ")
    changed = config_for(copied, output=tmp_path / "run")
    with pytest.raises(UserError, match=r"the data set \(its dataset\.json is another\)"):
        claim_output(changed, manifest, record(changed))


def test_a_remote_set_beyond_the_cache_is_shuffled_in_windows_that_a_run_keeps(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(small_set)
    whole = config_for("s3://bucket/shards", output=tmp_path / "run")
    assert config_for(small_set).window(manifest) is None
    assert whole.window(manifest) is None  # all shards fit into the cache
    taken = sum(cached_bytes(shard) for shard in manifest.splits["train"].shards)
    tight = config_for("s3://bucket/shards", output=tmp_path / "run", cache_limit=taken * 0.9 / GIB)
    assert tight.window(manifest) == 1
    monkeypatch.setattr("jobs.train.__main__.manifest_hash", lambda data: "the same")
    claim_output(whole, manifest, {"configuration": {}})
    claim_output(whole, manifest, {"configuration": {}})
    with pytest.raises(UserError, match=r"there all, now 1, which follows from --cache-limit"):
        claim_output(tight, manifest, {"configuration": {}})


def test_a_cache_too_small_for_the_workers_is_refused_before_a_run_begins(
    remote_set: str, tmp_path: Path
) -> None:
    manifest = read_manifest(remote_set)
    taken = sum(cached_bytes(shard) for shard in manifest.splits["train"].shards)
    for workers, limit in (("1", 0.97), ("2", 0.97), ("1:2", 0.97), ("2", 1.0)):
        config = config_for(
            remote_set, output=tmp_path / "run", workers=workers, cache_limit=limit * taken / GIB
        )
        if workers == "1" or limit == 1:
            check_data(config, manifest)
            continue
        with pytest.raises(UserError, match=r"too small: 4 shards .* are needed at once"):
            train_job(config)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net_width": 20}, "multiple of 8"),
        ({"target": 1.5}, "between 0 and 1"),
        ({"seed": -1}, "--seed -1"),
        ({"controller_rate": 2.0}, "--controller-rate"),
        ({"imitation_weight": -1.0}, "--imitation-weight"),
        ({"warmup_rate": math.nan}, "--warmup-rate nan"),
        ({"warmup_epochs": 0}, "collapse"),
        ({"batch_size": 0}, "--batch-size"),
        ({"area_power": 3}, "--area-power"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for(Path("shards"), **changes)


def test_intervals_hold_steps_of_one_phase_and_miss_none(small_set: Path, tmp_path: Path) -> None:
    """Warm-up ends at step 8, training at 16; lines come every 3 steps and at those two."""
    trainer = new_trainer(config_for(small_set, log_interval=3))
    trainer.log = TrainingLog(tmp_path, 0)
    train_epochs(trainer, 4)
    trainer.log.close()
    found = [json.loads(text) for text in (tmp_path / METRICS_NAME).read_text().splitlines()]
    assert [values["step"] for values in found] == [3, 6, 8, 9, 12, 15, 16]
    assert [values["phase"] for values in found] == ["warmup"] * 3 + ["adversarial"] * 4
    assert all(("area" in values) == (values["phase"] == "adversarial") for values in found)
    every = new_trainer(config_for(small_set, log_interval=1))
    (tmp_path / "every").mkdir()
    every.log = TrainingLog(tmp_path / "every", 0)
    train_epochs(every, 4)
    every.log.close()
    lines = (tmp_path / "every" / METRICS_NAME).read_text().splitlines()
    areas = [json.loads(text).get("area") for text in lines]
    assert found[3]["area"] == pytest.approx(areas[8])
    assert found[4]["area"] == pytest.approx(sum(areas[9:12]) / 3)


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


def test_a_checkpoint_never_holds_a_weight_that_is_not_a_number(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set))
    train_epochs(trainer, 1)
    trainer.check_weights()
    with torch.no_grad():
        next(trainer.state.corruption_average.parameters())[3, 0, 1, 2] = math.inf
    with pytest.raises(TrainingError, match=r"weights of corruption_average .* step 4;"):
        trainer.check_weights()


def test_damaged_shards_are_named_before_training_starts(small_set: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(small_set, copy)
    check_data(config_for(copy), read_manifest(copy))
    (copy / "train" / "train-000001.idx").write_text("")
    with pytest.raises(UserError, match=r"train-000001\.idx"):
        check_data(config_for(copy), read_manifest(copy))
    manifest = json.loads((copy / "dataset.json").read_text())
    shutil.copy(small_set / "train" / "train-000001.idx", copy / "train")
    (copy / "dataset.json").write_text(json.dumps(manifest | {"height": 40}))
    with pytest.raises(UserError, match="multiples of 16"):
        check_data(config_for(copy), read_manifest(copy))


def test_a_changed_byte_is_found_where_every_byte_is_asked_for(
    small_set: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(small_set, copy)
    shard = copy / "train" / "train-000002.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # a pixel of the first image
    shard.write_bytes(content)
    check_data(config_for(copy), read_manifest(copy))
    with pytest.raises(UserError, match=r"train-000002\.tar has SHA-256 "):
        check_data(config_for(copy, verify_shards=True), read_manifest(copy))


def test_the_waiting_share_leaves_the_loaders_start_apart(tmp_path: Path) -> None:
    lines = [
        {"phase": "warmup", "seconds": 12.0, "waiting": 0.25, "first_batch_seconds": 2.0},
        {"phase": "warmup", "seconds": 10.0, "waiting": 0.0, "first_batch_seconds": 0.0},
        {"phase": "adversarial", "seconds": 10.0, "waiting": 0.02, "first_batch_seconds": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert waiting_summary(tmp_path) == (
        "waiting for data: warmup 5.0%, adversarial 2.0%; for the first batches 2.0 s"
    )


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(
    small_set: Path, tmp_path: Path
) -> None:
    trainer = new_trainer(config_for(small_set, output=tmp_path))
    for _ in range(2):
        train_steps(trainer, 3)
        checkpoint(trainer)
    newest = tmp_path / "checkpoints" / "step-000000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = new_trainer(config_for(small_set, output=tmp_path))
    damaged, went_on = resume(again)
    assert "step-000000006/state.safetensors has" in damaged
    assert went_on == "went on from the checkpoint of step 3"
    assert again.state.step == 3
    oldest = tmp_path / "checkpoints" / "step-000000003" / "state.json"
    oldest.write_text("{")
    with pytest.raises(TrainingError, match=r"no sound checkpoint is left .* another --output"):
        resume(new_trainer(config_for(small_set, output=tmp_path)))


def test_a_full_disk_stops_training_with_the_earlier_checkpoint_untouched(
    small_set: Path, tmp_path: Path
) -> None:
    trainer = new_trainer(config_for(small_set, output=tmp_path))
    train_steps(trainer, 3)
    checkpoint(trainer)
    train_steps(trainer, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # no file may grow beyond: a real error
    try:
        with pytest.raises(TrainingError, match=r"checkpoint of step 6 cannot .* Make room"):
            checkpoint(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert resume(new_trainer(config_for(small_set, output=tmp_path)))[0].endswith("step 3")


def test_collapse_is_noted_then_stops_training_unless_told_otherwise(
    small_set: Path, tmp_path: Path
) -> None:
    """A classifier that always answers class 0, with a rate that teaches it nothing."""
    options = {"collapse_steps": 10, "warmup_epochs": 14, "warmup_rate": 1e-9, "log_interval": 1}
    options |= {"batch_size": 64}  # a step is the whole set, of which an eighth is class 0

    def ignorant(**more: object) -> Trainer:
        trainer = new_trainer(config_for(small_set, **options, **more))
        torch.nn.init.zeros_(trainer.state.classifier.head.weight)
        trainer.state.classifier.head.bias.data = torch.eye(8)[0]
        return trainer

    trainer = ignorant()
    trainer.log = TrainingLog(tmp_path, 0)
    with pytest.raises(TrainingError, match=r"accuracy at chance.* 10 steps on end, up to step 10"):
        train_epochs(trainer, 14)
    trainer.log.close()
    noted = [
        json.loads(text)["step"]
        for text in (tmp_path / METRICS_NAME).read_text().splitlines()
        if any("accuracy at chance" in note for note in json.loads(text).get("notes", []))
    ]
    assert noted == list(range(2, 10)), "from a fifth of the steps on"
    train_epochs(ignorant(stop_on_collapse=False), 14)


def test_the_frozen_classifier_keeps_its_weights_and_has_no_gate(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set, target=1 - 1e-9, train_classifier=False))
    train_epochs(trainer, 4)
    assert trainer.state.epoch.joint_steps == 0
    assert trainer.state.controller is not None
    assert trainer.state.controller.joint, "the gate would be open"
    assert (trainer.state.collapse.joint, trainer.state.collapse.closed) == (None, 0)
    pairs = zip(
        trainer.state.classifier.parameters(),
        trainer.state.clean_classifier.parameters(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "changes",
    [
        {"superpixel_masks": False},
        {"gumbel_noise": False},
        {"confusion": "true-log-probability", "complement_weight": 0.5},
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
            torch.nn.init.constant_(trainer.state.corruption.output.bias, 8.2)  # type: ignore[arg-type]
    for trainer in (plain, other):
        train_epochs(trainer, 3)
    assert torch.isfinite(weights(other)).all()
    assert not torch.equal(weights(plain), weights(other))


def test_compiled_nets_train_as_uncompiled_ones_up_to_rounding(small_set: Path) -> None:
    """First a step of the corruption net alone, then joint ones, which go back through the
    classifier's graph twice."""
    plain, compiled = (
        new_trainer(
            config_for(
                small_set,
                compile=c,
                warmup_epochs=1,
                batch_size=64,
                epochs=3,
                guide=True,
                imitation_weight=1.0,
            )
        )
        for c in (False, True)
    )
    for trainer in (plain, compiled):
        torch.nn.init.constant_(trainer.state.corruption.output.bias, 5.0)  # type: ignore[arg-type]
        train_epochs(trainer, 3)  # an epoch is a step
    assert compiled.state.epoch.means() == pytest.approx(plain.state.epoch.means(), rel=1e-3)
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-2, atol=1e-3)


def test_without_superpixels_pixels_of_one_superpixel_are_masked_apart(small_set: Path) -> None:
    trainer = new_trainer(config_for(small_set, superpixel_masks=False))
    segments, labels = trainer._segments(next(batches_for(trainer)))
    assert labels == 32 * 32
    assert (segments.flatten(1).diff(dim=1) == 1).all()


def test_presets_fill_what_is_not_given_and_flags_win() -> None:
    def parsed(*flags: str) -> TrainConfig:
        return parse(TrainConfig, ["--data", "d", "--output", "o", *flags], "", PRESETS)

    assert parsed() == parsed("--preset", "best") == TrainConfig(data="d", output=Path("o"))
    paper = parsed("--preset", "paper")
    assert {name: getattr(paper, name) for name in PRESETS["paper"]} == PRESETS["paper"]
    assert (paper.target, paper.area_power, paper.clean_weight) == (0.1, 1, 0.0)
    assert parsed("--prese", "paper") == paper, "flags may be shortened"
    mixed = parsed("--target", "0.3", "--preset=paper", "--clean-weight", "1")
    assert (mixed.target, mixed.area_power, mixed.clean_weight) == (0.3, 1, 1.0)
    with pytest.raises(SystemExit):
        parsed("--preset", "worst")


def test_a_target_that_chance_reaches_is_refused(small_set: Path) -> None:
    with pytest.raises(UserError, match=r"0\.1 is not above chance for 8 classes \(0\.125\)"):
        check_data(config_for(small_set, target=0.1), read_manifest(small_set))


class Reads(TorchDispatchMode):
    """Counts values that the host asks a tensor for, but for those of the given tensors."""

    def __init__(self, but: list[torch.Tensor]) -> None:
        super().__init__()
        self.but, self.count = {id(tensor) for tensor in but}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        waits = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        if func in waits and id(args[0]) not in self.but:
            self.count += 1
        return func(*args, **(kwargs or {}))


def adam_steps(trainer: Trainer) -> list[torch.Tensor]:
    """Adam's own step counts, which a CPU's optimizer reads itself."""
    return [
        values["step"]
        for optimizer in trainer.state.optimizers.values()
        for values in optimizer.state.values()
    ]


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("imitating", [{}, {"guide": True, "imitation_weight": 5.0}])
def test_no_step_asks_a_fresh_tensor_for_its_value(
    small_set: Path, imitating: dict, joint: bool
) -> None:
    trainer = new_trainer(config_for(small_set, log_interval=1, **imitating))
    batches = batches_for(trainer)
    for _ in range(trainer.warmup_steps):
        trainer.train_step(batches)
    batch = next(batches)
    trainer.state.controller = ControllerState(area_weight=1.0, accuracy=0.5, joint=True)
    trainer.adversarial_step(batch)
    trainer.state.controller = ControllerState(area_weight=1.0, accuracy=0.5, joint=joint)
    with Reads(adam_steps(trainer)) as reads:
        trainer.warmup_step(batch)
        trainer.adversarial_step(batch)
    assert reads.count == 0
    with Reads(adam_steps(trainer)) as reads:
        trainer.state.pending[0].values[0].item()
    assert reads.count == 1, "the counter counts"


@pytest.fixture(params=[{}, {"guide": True, "imitation_weight": 5.0}])
def on_gpu(small_set: Path, request: pytest.FixtureRequest) -> tuple[Trainer, Iterator[Batch]]:
    """A trainer on a GPU just past its warm-up, and its further batches."""
    config = config_for(small_set, **request.param)
    manifest, device = read_manifest(config.data), torch.device("cuda")
    trainer = Trainer(config, model_config(config, manifest), manifest, device, ranks=1)
    loader, order = Loader(config.data, manifest, device), Order(batch_size=config.batch_size)
    batches = loader.train(order, Augmentation(), start=trainer.position)
    for _ in range(trainer.warmup_steps + LAG):
        trainer.train_step(batches)
    return trainer, batches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_no_step_waits_for_the_gpu(on_gpu: tuple[Trainer, Iterator[Batch]]) -> None:
    trainer, batches = on_gpu
    batch = next(batches)
    balance = ControllerState(area_weight=1.0, accuracy=0.5)

    def each_kind_of_step() -> None:
        trainer.warmup_step(batch)
        for joint in (True, False):
            trainer.state.controller = replace(balance, joint=joint)
            trainer.adversarial_step(batch)

    each_kind_of_step()  # recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        each_kind_of_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_replayed_step_is_the_launched_one_with_the_weights_and_the_batch_of_now(
    on_gpu: tuple[Trainer, Iterator[Batch]],
) -> None:
    trainer, batches = on_gpu
    recordings = trainer.recordings
    assert recordings is not None
    last = 0.0
    for number, batch in enumerate(islice(batches, 6)):
        joint, weight = number % 2 == 0, 1.0 + number
        steps = []
        for trainer.recordings in (recordings, None):
            steps.append(trainer._gradients(batch, joint=joint, area_weight=weight, probe=True))
        replayed, launched = steps
        pairs = [
            *zip(
                replayed.corruption_gradients or (),
                launched.corruption_gradients or (),
                strict=True,
            )
        ]
        pairs += zip(
            replayed.classifier_gradients or (), launched.classifier_gradients or (), strict=True
        )
        assert len(pairs) == len(trainable(trainer.state.corruption)) + joint * len(
            trainable(trainer.state.classifier)
        )
        for one, two in pairs:
            assert float((one - two).norm()) <= 1e-3 * float(two.norm()) + 1e-7
        assert set(replayed.sums) == set(launched.sums)
        for name, value in launched.sums.items():
            near = 1.0 if "correct" in name else 1e-6  # a logit may fall on the other side
            assert float(replayed.sums[name]) == pytest.approx(float(value), rel=1e-3, abs=near)
        now = float(replayed.sums["corruption_loss"])
        assert now != last, "another batch, other weights"
        last = now
        trainer.recordings = recordings
        trainer.adversarial_step(batch)


def test_example_pictures_show_fixed_images_as_their_masks_change(
    small_set: Path, tmp_path: Path
) -> None:
    config = config_for(small_set, output=tmp_path)
    trainer = new_trainer(config)
    trainer.log = TrainingLog(tmp_path, 0)
    trainer.examples = load_examples(config, read_manifest(small_set), CPU)
    for _ in range(4):
        train_epochs(trainer, 1)
        checkpoint(trainer)
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
    stored = trainer.examples.images[3].permute(1, 2, 0).numpy()
    assert (first[6:132:4, 3 * side + 6 : 4 * side : 4, ::-1] == stored).all()


def test_the_summary_tells_each_phase_and_where_it_ended(tmp_path: Path) -> None:
    def interval(step: int, phase: str, **more: float) -> dict:
        timed = {"seconds": 10.0, "images_per_second": 64.0 * step}
        return {"step": step, "phase": phase, "classifier_loss": 1.0, **timed, **more}

    lines = [
        interval(1, "warmup", accuracy=0.5),
        interval(2, "warmup", accuracy=0.6),
        interval(
            4, "adversarial", accuracy=0.5, context_accuracy=0.25, swapped_accuracy=0.35, area=0.3
        ),
        interval(5, "adversarial", accuracy=0.4, area=0.2),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    rows = [text.split() for text in summary(tmp_path).splitlines()[2:]]
    assert rows[0][:6] == ["warmup", "2", "0:20", "96", "0.6", "-"]
    assert rows[1][:8] == ["adversarial", "3", "0:20", "288", "0.4", "-", "0.25", "0.35"]
    assert rows[1][9] == "0.2"


def test_intervals_reach_rays_metrics(tmp_path: Path, small_set: Path) -> None:
    log = TrainingLog(tmp_path, 0, gauges=True)
    log.write({"step": 1, "phase": "warmup", "accuracy": 0.5, "classifier_loss": 2.0})
    log.close()
    assert log.gauges is not None
    assert {gauge.info["name"] for gauge in log.gauges.values()} == {
        "aln_accuracy",
        "aln_classifier_loss",
    }


def test_intervals_reach_mlflow_and_a_resumed_run_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the optional package mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder does without a server
    uri = (tmp_path / "server").as_uri()
    for step in (10, 20):
        log = TrainingLog(tmp_path, step - 10, mlflow=MlflowLog(uri, tmp_path, {"seed": 3}))
        log.write({"step": step, "phase": "warmup", "accuracy": step / 100})
        log.close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name("aln").experiment_id])
    assert [(run.info.status, run.data.params) for run in found] == [("FINISHED", {"seed": "3"})]
    history = client.get_metric_history(found[0].info.run_id, "warmup/accuracy")
    assert [(point.step, point.value) for point in history] == [(10, 0.1), (20, 0.2)]


def test_an_mlflow_server_that_does_not_answer_is_noted_and_training_goes_on(
    tmp_path: Path,
) -> None:
    pytest.importorskip("mlflow", reason="the optional package mlflow is not installed")
    log = TrainingLog(tmp_path, 0, mlflow=MlflowLog("nowhere://x", tmp_path, {}))
    log.write({"step": 1, "phase": "warmup", "accuracy": 0.5})
    log.close()
    written = json.loads((tmp_path / METRICS_NAME).read_text())
    assert written["accuracy"] == 0.5
    assert "MLflow at nowhere://x" in written["notes"][0]
