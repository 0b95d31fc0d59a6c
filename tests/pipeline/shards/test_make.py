import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.request import urlopen

import numpy as np
import pyarrow.compute as pc
import pytest
import ray
from PIL import Image

from jobs import cli
from jobs.preprocess.__main__ import summary
from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards import make
from pipeline.shards.format import read_manifest
from pipeline.shards.ledger import read_ledger
from pipeline.shards.make import Outcome, Progress, preprocess
from pipeline.shards.output import claim_output, exclusive_output
from pipeline.shards.plan import Plan, PreprocessConfig, make_plan
from pipeline.shards.shard import make_shard
from pipeline.sources.files import SourceFiles
from pipeline.storage import UnreachableError
from tests import remote
from tests.conftest import run_here
from tests.pipeline.made_set import stored_samples
from tests.pipeline.sources.miniature import xml

CLASSES = ("n00000001", "n00000002", "n00000003")
TRAIN, VAL = 30, 10


def jpeg(seed: int, height: int = 48, width: int = 72) -> bytes:
    buffer = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_source(root: Path, train: int = TRAIN) -> Path:
    """An ILSVRC layout: `train` train images, one of them cut off; VAL val images, two of
    unknown label and one with a bad box."""
    for i in range(train):
        wnid = CLASSES[i % 3]
        (root / "train" / wnid).mkdir(parents=True, exist_ok=True)
        data = jpeg(i)
        (root / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(data[:300] if i == 4 else data)
    for folder in ("val", "boxes"):
        (root / folder).mkdir()
    for i in range(VAL):
        stem = f"ILSVRC2012_val_{i + 1:08d}"
        (root / "val" / f"{stem}.JPEG").write_bytes(jpeg(1000 + i))
        if i < 8:
            x1 = 500 if i == 3 else 40
            text = xml(CLASSES[i % 3], (i, 5, x1, 30), size=None)
            (root / "boxes" / f"{stem}.xml").write_text(text)
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


def configured(source: Path, output: Path, **changes: Any) -> PreprocessConfig:
    values: dict[str, Any] = {
        "source": str(source),
        "output": str(output),
        "image_size": 32,
        "superpixels": 50,
        "samples_per_shard": 8,
        "workers": 2,
        "max_bad_share": 0.2,
    }
    return PreprocessConfig(**(values | changes))


def quiet(progress: Progress) -> None:
    assert progress.resumed + progress.done <= progress.total


def run(source: Path, output: Path, **changes: Any) -> Outcome:
    return preprocess(configured(source, output, **changes), quiet, cli.connect_ray)


def contents(output: Path) -> dict[str, str]:
    """SHA-256 of every file below `output`."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(
    ray_local: None, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    output = tmp_path_factory.mktemp("made") / "shards"
    return output, run(source, output)


def test_every_source_image_is_in_the_ledger_once_and_every_good_one_in_a_shard(
    made: tuple[Path, Outcome], source: Path
) -> None:
    output, _ = made
    manifest = read_manifest(output)
    assert {name: (s.images, s.rejected) for name, s in manifest.splits.items()} == {
        "train": (TRAIN - 1, 1),
        "val": (VAL - 2, 2),
    }
    paths = []
    for split in ("train", "val"):
        table = read_ledger(output, split, status=None).to_pylist()
        paths += [row["path"] for row in table]
        good = {row["row"]: row for row in table if row["status"] == "ok"}
        samples = stored_samples(output, split)
        assert [sample.row for sample in samples] == list(good)
        for sample in samples:
            row = good[sample.row]
            assert sample.key == row["key"] == f"{split}-{sample.row:08d}"
            assert (sample.label, manifest.classes[sample.label]) == (row["label"], row["wnid"])
            assert int(sample.segments.max()) + 1 == row["superpixels"] <= manifest.max_superpixels
            assert sample.meta["boxes"] == row["boxes"]
            assert (row["width"], row["height"]) == (72, 48)
    assert sorted(paths) == sorted(str(x.relative_to(source)) for x in source.rglob("*.JPEG"))


def test_rejected_images_are_recorded_with_their_reason(made: tuple[Path, Outcome]) -> None:
    output, outcome = made
    (bad,) = read_ledger(
        output, "train", ["id", "reason", "label", "shard"], "rejected"
    ).to_pylist()
    assert (bad["id"], bad["label"], bad["shard"]) == ("n00000002_4", 1, None)
    assert bad["reason"].startswith(("damaged JPEG", "cannot be decoded"))
    unknown = read_ledger(output, "val", ["id", "reason", "label"], "rejected").to_pylist()
    assert [x["id"] for x in unknown] == ["ILSVRC2012_val_00000009", "ILSVRC2012_val_00000010"]
    assert all(x["reason"].startswith("label unknown:") and x["label"] is None for x in unknown)
    assert outcome.totals is not None
    assert "2 (2 label unknown)" in summary(outcome)


def test_a_box_over_the_edge_is_clipped_and_noted_and_its_image_kept(
    made: tuple[Path, Outcome],
) -> None:
    output, _ = made
    rows = read_ledger(output, "val", ["boxes", "note"]).to_pylist()
    assert rows[2] == {"boxes": [[2, 5, 40, 30]], "note": None}
    assert rows[3]["boxes"] == [[3, 5, 71, 30]]
    assert rows[3]["note"] == "box 0 clipped to the image: was (3, 5, 500, 30)"


def test_mean_and_deviation_are_those_of_the_train_pixels(made: tuple[Path, Outcome]) -> None:
    output, _ = made
    manifest = read_manifest(output)
    pixels = np.stack([sample.image for sample in stored_samples(output, "train")])
    flat = pixels.reshape(-1, 3).astype(np.float64)
    assert manifest.mean == pytest.approx(flat.mean(axis=0), rel=1e-12)
    assert manifest.std == pytest.approx(flat.std(axis=0), rel=1e-9)
    assert sum(manifest.splits["train"].class_counts) == len(pixels) == TRAIN - 1


def ids(plan: Plan, split: str) -> list[str]:
    tasks = [task for task in plan.tasks if task.split == split]
    return [x for task in tasks for x in plan.images(task)["id"].to_pylist()]


@pytest.mark.parametrize("seed", [0, 3])
def test_train_images_are_in_the_order_of_numpys_permutation_and_val_as_listed(
    source: Path, tmp_path: Path, seed: int
) -> None:
    plan = make_plan(configured(source, tmp_path, seed=seed))
    images = plan.collection.images
    listed = images["train"]["id"].to_pylist()
    order = np.random.default_rng(seed).permutation(TRAIN)
    assert ids(plan, "train") == [listed[i] for i in order]
    assert ids(plan, "val") == sorted(images["val"]["id"].to_pylist())


def test_one_worker_writes_the_same_bytes_as_two(
    made: tuple[Path, Outcome], source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "one", workers=1)
    assert contents(tmp_path / "one") == contents(made[0])


def test_a_finished_set_is_left_alone(made: tuple[Path, Outcome], source: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made[0].rglob("*")}
    outcome = run(source, made[0], workers=1)
    assert outcome.totals is None
    assert outcome.manifest == made[1].manifest
    assert {path: path.stat().st_mtime_ns for path in made[0].rglob("*")} == before


def test_a_finished_set_on_read_only_storage_is_left_alone(
    made: tuple[Path, Outcome], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = Path.open

    def read_only(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open_file(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", read_only)
    assert run(source, made[0]).totals is None


@pytest.mark.usefixtures("ray_local")
def test_only_missing_or_damaged_shards_are_made_again(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    run(source, output)
    wanted = contents(output)
    (output / "train" / "train-000001.tar").unlink()
    (output / "train" / "train-000002.idx").write_text("v1.2 99\n")
    (output / "val" / "val-000000.parquet").write_bytes(b"PAR1")
    (output / "train" / ".train-000003.tar.0a1b.tmp").write_bytes(b"left by a killed task")
    untouched = output / "train" / "train-000000.tar"
    before = untouched.stat().st_mtime_ns
    outcome = run(source, output)
    assert outcome.progress.done == 3 * 8
    assert outcome.progress.resumed == TRAIN + VAL - 3 * 8
    assert contents(output) == wanted
    assert untouched.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"superpixels": 40}, "configuration superpixels: 50 before, 40 now"),
        ({"seed": 3}, "configuration seed: 0 before, 3 now"),
        ({"image_format": "jpg"}, "configuration image_format: rgb before, jpg now"),
    ],
)
def test_another_configuration_on_the_same_output_is_refused(
    made: tuple[Path, Outcome], source: Path, changes: dict[str, Any], difference: str
) -> None:
    with pytest.raises(UserError, match=difference):
        run(source, made[0], **changes)


def test_a_changed_source_on_the_same_output_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", train=6)
    claim_output(make_plan(configured(source, tmp_path / "out")))
    box = source / "boxes" / "ILSVRC2012_val_00000001.xml"
    box.write_text(box.read_text().replace("<xmin>0<", "<xmin>1<"))
    with pytest.raises(UserError, match="files, labels or boxes have changed"):
        claim_output(make_plan(configured(source, tmp_path / "out")))


def test_a_second_driver_on_the_same_output_is_refused(source: Path, tmp_path: Path) -> None:
    claim_output(make_plan(configured(source, tmp_path / "out")))
    with (
        exclusive_output(str(tmp_path / "out")),
        pytest.raises(UserError, match="another process is at work on"),
    ):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("cleans", [False, True])
def test_of_two_plans_that_claim_an_output_at_once_the_second_is_refused(
    source: Path, tmp_path: Path, cleans: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (make_plan(configured(source, tmp_path / "out", seed=seed)) for seed in (0, 1))
    link = Path.hardlink_to

    def link_after_them(path: Path, target: Path) -> None:
        monkeypatch.setattr(Path, "hardlink_to", link)
        claim_output(theirs)
        if cleans:
            with exclusive_output(theirs.output):
                pass
        link(path, target)

    monkeypatch.setattr(Path, "hardlink_to", link_after_them)
    with pytest.raises(UserError, match="seed: 1 before, 0 now"):
        claim_output(ours)
    claim_output(theirs)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_uri_that_another_plan_claims_during_the_job_gets_no_manifest(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "run_tasks", run_here)
    monkeypatch.setattr(make, "metrics", Mock())
    source = write_source(tmp_path / "source", train=3)
    config = replace(configured(source, tmp_path), output=remote.uri(s3_endpoint, "claimed"))

    def claim() -> None:
        fingerprint = make_plan(replace(config, seed=1)).fingerprint
        storage.write_atomically(
            storage.join(config.output, "plan.json"), json.dumps(fingerprint).encode()
        )

    with pytest.raises(UserError, match="seed: 1 before, 0 now"):
        preprocess(config, quiet, claim)
    assert storage.entries(config.output)[1].keys() == {"plan.json"}


def test_outputs_that_are_not_ours_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no plan\.json"):
        claim_output(make_plan(configured(source, tmp_path)))
    with pytest.raises(UserError, match="lies inside source"):
        make_plan(configured(source, source / "train" / "shards"))
    with pytest.raises(UserError, match="is a file"):
        claim_output(make_plan(configured(source, tmp_path / "letters")))


@pytest.mark.usefixtures("ray_local")
def test_too_many_rejected_images_fail_the_job_and_keep_the_ledger(
    source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    message = r"3 of 40 images were rejected \(2 x label unknown, 1 x .* 0\.01 that is allowed"
    with pytest.raises(UserError, match=message):
        run(source, output, max_bad_share=0.01)
    assert not (output / "dataset.json").exists()
    assert read_ledger(output, "val", status="rejected").num_rows == 2
    outcome = run(source, output, max_bad_share=0.1)  # more allowed: nothing is made again
    assert (outcome.progress.done, outcome.progress.resumed) == (0, TRAIN + VAL)
    assert read_manifest(output).splits["train"].rejected == 1


@pytest.mark.usefixtures("ray_local")
def test_repaired_images_are_taken_up_by_the_same_command(source: Path, tmp_path: Path) -> None:
    copy, output = tmp_path / "images", tmp_path / "shards"
    shutil.copytree(source, copy)
    good = sorted((copy / "train").rglob("*.JPEG"))[:2]
    kept = [path.read_bytes() for path in good]
    for path in good:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="were rejected"):
        run(copy, output, max_bad_share=0.1)
    for path, content in zip(good, kept, strict=True):
        path.write_bytes(content)
    run(copy, output, max_bad_share=0.1)
    run(copy, tmp_path / "fresh", max_bad_share=0.1)
    assert contents(output) == contents(tmp_path / "fresh")


@pytest.mark.usefixtures("ray_local")
def test_a_shard_that_fails_is_named_and_the_others_finish(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    blocked = output / "train" / "train-000001.tar"
    claim_output(make_plan(configured(source, output)))
    blocked.mkdir()
    with pytest.raises(UserError, match=r"1 of 6 shards failed, train-000001: IsADirec"):
        run(source, output)
    assert len(list(output.rglob("*.parquet"))) == 5
    blocked.rmdir()
    assert run(source, output).progress.done == 8


def test_a_shard_of_nothing_but_rejected_images_leaves_only_its_ledger(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "cat").mkdir(parents=True)
    (source / "cat" / "a.jpg").write_bytes(b"")
    (source / "cat" / "b.png").write_bytes(b"text")
    (source / "cat" / "c.png").symlink_to(tmp_path / "nowhere")
    config = configured(source, tmp_path / "out")
    plan = make_plan(config)
    facts = make_shard(plan.tasks[0], plan.images(plan.tasks[0]), plan.source, plan.output, config)
    assert facts.images == 0
    assert [x.name for x in (tmp_path / "out" / "train").iterdir()] == ["train-000000.parquet"]


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("source not mounted", UnreachableError),
        ("folder of a link not mounted", FileNotFoundError),
        ("access denied", PermissionError),
        ("files deleted", None),
    ],
)
def test_a_host_that_sees_no_image_of_a_shard_fails_it_where_missing_files_are_rejected(
    state: str, error: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, far = tmp_path / "source", tmp_path / "far"
    for folder in (source / "train" / "cat", source / "val" / "cat", far):
        folder.mkdir(parents=True)
    for i in range(2):
        (far / f"{i}.jpg").write_bytes(jpeg(i))
        (source / "train" / "cat" / f"{i}.jpg").symlink_to(far / f"{i}.jpg")
    (source / "val" / "cat" / "0.jpg").write_bytes(jpeg(0))
    (far / "another").touch()
    config = configured(source, tmp_path / "out")
    plan = make_plan(config)
    if state == "access denied":
        denied = Mock(side_effect=PermissionError(errno.EACCES, "denied", "0.jpg"))
        monkeypatch.setattr(SourceFiles, "read", denied)
    elif state == "files deleted":
        for i in range(2):
            (far / f"{i}.jpg").unlink()
    else:
        emptied = source if state == "source not mounted" else far
        emptied.rename(tmp_path / "away")
        emptied.mkdir()
    task, arguments = plan.tasks[0], (plan.source, plan.output, config)
    if error is None:
        assert make_shard(task, plan.images(task), *arguments).images == 0
        return
    with pytest.raises(error, match=f" on host {socket.gethostname()}"):
        make_shard(task, plan.images(task), *arguments)
    assert not list(tmp_path.rglob("train-000000.*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 31}, "image_size 31 is out of range; allowed: 32 to 512"),
        ({"image_size": "64x600"}, "image_size 64x600 is out of range; allowed: 32 to 512, or two"),
        ({"image_size": "64x"}, "image_size 64x is out of range"),
        ({"superpixels": 257}, "at most 256; ask for fewer superpixels or larger images"),
        ({"image_format": "png"}, "image_format png is out of range; allowed: rgb or jpg"),
        ({"workers": 0}, "workers 0 is out of range; allowed: from 1"),
        ({"max_bad_share": float("nan")}, "max_bad_share nan is out of range"),
    ],
)
def test_parameters_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(Path("a"), Path("b"), **changes)


@pytest.mark.slow
def test_the_dashboard_counts_images_rejects_and_shards(
    made: tuple[Path, Outcome], source: Path, tmp_path: Path
) -> None:
    """Of all jobs of this process, read where Prometheus would."""

    def counts() -> dict[str, float]:
        with urlopen(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        # Drivers that were killed on this Ray in other tests are still counted, apart.
        driver = f'WorkerId="{ray.get_runtime_context().get_worker_id()}"'
        own = "\n".join(line for line in lines if driver in line)
        found = re.findall(r"^ray_preprocess_(\w+?)\{.*\} (\S+)$", own, re.MULTILINE)
        return {name.removesuffix("_total"): float(value) for name, value in found}

    def wait_for(wanted: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        deadline = time.monotonic() + 30
        while not wanted(found := counts()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def added() -> dict[str, float]:
        before = wait_for(lambda found: found.get("images_to_do") == 0 and "rejected" in found)
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        run(source, tmp_path / "again")
        after = wait_for(lambda found: found.get("shards") == before.get("shards", 0) + 6)
        return {name: value - before.get(name, math.nan) for name, value in after.items()}

    expected = {"images": float(TRAIN + VAL), "shards": 6.0, "rejected": 3.0, "images_to_do": 0.0}
    # Ray at times stops to export a driver's numbers for a while, seen on a loaded machine.
    assert expected in (added() for _ in range(3))


def test_tiny_imagenet_is_read_whole(tiny_imagenet: Path, tmp_path: Path) -> None:
    config = configured(tiny_imagenet, tmp_path / "out", image_size=64, samples_per_shard=200)
    plan = make_plan(config)
    assert plan.collection.layout == "tiny-imagenet"
    assert len(plan.collection.classes) == 20
    assert plan.collection.class_names[0] == "goldfish, Carassius auratus"
    assert {split: len(x) for split, x in plan.collection.images.items()} == {
        "train": 10_000,
        "val": 1000,
    }
    for images in plan.collection.images.values():
        assert pc.all(pc.equal(pc.list_value_length(images["boxes"]), 1)).as_py()
    val = next(task for task in plan.tasks if task.split == "val")
    facts = make_shard(val, plan.images(val), plan.source, plan.output, config)
    assert facts.images == 200
