"""report.html: one self-contained page with the figures, and pictures of what they come from."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from jobs.evaluate.config import EvaluateConfig
from jobs.pictures import grey, heat
from jobs.report import charts as report_charts
from jobs.report import tables as report_tables
from jobs.runs import Nets, colour_statistics, load_nets
from model.masking import mask_map, normalize
from pipeline.errors import UserError
from pipeline.evaluation.protocols import PROTOCOLS
from pipeline.loading.cache import GIB, CacheConfig, ShardCache
from pipeline.shards.format import (
    Manifest,
    Sample,
    read_manifest,
    read_samples,
    split_of,
)

REPORT_NAME = "report.html"
TEMPLATE = "report.html.j2"
PER_GROUP = 6  # pictures of each of best, worst, random, each kind of error, and most different
JPEG_QUALITY = 85
LIKELY_MASKED = 0.5
RUN_SUFFIXES = ("", "_2")  # of a run's columns in the predictions


@dataclass(frozen=True, kw_only=True)
class View:
    """What one run makes of an image. box: in original pixels; iou: None where no true box is
    known; error: a key of ERRORS in jobs/report/tables.py, None where no true box is known; found:
    False for a flat map; map, masked: data URIs at the stored size."""

    box: list[int]
    iou: float | None
    error: str | None
    found: bool
    predicted: str
    score: float
    map: str
    masked: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of the report. image: data URI at the stored size; width, height: original pixels,
    in which the boxes are; views: of each run that is shown."""

    id: str
    label: str
    width: int
    height: int
    truths: list[list[int]]
    image: str
    views: tuple[View, ...]


def choose(
    ious: np.ndarray, errors: Sequence[str | None], count: int, seed: int
) -> dict[str, list[int]]:
    """Positions of the pictures to show, by group: the `count` best and worst IoUs, as many random
    others, and as many of each kind of error.

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
    for kind in report_tables.ERRORS:
        if kind != "right":
            groups[kind] = np.sort(rng.permutation(np.flatnonzero(kinds == kind))[:count])
    return {name: positions.tolist() for name, positions in groups.items()}


def most_different(first: np.ndarray, second: np.ndarray, count: int) -> list[int]:
    """Positions of the `count` images on which two runs' IoUs (float64 [N], NaN where no box is
    known) differ most, the largest difference first; equal IoUs do not differ."""
    difference = np.nan_to_num(np.abs(first - second))
    order = np.argsort(-difference, kind="stable")[:count]
    return order[difference[order] > 0].tolist()


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(image: np.ndarray) -> str:
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    return _data_uri(cv2.imencode(".jpg", image[..., ::-1], options)[1].tobytes(), "jpeg")


def _map_png(values: np.ndarray) -> str:
    """The map in `heat`'s colours as a PNG with a palette, a third of the size of a full one."""
    picture = Image.fromarray(grey(values), mode="P")
    picture.putpalette(heat(np.arange(256)[None] / 255).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return _data_uri(buffer.getvalue(), "png")


def _read_rows(path: Path, manifest: Manifest, rows: set[int]) -> Iterator[Sample]:
    """The samples of these ledger rows in a shard; of the others no more is read than the row."""
    return (sample for sample in read_samples(path, manifest) if sample.row in rows)


def _samples(config: EvaluateConfig, manifest: Manifest, chosen: pa.Table) -> dict[int, Sample]:
    """The chosen ledger rows' samples, by row. Raises UserError where shards lack one."""
    assert config.data is not None
    limit = round(config.cache_limit * GIB)
    cache = ShardCache(
        config.data, manifest, config.split, CacheConfig(folder=config.cache, limit_bytes=limit)
    )
    wanted = set(chosen["row"].to_pylist())
    names = set(chosen["shard"].to_pylist())
    samples = {}
    for number, shard in enumerate(split_of(manifest, config.split).shards):
        if shard.name in names:
            for sample in _read_rows(cache.path(number), manifest, wanted):
                samples[sample.row] = sample
            cache.release(number)
    cache.close()
    if wanted - samples.keys():
        raise UserError(
            f"ledger rows {sorted(wanted - samples.keys())} are not in the shards that the ledger "
            f"of {config.data} names; run jobs.preprocess again."
        )
    return samples


def _error(row: dict[str, Any], suffix: str) -> str | None:
    """What became of ALN's box and its class, see ERRORS; the column knows the box alone."""
    error = row[f"aln{suffix}_error"]
    class_right = row[f"classifier{suffix}_classes"][0] == row["label"]
    return "class_wrong" if error == "right" and not class_right else error


def _view(nets: Nets, manifest: Manifest, sample: Sample, row: dict[str, Any], suffix: str) -> View:
    """One run's view of a sample; row: the image's row of the predictions."""
    x = torch.from_numpy(sample.image.copy()).permute(2, 0, 1).unsqueeze(0).contiguous()
    x = normalize(x, *colour_statistics(nets.config, x.device))
    segments = torch.from_numpy(sample.segments.astype(np.int64)).unsqueeze(0)
    with torch.no_grad():
        values = mask_map(nets.corruption, x, segments, manifest.max_superpixels)[0].numpy()
    grey = np.rint(nets.config.mean).astype(np.uint8)  # a masked pixel is the mean colour
    masked = np.where((values > LIKELY_MASKED)[..., None], grey, sample.image)
    return View(
        box=list(row[f"aln{suffix}_box"]),
        iou=row[f"aln{suffix}_iou"],
        error=_error(row, suffix),
        found=row[f"aln{suffix}_found"],
        predicted=manifest.class_names[row[f"classifier{suffix}_classes"][0]],
        score=row[f"classifier{suffix}_scores"][0],
        map=_map_png(values),
        masked=_jpeg(masked),
    )


def report_pictures(config: EvaluateConfig, predictions: pa.Table) -> dict[str, list[Picture]]:
    """Pictures from the shards, by `choose`'s groups of the first run's ALN; with two runs also
    "differ", see `most_different`, with both runs' views. The maps are made anew. Empty without
    a run or shards.
    """
    if not config.run or not config.data:
        return {}
    manifest = read_manifest(config.data)
    runs = [load_nets(run) for run in config.run]
    ious = [predictions[f"aln{suffix}_iou"].to_numpy() for suffix in RUN_SUFFIXES[: len(runs)]]
    columns = ["label", "aln_error", "classifier_classes"]
    errors = [_error(row, "") for row in predictions.select(columns).to_pylist()]
    groups = {"differ": most_different(ious[0], ious[1], PER_GROUP)} if len(runs) > 1 else {}
    groups |= choose(ious[0], errors, PER_GROUP, config.seed)
    shown = sorted({position for group in groups.values() for position in group})
    chosen = predictions.take(pa.array(shown, pa.int64()))
    samples = _samples(config, manifest, chosen)
    rows = dict(zip(shown, chosen.to_pylist(), strict=True))

    def picture(position: int, of_runs: int) -> Picture:
        row = rows[position]
        sample = samples[row["row"]]
        views = zip(runs[:of_runs], RUN_SUFFIXES, strict=False)
        return Picture(
            id=row["id"],
            label=manifest.class_names[row["label"]],
            width=row["width"],
            height=row["height"],
            truths=row["boxes"] or [],
            image=_jpeg(sample.image),
            views=tuple(_view(nets, manifest, sample, row, suffix) for nets, suffix in views),
        )

    return {
        name: [picture(position, len(runs) if name == "differ" else 1) for position in positions]
        for name, positions in groups.items()
    }


def render(
    metrics: dict[str, Any], predictions: pa.Table, pictures: dict[str, list[Picture]]
) -> str:
    """The page: HTML that needs no other file and no script.

    metrics: the content of metrics.json; predictions: joined, see jobs/evaluate/scoring.py;
    pictures: by group, see `report_pictures`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": report_tables.percent,
        "number": report_tables.number,
        "points": report_tables.points,
        "figures": report_tables.thousands,
    }
    tables = report_tables
    return environment.get_template(TEMPLATE).render(
        m=metrics,
        own=tables.own_row(metrics),
        groups=tables.grouped(metrics),
        sources=tables.class_sources(metrics),
        classifiers=tables.classifiers(metrics),
        columns=tables.shown_figures(metrics),
        comparisons=tables.comparisons(metrics),
        paired=tables.paired_runs(metrics),
        agreement=tables.agreement(predictions),
        iou_charts=report_charts.iou_charts(metrics),
        threshold_charts=report_charts.threshold_charts(metrics),
        view=report_charts.VIEW,
        plot=(report_charts.LEFT, report_charts.RIGHT, report_charts.TOP, report_charts.BOTTOM),
        class_rows=tables.class_rows(metrics),
        tables=tables,
        protocols=PROTOCOLS,
        pictures=pictures,
        configuration=json.dumps(metrics["configuration"], indent=1),
        data_configuration=json.dumps(metrics.get("data_configuration"), indent=1),
    )
