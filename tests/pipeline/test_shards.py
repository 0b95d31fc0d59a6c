import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from pipeline.shards import (
    CARD_NAME,
    Card,
    DataError,
    Sample,
    Split,
    card_to_json,
    pack_shard,
    read_card,
    read_index,
    read_shard,
    sha256_file,
    shard_paths,
    split_of,
    write_atomically,
    write_shard,
)

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


def make_card(**changes: Any) -> Card:
    split = Split(images=3, rejected=1, shards=(), class_counts=(1, 1, 1))
    card = Card(
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
    return dataclasses.replace(card, **changes)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: type) -> None:
    samples = [make_sample(row, dtype) for row in (0, 7, 2**40)]
    write_shard(tmp_path / "a.tar", pack_shard(samples, "rgb"))
    card = make_card(segments_dtype=np.dtype(dtype).name)
    read = list(read_shard(tmp_path / "a.tar", card))
    assert len(read) == 3
    for there, wanted in zip(read, samples, strict=True):
        assert np.array_equal(there.image, wanted.image)
        assert np.array_equal(there.segments, wanted.segments)
        assert there.segments.dtype == dtype
        for name in ("key", "row", "label", "meta"):
            assert getattr(there, name) == getattr(wanted, name)


def test_jpeg_samples_come_back_nearly_the_same(tmp_path: Path) -> None:
    flat = dataclasses.replace(make_sample(1), image=np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    write_shard(tmp_path / "a.tar", pack_shard([flat], "jpg"))
    (read,) = read_shard(tmp_path / "a.tar", make_card(image_format="jpg"))
    assert np.abs(read.image.astype(int) - 90).max() <= 2


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    shards = [
        write_shard(tmp_path / f"{n}.tar", pack_shard([make_sample(0), make_sample(1)], "rgb"))
        for n in "ab"
    ]
    assert shards[0].sha256 == shards[1].sha256 == sha256_file(tmp_path / "b.tar")
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    assert shards[0].bytes == (tmp_path / "a.tar").stat().st_size
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.idx", "a.tar", "b.idx", "b.tar"]


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
    for sample, members in zip(samples, read_index(tmp_path / "a.tar"), strict=True):
        parts = {name: content[start : start + size] for name, (start, size) in members.items()}
        assert parts["rgb"] == sample.image.tobytes()
        assert parts["seg"] == sample.segments.tobytes()
        assert parts["cls"] == sample.label.to_bytes(4, "little")
        assert parts["row"] == sample.row.to_bytes(8, "little")
        assert json.loads(parts["json"]) == sample.meta


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    samples = [make_sample(row) for row in range(3)]
    write_shard(tmp_path / "a.tar", pack_shard(samples, "rgb"))
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [x["__key__"] for x in read] == [x.key for x in samples]
    assert [x["rgb"] for x in read] == [x.image.tobytes() for x in samples]
    assert [x["seg"] for x in read] == [x.segments.tobytes() for x in samples]


@pytest.mark.parametrize("key", ["a.b", "a/b", "a" * 91])
def test_a_key_that_readers_would_split_is_refused(key: str) -> None:
    with pytest.raises(DataError, match="holds a dot or slash"):
        pack_shard([make_sample(0, key=key)], "rgb")


def test_a_shard_cut_off_or_without_its_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, pack_shard([make_sample(row) for row in range(3)], "rgb"))
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(DataError, match="cut off"):
        read_index(path)
    with pytest.raises(DataError, match="cannot be read"):
        list(read_shard(path, make_card()))
    path.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"a\.idx is missing"):
        read_index(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_card_comes_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / CARD_NAME).write_text(card_to_json(make_card()))
    assert read_card(tmp_path) == make_card()


def test_cards_of_another_version_damaged_or_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no dataset\.json"):
        read_card(tmp_path)
    (tmp_path / CARD_NAME).write_text(card_to_json(make_card(format=99)))
    with pytest.raises(DataError, match="format version 99; this program reads 1"):
        read_card(tmp_path)
    (tmp_path / CARD_NAME).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        read_card(tmp_path)


def test_shards_missing_or_of_another_size_are_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "train-000000.tar"
    shard = write_shard(path, pack_shard([make_sample(0)], "rgb"))
    split = Split(images=1, rejected=0, shards=(shard,), class_counts=(1, 0, 0))
    card = make_card(splits={"train": split})
    assert shard_paths(tmp_path, card, "train") == [path]
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="has 5 bytes"):
        shard_paths(tmp_path, card, "train")
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        split_of(card, "test")
