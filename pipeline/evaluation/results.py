"""The files of an evaluation: written by the evaluator, read by whatever shows or compares them.

    metrics.json         what was evaluated, and the figures of each row of the table
    predictions.parquet  the box of each image by each map and rule, and how it fits
    images.parquet       the images: ids, labels, sizes, true boxes, predicted classes
    maps/NNNNNN.parquet  the main map of each image, 8 bits a pixel

metrics.json is written last: where it is, the others are whole. docs/formats.md describes the
columns and figures.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.storage import MissingError, entries, join, open_input, read_bytes, write_atomically

FORMAT = 2
METRICS_NAME = "metrics.json"
PREDICTIONS_NAME = "predictions.parquet"
IMAGES_NAME = "images.parquet"
MAPS_NAME = "maps"
NEW_MAPS_NAME = "maps.new"  # until all of them are there
MAPS_TOGETHER = 64  # maps that are read at once, where one of them is asked for

Figures = dict[str, Any]  # by name, see pipeline/evaluation/metrics.py: figures


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table. map: "aln", "cam", "layercam", "gradient", "lrp", "mean map", "whole
    image", "centred box", or "given". rule: a name of model.localization.RULES, None for boxes that
    come from no map. classes: a name of CLASSES, or None."""

    map: str
    rule: str | None = None
    classes: str | None = None


CLASSES = {
    "clean": "the classifier trained on clean images",
    "co-trained": "the classifier trained against the masks",
    "network": "the evaluated network",
    "file": "the classes in the given file",
    "boxes": "the classes that the given boxes are named with",
}


@dataclass(frozen=True, kw_only=True)
class RowFigures:
    """The figures of one row. paper: "metric1" and "metric2" of the paper's Table 1, or None.
    figures: over all images. interval: [low, high] by figure. curves: see metrics.curves. subsets:
    figures of each of metrics.SUBSETS."""

    row: Row
    title: str
    paper: dict[str, float | None] | None
    figures: Figures
    interval: dict[str, list[float] | None]
    curves: dict[str, Any]
    subsets: dict[str, Figures]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation that was read. metrics: the content of metrics.json without its rows."""

    folder: Path | str
    metrics: dict[str, Any]
    rows: tuple[RowFigures, ...]

    def predictions(self, map: str, rule: str | None) -> pa.Table:
        """Return the lines of predictions.parquet of one map and rule, a line per image in
        order."""
        table = pq.read_table(self._open(PREDICTIONS_NAME), filters=[("map", "=", map)])
        same = pc.is_null(table["rule"]) if rule is None else pc.equal(table["rule"], rule)
        return table.filter(same)

    def images(self) -> pa.Table:
        """Return images.parquet, a line per image in order."""
        return pq.read_table(self._open(IMAGES_NAME))

    def maps(self, images: Iterable[int]) -> dict[int, np.ndarray]:
        """Read the main maps of some images: uint8 [H, W] by image, without those that have none.
        255 stands for 1 in ALN's and given maps; another map is stretched from 0 to 255."""
        wanted = sorted(set(images))
        maps: dict[int, np.ndarray] = {}
        names = sorted(entries(join(self.folder, MAPS_NAME))[1]) if wanted else []
        for name in names:
            chosen = [("image", "in", wanted)]
            table = pq.read_table(self._open(MAPS_NAME, name), filters=chosen)
            if not len(table):
                continue
            size = [int(table.schema.metadata[name]) for name in (b"height", b"width")]
            for image, values in zip(table["image"].to_pylist(), table["values"], strict=True):
                maps[image] = np.frombuffer(values.as_py(), np.uint8).reshape(size)
        return maps

    def _open(self, *names: str) -> pa.NativeFile:
        return open_input(join(self.folder, *names))


def read_evaluation(folder: Path | str) -> Evaluation:
    """Read what `write_evaluation` wrote. Raises UserError where it is missing or of another
    format."""
    path = join(folder, METRICS_NAME)
    try:
        data = read_bytes(path)
    except MissingError:
        raise UserError(f"{folder} has no {METRICS_NAME}: no evaluation finished there.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate again.") from error
    try:
        content = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate again.") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version}; this program reads {FORMAT}. Evaluate again."
        )
    names, figures = ([field.name for field in fields(kind)] for kind in (Row, RowFigures))
    try:
        rows = tuple(
            RowFigures(
                row=Row(**{name: row[name] for name in names}),
                **{name: row[name] for name in figures if name != "row"},
            )
            for row in content.pop("rows")
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not as it was written ({error!r}); evaluate again.") from error
    for name, sha256 in content.pop("sha256", {}).items():  # absent from older ones
        file = join(folder, name)
        try:
            as_written = hashlib.sha256(read_bytes(file)).hexdigest() == sha256
        except MissingError:
            as_written = False
        if not as_written:
            raise UserError(
                f"{file} is not what was written with {METRICS_NAME}; copy the whole folder again, "
                "or evaluate again."
            )
    return Evaluation(folder=folder, metrics=content, rows=rows)


def write_evaluation(
    folder: Path,
    metrics: Mapping[str, Any],
    rows: Sequence[RowFigures],
    predictions: pa.Table,
    images: pa.Table,
) -> None:
    """Write the evaluation in place of an earlier one, with the maps that `write_maps` wrote.
    metrics: all of metrics.json but format and rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_NAME).unlink(missing_ok=True)
    hashes = {}
    for name, table in ((PREDICTIONS_NAME, predictions), (IMAGES_NAME, images)):
        data = parquet_bytes(table)
        write_atomically(folder / name, data)
        hashes[name] = hashlib.sha256(data).hexdigest()
    shutil.rmtree(folder / MAPS_NAME, ignore_errors=True)
    if (folder / NEW_MAPS_NAME).is_dir():
        (folder / NEW_MAPS_NAME).rename(folder / MAPS_NAME)
    lines = [asdict(row.row) | {k: v for k, v in vars(row).items() if k != "row"} for row in rows]
    content = {"format": FORMAT, **metrics, "sha256": hashes, "rows": lines}
    write_atomically(folder / METRICS_NAME, (json.dumps(content) + "\n").encode())


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """Return a table as the bytes of a Parquet file, compressed by zstd."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue().to_pybytes()


def clear_maps(folder: Path) -> None:
    """Remove the maps that an interrupted evaluation left in the folder."""
    shutil.rmtree(folder / NEW_MAPS_NAME, ignore_errors=True)


def write_maps(folder: Path, first: int, content: bytes) -> None:
    """Write a file of `maps_bytes`, named by its first image. It is read once `write_evaluation`
    was called."""
    (folder / NEW_MAPS_NAME).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NEW_MAPS_NAME / f"{first:06}.parquet", content)


def maps_bytes(name: str, images: np.ndarray, levels: np.ndarray) -> bytes:
    """Return the maps of some images as a Parquet file. name: the map's. images: int64 [N]; levels:
    uint8 [N, H, W], see `Evaluation.maps`."""
    count, height, width = levels.shape
    table = pa.table(
        {
            "image": images,
            "map": pa.array([name] * count, pa.string()),
            "values": pa.array([values.tobytes() for values in levels], pa.binary()),
        }
    )
    table = table.replace_schema_metadata({"height": str(height), "width": str(width)})
    return parquet_bytes(table, row_group_size=MAPS_TOGETHER)
