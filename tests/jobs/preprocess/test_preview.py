import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.pictures import CAPTION, GAP, TITLE
from jobs.preprocess.__main__ import unread_lines
from jobs.preprocess.preview import write_previews
from pipeline import storage
from pipeline.shards.format import Manifest, read_manifest, read_samples
from tests import remote


def test_the_picture_has_samples_of_all_shards_with_their_boxes(
    small_set: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_set, tmp_path / "set")
    for path in tmp_path.rglob("preview.jpg"):
        path.unlink()
    manifest = read_manifest(small_set)
    train, _ = write_previews(str(tmp_path / "set"), manifest)
    assert write_previews(str(tmp_path / "set"), manifest) == []
    picture = np.asarray(Image.open(train)).astype(int)
    everything = [
        sample
        for shard in manifest.splits["train"].shards
        for sample in read_samples(small_set / "train" / shard.name, manifest)
    ]
    chosen = np.sort(np.random.default_rng(0).permutation(len(everything))[:24])
    for number in (0, 23):
        sample = everything[chosen[number]]
        y = TITLE + GAP + number // 4 * (224 + CAPTION + GAP)
        x = GAP + number % 4 * (2 * 224 + 4 + GAP)
        ours = picture[y : y + 224, x : x + 224]
        plain = sample.image.repeat(7, 0).repeat(7, 1)
        differing = np.abs(ours - plain).max(axis=2) > 60
        rows, columns = np.nonzero(differing)
        boxes = np.array(sample.meta["boxes"])
        scale = 224 / np.array([sample.meta["width"], sample.meta["height"]])
        assert columns.min() == pytest.approx(boxes[:, 0].min() * scale[0], abs=9)
        assert rows.max() == pytest.approx((boxes[:, 3].max() + 1) * scale[1], abs=9)


def test_a_remote_sets_picture_is_that_of_the_local_one(
    small_set: Path, remote_set: str, s3_endpoint: str, tmp_path: Path
) -> None:
    manifest = read_manifest(small_set)
    shutil.copytree(small_set, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("preview.jpg"):
        path.unlink()
    location = remote.upload(tmp_path, s3_endpoint, "previewed")
    pages = write_previews(location, manifest)
    local = write_previews(str(tmp_path), manifest)
    assert len(pages) == 2
    assert [storage.read_bytes(page) for page in pages] == [Path(x).read_bytes() for x in local]


def test_files_that_are_not_read_have_a_line_by_reason(small_set: Path) -> None:
    unread = {"suffix .txt: not an image's": {"files": 1, "examples": ["dog/<i>.txt"]}}
    manifest = Manifest(**{**vars(read_manifest(small_set)), "unread": unread})
    assert unread_lines(manifest) == ["not read: 1 x suffix .txt: not an image's, as dog/<i>.txt"]
