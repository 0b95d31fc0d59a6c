import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli import parse
from jobs.inspect.__main__ import InspectConfig, load, main
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
    flags = "--data s3://b/d --min-crop-area .5 --max-crop-aspect 1.5 --no-flip --translation .1 "
    flags += "--cache /c --cache-limit .5"
    changed = parse(LoadingConfig, flags.split(), "")
    assert changed.augmentation() == Augmentation(
        min_area=0.5, max_aspect=1.5, flip=False, translation=0.1
    )
    assert changed.cache_config() == CacheConfig(folder=Path("/c"), limit_bytes=2**29)


def test_pictures_are_of_the_batches_that_training_gets(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--data {small_set} --output {tmp_path / 'out'} --batch-size 16 --seconds 0.1"
    main([*flags.split(), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    pictures = [Path(line.removeprefix("picture: ")) for line in lines[:2]]
    assert [path.name for path in pictures] == ["train-batch-0.png", "train-batch-1.png"]
    assert re.fullmatch(r"rate: [\d,]+ images/s into cpu memory, of \d+ images", lines[2])
    stream = load(config(small_set, tmp_path), read_manifest(small_set))
    for path, batch in zip(pictures, stream, strict=False):
        drawn = np.asarray(Image.open(path))
        first = batch.images[0].permute(1, 2, 0).numpy()
        left, top = GAP, TITLE + GAP
        assert np.array_equal(drawn[top : top + 7 * 32 : 7, left : left + 7 * 32 : 7], first)


def test_what_cannot_be_shown_is_one_line(small_set: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for data, output, message in (
        (small_set, tmp_path / "file", "is a file"),
        (tmp_path, tmp_path, "no finished set"),
    ):
        with pytest.raises(UserError, match=message):
            main(["--data", str(data), "--output", str(output)])
