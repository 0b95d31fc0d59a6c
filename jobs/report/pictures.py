"""The report's pictures: images from the shards, with true boxes, predicted ones and the maps."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from jobs.pictures import heat
from jobs.report.compare import Entry, first_class, predictions, right_classes
from jobs.report.tables import ERRORS
from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards.format import Manifest, read_manifest, read_sample

PER_GROUP = 6  # pictures of each of best, worst, random, each kind of error, and most different
JPEG_QUALITY = 85
LEVELS = 255  # a stored map's largest value


@dataclass(frozen=True, kw_only=True)
class View:
    """What one evaluation makes of an image. number: of the evaluation on the page; box: in
    original pixels; iou, error: None where no true box is known; found: False for a flat map;
    predicted, score: None without classes; map: data URI at the map's size, None without maps."""

    title: str
    number: int
    box: list[int]
    iou: float | None
    error: str | None
    found: bool
    predicted: str | None
    score: float | None
    map: str | None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of the report. width, height: original pixels, in which the boxes are; image,
    covered: data URIs at the stored size, `covered` of a single evaluation with maps; views: of
    each evaluation that is shown."""

    id: str
    label: str
    width: int
    height: int
    truths: list[list[int]]
    image: str
    covered: str | None
    views: tuple[View, ...]


def choose(
    ious: np.ndarray, errors: Sequence[str | None], count: int, seed: int
) -> dict[str, list[int]]:
    """Return the positions of the pictures to show, by group: the `count` best and worst IoUs, as
    many random others, and as many of each kind of error.

    ious: float64 [N], NaN where no box is known (never best or worst); errors: of each image, see
    `View`. Of equal IoUs the first images come. Best, worst and random share no image; an error's
    pictures are drawn at random from all of its kind, so that they stand for it.
    """
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
    `choose` by the first one's main row. Of several entries the first evaluation of each is shown,
    of one all of its seeds.

    Raises UserError where the evaluations name no shards, or these are gone or others.
    """
    every = [(entry, number) for entry in entries for number in range(len(entry.evaluations))]
    if len(entries) > 1:
        every = [(entry, 0) for entry in entries]
    boxes = [_boxes(entry, number) for entry, number in every]
    ious = np.stack([table["iou"].to_numpy() for table in boxes])
    groups = {"differ": most_different(ious, PER_GROUP)} if len(every) > 1 else {}
    groups |= choose(ious[0], boxes[0]["error"].to_pylist(), PER_GROUP, seed)
    shown = sorted({position for group in groups.values() for position in group})
    manifest, images, pixels = _read_images(every, shown)
    views: list[list[View]] = [[] for _ in shown]
    covered: list[str | None] = [None] * len(shown)
    for number, ((entry, member), table) in enumerate(zip(every, boxes, strict=True)):
        title = entry.title if len(entries) > 1 else f"{entry.title} {member + 1}"
        rows = table.take(shown).to_pylist()
        maps = entry.evaluations[member].maps(row["image"] for row in rows)
        for i, row in enumerate(rows):
            levels = maps.get(row["image"])
            views[i].append(_view(title, number, row, levels, manifest.class_names))
            if len(every) == 1 and levels is not None:
                covered[i] = _jpeg(_covered(pixels[i], levels, manifest))
    pictures = {
        shown[i]: Picture(
            id=row["id"],
            label=manifest.class_names[row["label"]],
            width=row["width"],
            height=row["height"],
            truths=row["boxes"] or [],
            image=_jpeg(pixels[i]),
            covered=covered[i],
            views=tuple(views[i]),
        )
        for i, row in enumerate(images)
    }
    return {name: [pictures[i] for i in positions] for name, positions in groups.items()}


def _view(
    title: str,
    number: int,
    row: dict[str, Any],
    levels: np.ndarray | None,
    class_names: Sequence[str],
) -> View:
    """Return a view; row: of `_boxes`; levels: the map, uint8 [H, W]."""
    return View(
        title=title,
        number=number,
        box=row["box"],
        iou=row["iou"],
        error=row["error"],
        found=row["found"],
        predicted=None if row["class"] is None else class_names[row["class"]],
        score=row["score"],
        map=None if levels is None else _map_png(levels),
    )


def _boxes(entry: Entry, number: int) -> pa.Table:
    """Return an evaluation's boxes by its main row, where an error counts the class if the row
    does; with the columns "class" and "score" of the first class, null without one."""
    images, classes = entry.images[number], entry.main.classes
    table = predictions(entry, number, entry.main)
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
    every: Sequence[tuple[Entry, int]], shown: Sequence[int]
) -> tuple[Manifest, list[dict[str, Any]], list[np.ndarray]]:
    """Return the manifest of the first evaluation that names shards, the rows of its images at
    these positions, and their pixels, uint8 [H, W, 3]."""
    for entry, number in every:
        metrics, images = entry.evaluations[number].metrics, entry.images[number]
        if metrics["data"] is None:
            continue
        manifest = read_manifest(metrics["data"])
        folder = storage.join(metrics["data"], metrics["split"])
        rows, pixels = images.take(shown).to_pylist(), []
        for row in rows:
            # A shard's samples are in the order of the ledger's rows.
            before = pc.and_(
                pc.equal(images["shard"], row["shard"]), pc.less(images["row"], row["row"])
            )
            shard = storage.join(folder, row["shard"])
            sample = read_sample(shard, pc.sum(before).as_py() or 0, manifest)
            if sample.row != row["row"]:
                raise UserError(f"{shard} holds other images than those that were evaluated.")
            pixels.append(sample.image)
        return manifest, rows, pixels
    raise UserError("no shards were evaluated, only boxes or score maps.")


def _covered(image: np.ndarray, levels: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Return the image as far towards the mean colour as the map says: uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    shares = cv2.resize(levels, (width, height))[..., None] / LEVELS
    return np.rint(image * (1 - shares) + shares * np.array(manifest.mean)).astype(np.uint8)


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(image: np.ndarray) -> str:
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    return _data_uri(cv2.imencode(".jpg", image[..., ::-1], options)[1].tobytes(), "jpeg")


def _map_png(levels: np.ndarray) -> str:
    """Return the map in `heat`'s colours as a PNG with a palette, a third of the size of a full
    one."""
    picture = Image.fromarray(levels, mode="P")
    picture.putpalette(heat(np.arange(LEVELS + 1)[None] / LEVELS).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return _data_uri(buffer.getvalue(), "png")
