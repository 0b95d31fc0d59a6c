"""What jobs.train checks before anything starts."""

import json
import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.cli import record
from jobs.runs import exclusive_run
from jobs.train.__main__ import train
from jobs.train.checkpoints import write_checkpoint
from jobs.train.checks import (
    check_data,
    check_own,
    check_same_data,
    check_warmup,
    claimed_output,
    describe_run,
)
from jobs.train.config import ResourcesConfig, TrainConfig
from jobs.train.launch import check_resources
from pipeline.errors import UserError
from pipeline.loading.cache import GIB, cached_bytes
from pipeline.shards.format import read_manifest
from tests.jobs.test_runs import some_tensors
from tests.jobs.train.small import config_for


@pytest.fixture
def copy(small_set: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_set, tmp_path / "shards")


def claim(config: TrainConfig) -> dict[str, Any]:
    manifest = read_manifest(config.loading.data)
    with claimed_output(config.output, describe_run(config, manifest, record(config))) as run:
        return run


def check(config: TrainConfig) -> None:
    check_data(config, read_manifest(config.loading.data))


def test_another_configuration_on_the_same_output_is_refused(
    small_set: Path, copy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    claim(config_for(small_set, output=run))
    claim(config_for(small_set, output=run, workers="3:5", log_interval=7))
    for name, value, message in (
        ("seed", 9, r"seed \(there 0, now 9\)"),
        ("batch_size", 32, r"batch_size \(there 16, now 32\)"),
        ("translation", 0.1, r"translation \(there 0.0, now 0.1\)"),
    ):
        with pytest.raises(UserError, match=f"another configuration: {message}"):
            claim(config_for(small_set, output=run, **{name: value}))
    claim(config_for(copy, output=run))
    (copy / "dataset.json").write_text((copy / "dataset.json").read_text() + " ")
    with pytest.raises(UserError, match=r"the data set \(its dataset\.json is another\)"):
        claim(config_for(copy, output=run))


def test_workers_that_outlive_their_run_write_no_more_and_leave_nothing_to_go_on_from(
    small_set: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = config_for(small_set, output=run)
    before = claim(config)
    assert claim(config) == before
    check_own(str(run), before)
    shutil.rmtree(run)
    with pytest.raises(UserError, match=r"run\.json is not this training's any more"):
        check_own(str(run), before)
    now = claim(config)
    check_own(str(run), now)
    with pytest.raises(UserError, match=r"run\.json is not this training's any more"):
        check_own(str(run), before)
    write_checkpoint(run, 7, some_tensors(), {}, keep=2)
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=r"run holds checkpoints but no run\.json"):
        claim(config)


def test_a_host_with_another_set_at_that_place_is_named(small_set: Path, copy: Path) -> None:
    run = claim(config_for(copy))
    check_same_data(str(small_set), run)
    (copy / "dataset.json").write_text((copy / "dataset.json").read_text() + " ")
    with pytest.raises(UserError, match=rf"^host {platform.node()} finds another set at {copy}"):
        check_same_data(str(copy), run)


def test_a_run_of_an_earlier_version_is_refused(small_set: Path, tmp_path: Path) -> None:
    content = {"configuration": {"net_width": 8, "residual_blocks": 0}, "data_sha256": ""}
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"run\.json is of format 1; .* another --output"):
        claim(config_for(small_set, output=tmp_path))
    with pytest.raises(UserError, match=r"run\.json is of format 1"):
        check_warmup(config_for(small_set, warmup_from=tmp_path), read_manifest(small_set))


@pytest.mark.parametrize(
    "content",
    ["", '{"format": 2, "conf', "[]", '{"format": 2}', '{"format": 2, "configuration": 3}'],
)
def test_a_damaged_run_json_is_named(content: str, small_set: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json is damaged .* another --output"):
        claim(config_for(small_set, output=tmp_path))


def test_two_trainings_in_one_folder_are_refused_before_ray_starts(
    small_set: Path, tmp_path: Path
) -> None:
    config = config_for(small_set, output=tmp_path)
    with exclusive_run(tmp_path):
        for start in (train, claim):
            with pytest.raises(UserError, match="another process trains in"):
                start(config)


def test_what_no_worker_could_do_is_refused_before_the_folder_is_claimed(
    small_set: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    claim(config_for(small_set, output=tmp_path / "warmup"))
    refused: list[tuple[dict[str, object], str]] = [
        ({"workers": "17"}, "64 images in batches of 16 cannot give each of 17 workers an image"),
        ({"workers": "2:17"}, "each of 17 workers"),
        ({"warmup_from": tmp_path / "warmup"}, "holds no checkpoint past its warm-up"),
    ]
    if not torch.cuda.is_available():
        refused.append(({"device": "cuda"}, "--device cuda: torch finds no CUDA device"))
    for changes, message in refused:
        with pytest.raises(UserError, match=message):
            train(config_for(small_set, output=run, **changes))
    assert not run.exists()


def test_a_warm_up_on_other_images_or_of_other_nets_is_refused_one_on_other_superpixels_taken(
    small_set: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(small_set)
    claim(config_for(small_set, output=tmp_path / "source"))
    write_checkpoint(tmp_path / "source", 8, {}, {"clean_accuracy": 0.5}, keep=2)
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
    for changes, message in (
        ({"net_width": 16}, r"has --net-width 8, not 16"),
        ({"residual_blocks": 2}, r"has --residual-blocks 0, not 2"),
        ({"warmup_from": tmp_path}, r"holds no run\.json"),
    ):
        options = {"warmup_from": tmp_path / "source"} | changes
        with pytest.raises(UserError, match=message):
            check_warmup(config_for(small_set, **options), manifest)


def test_a_remote_set_beyond_the_cache_is_shuffled_in_windows_that_a_run_keeps(
    remote_set: str, tmp_path: Path
) -> None:
    manifest = read_manifest(remote_set)
    whole = config_for(remote_set, output=tmp_path / "run")
    assert whole.loading.window(manifest) is None  # all shards fit into the cache
    size = sum(cached_bytes(shard) for shard in manifest.splits["train"].shards)
    tight = config_for(remote_set, output=tmp_path / "run", cache_limit=size * 0.9 / GIB)
    assert tight.loading.window(manifest) == 1
    claim(whole)
    claim(whole)
    with pytest.raises(UserError, match=r"there all, now 1, which follows from --cache-limit"):
        claim(tight)


def test_a_cache_too_small_for_the_workers_is_refused_before_a_run_begins(
    remote_set: str, tmp_path: Path
) -> None:
    size = sum(cached_bytes(shard) for shard in read_manifest(remote_set).splits["train"].shards)
    for workers, limit in (("1", 0.97), ("2", 0.97), ("1:2", 0.97), ("2", 1.0)):
        config = config_for(
            remote_set, output=tmp_path / "run", workers=workers, cache_limit=limit * size / GIB
        )
        if workers == "1" or limit == 1:
            check(config)
            continue
        with pytest.raises(UserError, match=r"too small: 4 shards .* are needed at once"):
            train(config)
        assert not (tmp_path / "run").exists()


def test_more_workers_than_cores_are_refused_instead_of_waited_for(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_resources(ResourcesConfig(workers="2:12"))
    with pytest.raises(UserError, match="--workers 12 asks for as many CPUs, this machine has 2"):
        check_resources(ResourcesConfig(workers="12"))


def test_shards_that_are_missing_or_of_another_format_are_named(copy: Path) -> None:
    with pytest.raises(UserError, match="no finished set of shards"):
        train(config_for(copy / "nowhere"))
    (copy / "train" / "train-000002.tar").unlink()
    with pytest.raises(UserError, match=r"train-000002\.tar is missing"):
        train(config_for(copy))
    manifest = json.loads((copy / "dataset.json").read_text()) | {"format": 99}
    (copy / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="format version 99; this program reads 1"):
        train(config_for(copy))
    assert not (copy.parent / "run").exists()


def test_damaged_shards_are_named_before_training_starts(copy: Path, small_set: Path) -> None:
    check(config_for(copy))
    (copy / "train" / "train-000001.idx").write_text("")
    with pytest.raises(UserError, match=r"train-000001\.idx"):
        check(config_for(copy))
    manifest = json.loads((copy / "dataset.json").read_text())
    shutil.copy(small_set / "train" / "train-000001.idx", copy / "train")
    (copy / "dataset.json").write_text(json.dumps(manifest | {"height": 40}))
    with pytest.raises(UserError, match="multiples of 16"):
        check(config_for(copy))


def test_a_changed_byte_is_found_where_every_byte_is_asked_for(copy: Path) -> None:
    shard = copy / "train" / "train-000002.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # a pixel of the first image
    shard.write_bytes(content)
    check(config_for(copy))
    with pytest.raises(UserError, match=r"train-000002\.tar has SHA-256 "):
        check(config_for(copy, verify_shards=True))


def test_a_target_that_chance_reaches_is_refused(small_set: Path) -> None:
    with pytest.raises(UserError, match=r"0\.1 is not above chance for 8 classes \(0\.125\)"):
        check(config_for(small_set, target=0.1))
