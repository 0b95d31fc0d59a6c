"""The report's pictures: images from the shards, with true boxes, predicted ones and the maps."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.pictures import data_uri, encode_heat_png, encode_jpeg
from jobs.report.compare import Entry, first_class, right_classes
from jobs.report.tables import ERRORS
from pipeline import storage
from pipeline.errors import UserError
from pipeline.evaluation.results import Evaluation
from pipeline.shards.format import Manifest, read_manifest, read_sample

PER_GROUP = 6  # pictures of each of best, worst, random, each kind of error, and most different
JPEG_QUALITY = 85
LEVELS = 255  # a stored map's largest value


@dataclass(frozen=True, kw_only=True)
class View:
    """What one evaluation says of an image. number: the evaluation's, which gives its colour. box:
    in original pixels. predicted, score: the first class and its probability. map: a data URI."""

    title: str
    number: int
    box: list[float] | None
    iou: float | None
    error: str | None
    found: bool | None
    predicted: str | None
    score: float | None
    map: str | None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of the report. width, height, truths (its boxes): in original pixels. image: a data
    URI. covered: the same as far masked as the map says, of a single evaluation with maps."""

    id: str
    label: str
    width: int
    height: int
    truths: list[list[float]]
    image: str
    covered: str | None
    views: tuple[View, ...]


def choose(
    ious: np.ndarray, errors: Sequence[str | None], count: int, seed: int
) -> dict[str, list[int]]:
    """Return the positions of the pictures to show, by group: the `count` best and worst IoUs, as
    many random others, and as many drawn at random of each kind of error. ious: float64 [N], NaN
    where no box is known. Of equal IoUs the first images come."""
    known = np.flatnonzero(~np.isnan(ious))
    best = known[np.argsort(-ious[known], kind="stable")][:count]
    rest = np.setdiff1d(known, best)
    worst = rest[np.argsort(ious[rest], kind="stable")][:count]
    others = np.setdiff1d(np.arange(len(ious)), np.concatenate([best, worst]))
    rng = np.random.default_rng(seed)
    groups = {"best": best, "worst": worst, "random": np.sort(rng.permutation(others)[:count])}
    kinds = np.array([error or "" for error in errors])
    for kind in ERRORS:
        if kind != "right":
            groups[kind] = np.sort(rng.permutation(np.flatnonzero(kinds == kind))[:count])
    return {name: positions.tolist() for name, positions in groups.items()}


def most_different(ious: np.ndarray, count: int) -> list[int]:
    """Return the positions of the `count` images on which several boxes' IoUs (float64 [E, N], NaN
    where no box is known) differ most, the largest difference first; equal IoUs do not differ."""
    difference = np.nan_to_num(ious.max(axis=0) - ious.min(axis=0))
    order = np.argsort(-difference, kind="stable")[:count]
    return order[difference[order] > 0].tolist()


def report_pictures(entries: Sequence[Entry], seed: int) -> dict[str, list[Picture]]:
    """Return pictures by group: "differ" where there are several evaluations, then those of
    `choose` by the first one's main row. Of several entries the first evaluation of each is shown.
    Raises UserError where the shards are gone or others."""
    several = len(entries) > 1
    every = [
        (entry, evaluation, images)
        for entry in entries
        for evaluation, images in zip(entry.evaluations, entry.images, strict=True)
    ]
    shown = [x for x in every if not several or x[1] is x[0].evaluations[0]]
    boxes = [_boxes(*x) for x in shown]
    ious = np.stack([table["iou"].to_numpy() for table in boxes])
    groups = {"differ": most_different(ious, PER_GROUP)} if len(shown) > 1 else {}
    groups |= choose(ious[0], boxes[0]["error"].to_pylist(), PER_GROUP, seed)
    positions = sorted({position for group in groups.values() for position in group})
    _, evaluation, images = next(x for x in every if x[1].metrics["data"] is not None)
    manifest = read_manifest(evaluation.metrics["data"])
    pixels = _read_images(evaluation, images, positions, manifest)
    views: dict[int, list[View]] = {position: [] for position in positions}
    covered = {}
    for number, ((entry, evaluation, _), table) in enumerate(zip(shown, boxes, strict=True)):
        rows = table.take(positions).to_pylist()
        maps = evaluation.maps(row["image"] for row in rows)
        for position, image, row in zip(positions, pixels, rows, strict=True):
            levels = maps.get(row["image"])
            heat = None if levels is None else data_uri(encode_heat_png(levels / LEVELS), "png")
            view = View(
                title=entry.title if several else f"{entry.title} {number + 1}",
                number=number,
                predicted=None if row["class"] is None else manifest.class_names[row["class"]],
                map=heat,
                **{name: row[name] for name in ("box", "iou", "error", "found", "score")},
            )
            views[position].append(view)
            if len(shown) == 1 and levels is not None:
                covered[position] = _jpeg_uri(_covered(image, levels, manifest))
    facts = images.take(positions).to_pylist()
    pictures = {
        position: Picture(
            label=manifest.class_names[row["label"]],
            truths=row["boxes"] or [],
            image=_jpeg_uri(image),
            covered=covered.get(position),
            views=tuple(views[position]),
            **{name: row[name] for name in ("id", "width", "height")},
        )
        for position, image, row in zip(positions, pixels, facts, strict=True)
    }
    return {name: [pictures[i] for i in group] for name, group in groups.items()}


def _boxes(entry: Entry, evaluation: Evaluation, images: pa.Table) -> pa.Table:
    """Return the boxes by the main row, where an error counts the class if the row does; with the
    columns "class" and "score" of the first class, null without one."""
    classes = entry.main.classes
    table = evaluation.predictions(entry.main.map, entry.main.rule).take(images["image"])
    named = scores = pa.nulls(len(table))
    if classes is not None:
        named = first_class(images, "classes", classes)
        right = pa.array(right_classes(images, classes))
        missed = pc.and_not(pc.equal(table["error"], "right"), right)
        errors = pc.if_else(missed, "class_wrong", table["error"])
        table = table.drop_columns("error").append_column("error", errors)
        if "scores" in images.column_names and images["scores"].type.get_field_index(classes) >= 0:
            scores = first_class(images, "scores", classes)
    return table.append_column("class", named).append_column("score", scores)


def _read_images(
    evaluation: Evaluation, images: pa.Table, positions: Sequence[int], manifest: Manifest
) -> list[np.ndarray]:
    """Read the images at these positions from the shards: uint8 [H, W, 3]."""
    folder = storage.join(evaluation.metrics["data"], evaluation.metrics["split"])
    pixels = []
    for row in images.take(positions).select(["shard", "row"]).to_pylist():
        # A shard's samples are in the order of the ledger's rows.
        same_shard = pc.equal(images["shard"], row["shard"])
        before = pc.and_(same_shard, pc.less(images["row"], row["row"]))
        shard = storage.join(folder, row["shard"])
        sample = read_sample(shard, pc.sum(before).as_py() or 0, manifest)
        if sample.row != row["row"]:
            raise UserError(f"{shard} holds other images than those that were evaluated.")
        pixels.append(sample.image)
    return pixels


def _covered(image: np.ndarray, levels: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Return the image as far towards the mean colour as the map says: uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    shares = cv2.resize(levels, (width, height))[..., None] / LEVELS
    return np.rint(image * (1 - shares) + shares * np.array(manifest.mean)).astype(np.uint8)


def _jpeg_uri(image: np.ndarray) -> str:
    return data_uri(encode_jpeg(image, JPEG_QUALITY), "jpeg")
