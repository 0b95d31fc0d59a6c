import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.cli import parse
from jobs.inspect.__main__ import (
    InspectConfig,
    class_mix,
    count_superpixels,
    inspect,
    load,
    summary,
)
from jobs.loading import LoadingConfig
from jobs.pictures import GAP, TITLE
from pipeline.errors import UserError
from pipeline.loading.augmentation import Augmentation
from pipeline.loading.cache import CacheConfig
from pipeline.shards.format import read_manifest


def config(data: Path, output: Path, **changes: object) -> InspectConfig:
    settings = {"batch_size": 16, "seconds": 0.1, "device": "cpu"} | changes
    return InspectConfig(data=str(data), output=output, **settings)  # type: ignore[arg-type]


def test_flags_give_the_augmentation_and_its_own_defaults() -> None:
    plain = parse(LoadingConfig, ["--data", "s3://sets/a"], "")
    assert plain.augmentation() == Augmentation()
    assert plain.cache_config().limit_bytes == 100 * 2**30
    flags = "--data d --min-crop-area .5 --max-crop-aspect 1.5 --no-flip --translation .1 "
    flags += "--brightness .2 --contrast .3 --saturation .4 --cache /c --cache-limit .5"
    changed = parse(LoadingConfig, flags.split(), "")
    assert changed.augmentation() == Augmentation(
        min_area=0.5,
        max_aspect=1.5,
        flip=False,
        translation=0.1,
        brightness=0.2,
        contrast=0.3,
        saturation=0.4,
    )
    assert changed.cache_config() == CacheConfig(folder=Path("/c"), limit_bytes=2**29)


@pytest.mark.parametrize(
    "flags",
    ["--min-crop-area 0", "--translation 1", "--cache-limit 0", "--batches 0", "--device tpu"],
)
def test_values_out_of_range_are_a_usage_error(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(InspectConfig, ["--data", "d", "--output", "o", *flags.split()], "")
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_superpixels_are_counted_per_image() -> None:
    segments = torch.tensor([[[0, 0], [5, 0]], [[3, 1], [2, 9]], [[7, 7], [7, 7]]])
    assert count_superpixels(segments).tolist() == [2, 4, 1]


def test_the_expected_class_mix_is_that_of_random_draws() -> None:
    labels = [np.array([0, 0, 1]), np.array([2, 2, 2])]
    distinct, expected = class_mix(labels, np.array([50, 25, 25]))
    assert distinct == 1.5
    assert expected == pytest.approx(1 - 0.5**3 + 2 * (1 - 0.75**3))


def test_pictures_and_figures_are_of_the_batches_that_training_gets(
    small_set: Path, tmp_path: Path
) -> None:
    settings = config(small_set, tmp_path / "out")
    content = inspect(settings)
    manifest = read_manifest(small_set)
    assert json.loads((tmp_path / "out" / "inspection.json").read_text()) == content
    assert content["steps_per_epoch"] == 4
    assert content["images"] == 64
    assert content["batch"]["images"] == {"shape": [16, 3, 32, 32], "dtype": "uint8"}
    assert content["batch"]["segments"] == {"shape": [16, 32, 32], "dtype": "int64"}
    assert content["rate"]["images_per_second"] > 0
    assert content["label_counts"].keys() == set(manifest.classes)
    assert sum(content["label_counts"].values()) == 32 + content["rate"]["images"]
    low, mean, high = (content["superpixels"][name] for name in ("min", "mean", "max"))
    assert 1 <= low <= mean <= high <= manifest.max_superpixels
    assert content["pictures"] == ["train-batch-0.png", "train-batch-1.png"]

    stream = load(settings, manifest)
    for name, batch in zip(content["pictures"], stream, strict=False):
        drawn = np.asarray(Image.open(tmp_path / "out" / name))
        first = batch.images[0].permute(1, 2, 0).numpy()
        left, top = GAP, TITLE + GAP
        assert np.array_equal(drawn[top : top + 7 * 32 : 7, left : left + 7 * 32 : 7], first)
    text = summary(content, manifest)
    assert "16 x 3 x 32 x 32" in text
    assert "images/s" in text


def test_other_splits_are_shown_as_they_are_stored(small_set: Path, tmp_path: Path) -> None:
    content = inspect(config(small_set, tmp_path, split="val", batches=5))
    assert content["steps_per_epoch"] == 2
    assert content["pictures"] == ["val-batch-0.png", "val-batch-1.png"]
    assert content["images"] == 24


def test_what_cannot_be_shown_is_one_line(small_set: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        inspect(config(small_set, tmp_path / "file"))
    with pytest.raises(UserError, match="has no split 'test'"):
        inspect(config(small_set, tmp_path, split="test"))
    with pytest.raises(UserError, match="no finished set"):
        inspect(config(tmp_path, tmp_path))
