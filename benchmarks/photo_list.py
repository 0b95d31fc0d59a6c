"""List public photographs of ILSVRC for `jobs.preprocess`: a CSV of paths, labels, splits, boxes.

Images named ILSVRC2012_val_* are the split val, wherever they lie; all others are train.
"""

import csv
import gzip
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs import cli
from jobs.cli import option
from pipeline.errors import UserError

VAL = "ILSVRC2012_val_"
COLUMNS = ("path", "label", "split", "x0", "y0", "x1", "y1", "width", "height")


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Which images are listed."""

    folders: tuple[Path, ...] = option(
        help="folders of images named WNID_*.JPEG or in folders named by wnid", positional=True
    )
    truth: Path = option(
        help="folder of class_labels.txt.gz, image_sizes.txt.gz and localization.txt.gz of val"
    )
    output: Path = option(help="the CSV")
    per_class: int = option(300, low=1, help="train images of each class and folder, at most")
    parity: int = option(0, low=0, high=1, help="of the ids of val images: 0 even, 1 odd")
    seed: int = option(0, low=0, help="of the choice of train images")


def _rows(truth: Path, name: str) -> Iterator[list[str]]:
    with gzip.open(truth / f"{name}.txt.gz", "rt") as file:
        yield from (line.strip().split(",") for line in file)


def _wnid(path: Path) -> str:
    return path.parent.name if path.parent.name[1:].isdigit() else path.name.partition("_")[0]


def list_photos(config: ListConfig) -> list[tuple[str, ...]]:
    """Return the lines of the CSV. Raises UserError where a val image has no label."""
    train: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    val: dict[str, Path] = {}
    for folder in config.folders:
        for path in sorted(folder.resolve().rglob("*.JPEG")):
            if not path.name.startswith(VAL):
                train[folder, _wnid(path)].append(path)
            elif int(path.stem.removeprefix(VAL)) % 2 == config.parity:
                val.setdefault(path.name, path)
    lines: list[tuple[str, ...]] = []
    for (_, wnid), paths in train.items():
        random.Random(config.seed).shuffle(paths)
        empty = ("",) * 6
        lines += [(str(path), wnid, "train", *empty) for path in paths[: config.per_class]]
    wnids = sorted({wnid for _, wnid in train})
    sizes = {Path(name).name: size for name, *size in _rows(config.truth, "image_sizes")}
    labels = {Path(name).name: int(label) for name, label in _rows(config.truth, "class_labels")}
    if len(wnids) != len(set(labels.values())):
        raise UserError(
            f"the train images have {len(wnids)} classes and the labels of val more; list a folder "
            "with an image of each class"
        )
    for name, *box in _rows(config.truth, "localization"):
        name = Path(name).name
        if name in val:
            lines.append((str(val[name]), wnids[labels[name]], "val", *box, *sizes[name]))
    return lines


def main() -> None:
    config = cli.parse(ListConfig, None, __doc__ or "")
    lines = list_photos(config)
    with config.output.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *lines])
    counts = {
        split: len({line[0] for line in lines if line[2] == split}) for split in ("train", "val")
    }
    print(f"{config.output}: {counts['train']} train and {counts['val']} val images")


if __name__ == "__main__":
    cli.run(main)
