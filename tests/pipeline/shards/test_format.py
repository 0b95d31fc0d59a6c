import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.shards.format import (
    MANIFEST_NAME,
    Manifest,
    Sample,
    Split,
    check_sizes,
    manifest_to_json,
    read_index,
    read_manifest,
    read_samples,
    split_of,
    write_shard,
)
from tests.pipeline.made_set import pack_shard

HEIGHT, WIDTH = 6, 8


def make_sample(row: int, dtype: type = np.uint8, key: str | None = None) -> Sample:
    rng = np.random.default_rng(row)
    return Sample(
        key=key or f"train-{row:08d}",
        row=row,
        label=row % 3,
        image=rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8),
        segments=np.arange(HEIGHT * WIDTH, dtype=dtype).reshape(HEIGHT, WIDTH) // 4,
        meta={"id": f"ä'{row}", "wnid": "n1", "width": 80, "height": 60, "boxes": [[1, 2, 3, 4]]},
    )


def make_manifest(**changes: Any) -> Manifest:
    split = Split(images=3, rejected=1, shards=(), class_counts=(1, 1, 1))
    manifest = Manifest(
        classes=("a", "b", "c"),
        class_names=("A", "B", "C"),
        height=HEIGHT,
        width=WIDTH,
        image_format="rgb",
        segments_dtype="uint8",
        max_superpixels=12,
        mean=(1.0, 2.0, 3.0),
        std=(4.0, 5.0, 6.0),
        splits={"train": split},
        configuration={"seed": 0},
        versions={"numpy": "2"},
    )
    return dataclasses.replace(manifest, **changes)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: type) -> None:
    samples = [make_sample(row, dtype) for row in (0, 7, 2**40)]
    write_shard(tmp_path / "a.tar", pack_shard(samples, "rgb"))
    manifest = make_manifest(segments_dtype=np.dtype(dtype).name)
    read = list(read_samples(tmp_path / "a.tar", manifest))
    assert len(read) == 3
    for there, wanted in zip(read, samples, strict=True):
        assert np.array_equal(there.image, wanted.image)
        assert np.array_equal(there.segments, wanted.segments)
        assert there.segments.dtype == dtype
        for name in ("key", "row", "label", "meta"):
            assert getattr(there, name) == getattr(wanted, name)


def test_a_shard_is_byte_for_byte_what_tarfile_writes(tmp_path: Path) -> None:
    samples = [make_sample(row, key=f"train-{row:08d}") for row in range(30)]
    samples[3].meta["id"] = "x" * 700  # a member of two blocks
    write_shard(tmp_path / "a.tar", pack_shard(samples, "rgb"))
    buffer = io.BytesIO()
    with (
        tarfile.open(tmp_path / "a.tar") as written,
        tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for member in written:
            info = tarfile.TarInfo(member.name)
            info.size, info.mode = member.size, 0o644
            tar.addfile(info, written.extractfile(member))
    assert (tmp_path / "a.tar").read_bytes() == buffer.getvalue()


def test_the_index_points_at_the_members_bytes(tmp_path: Path) -> None:
    samples = [make_sample(row) for row in range(3)]
    write_shard(tmp_path / "a.tar", pack_shard(samples, "rgb"))
    content = (tmp_path / "a.tar").read_bytes()
    index = read_index(tmp_path / "a.tar", make_manifest())
    for sample, *entries in zip(samples, index.names, index.offsets, index.sizes, strict=True):
        parts = {
            name.split(".")[1]: content[start : start + size]
            for name, start, size in zip(*entries, strict=True)
        }
        assert parts["rgb"] == sample.image.tobytes()
        assert parts["seg"] == sample.segments.tobytes()
        assert parts["cls"] == sample.label.to_bytes(4, "little")
        assert parts["row"] == sample.row.to_bytes(8, "little")
        assert json.loads(parts["json"]) == sample.meta


def test_a_shard_cut_off_or_without_its_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, pack_shard([make_sample(row) for row in range(3)], "rgb"))
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"a\.tar cannot be read"):
        list(read_samples(path, make_manifest()))
    path.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match=r"a\.idx is missing"):
        read_index(path, make_manifest())


def test_the_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(manifest_to_json(make_manifest()))
    assert read_manifest(tmp_path) == make_manifest()


def test_manifests_of_another_version_damaged_or_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text(manifest_to_json(make_manifest(format=99)))
    with pytest.raises(UserError, match="format version 99; this program reads 1"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(tmp_path)


def test_shards_missing_or_of_another_size_are_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "train-000000.tar"
    shard = write_shard(path, pack_shard([make_sample(0)], "rgb"))
    split = Split(images=1, rejected=0, shards=(shard,), class_counts=(1, 0, 0))
    manifest = make_manifest(splits={"train": split})
    check_sizes(tmp_path, manifest, "train")
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes"):
        check_sizes(tmp_path, manifest, "train")
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        split_of(manifest, "test")
