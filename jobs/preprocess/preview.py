"""`SHARDS/<split>/preview.html`: a page about a split, to look at before training on it."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.pictures import data_uri, encode_jpeg, enlargement, with_borders
from pipeline import storage
from pipeline.shards.format import Manifest, read_sample
from pipeline.shards.ledger import LEDGER_NAME, OK, REJECTED

PREVIEW_NAME = "preview.html"
TEMPLATE = "preview.html.j2"
SAMPLES = 24
SHOWN_REJECTED = 100  # of each kind of reason
SHOWN_CLASSES = 12  # at each end of the table, where there are too many for one
BARS = 32  # of a histogram, at most
BORDERED_SIDE = 320  # pixels, at least, of a sample drawn with the borders of its superpixels
COLUMNS = [
    *("split", "status", "id", "path", "label", "reason", "note"),
    *("width", "height", "superpixels", "boxes", "shard", "position"),
]
RANDOM_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Counts over a split's ledger rows, by value; their size does not grow with the split's.

    widths, heights: of the originals, in pixels. superpixels, boxes: per accepted image. areas:
    boxes by the share of the image that they cover, in per cent. rejected_classes: rejected images
    by class index. reasons, notes: by kind; rejected: the first rows of each reason; noted: the
    first row of each note. chosen: rows of the samples to show.
    """

    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    superpixels: Counter[int] = field(default_factory=Counter)
    boxes: Counter[int] = field(default_factory=Counter)
    areas: Counter[int] = field(default_factory=Counter)
    rejected_classes: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    noted: dict[str, dict[str, Any]] = field(default_factory=dict)
    chosen: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """bars: height in per cent of the highest, and the text that names values and count. summary:
    a line below the title; low, unit and high: below the bars."""

    title: str
    summary: str
    bars: list[tuple[float, str]]
    low: str
    unit: str
    high: str


def write_previews(output: str, manifest: Manifest) -> list[str]:
    """Write the page of every split of the set at `output` that has none; return their locations.

    The same set gives the same bytes. Memory does not grow with the set.
    """
    written = []
    for split in manifest.splits:
        location = storage.join(output, split, PREVIEW_NAME)
        if not storage.is_file(location):
            storage.write_atomically(location, render(output, manifest, split).encode())
            written.append(location)
    return written


def render(output: str, manifest: Manifest, split: str) -> str:
    """Return the page of one split: HTML that needs no other file and no script."""
    entry = manifest.splits[split]
    sums = read_rows(output, manifest, split)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figures"] = lambda number: f"{number:,}"
    classes = [
        {"wnid": wnid, "name": name, "images": images, "rejected": sums.rejected_classes[index]}
        for index, (wnid, name, images) in enumerate(
            zip(manifest.classes, manifest.class_names, entry.class_counts, strict=True)
        )
    ]
    return environment.get_template(TEMPLATE).render(
        split=split,
        entry=entry,
        manifest=manifest,
        sums=sums,
        megabytes=sum(shard.bytes for shard in entry.shards) / 1e6,
        samples=[_sample(output, manifest, split, row) for row in sums.chosen],
        charts=charts(sums, Counter(entry.class_counts)),
        classes=sorted(classes, key=lambda row: (-row["images"], row["wnid"])),
        shown_classes=SHOWN_CLASSES,
        shown_rejected=SHOWN_REJECTED,
    )


def read_rows(output: str, manifest: Manifest, split: str) -> Sums:
    """Sum up the split's rows of the ledger, a batch at a time."""
    sums = Sums()
    images = manifest.splits[split].images
    chosen = np.sort(np.random.default_rng(RANDOM_SEED).permutation(images)[:SAMPLES])
    accepted = 0
    with storage.open_input(storage.join(output, LEDGER_NAME)) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=COLUMNS):
            table = pa.table(batch).filter(pc.field("split") == split)
            _add_rejected(sums, table.filter(pc.field("status") == REJECTED))
            table = table.filter(pc.field("status") == OK)
            _add_accepted(sums, table)
            positions = chosen[(chosen >= accepted) & (chosen < accepted + len(table))] - accepted
            sums.chosen.extend(table.take(positions).to_pylist())
            accepted += len(table)
    return sums


def _add_accepted(sums: Sums, table: pa.Table) -> None:
    _count(sums.widths, table["width"].to_numpy())
    _count(sums.heights, table["height"].to_numpy())
    _count(sums.superpixels, table["superpixels"].to_numpy())
    lengths = pc.fill_null(pc.list_value_length(table["boxes"]), 0).to_numpy()
    _count(sums.boxes, lengths)
    corners = pc.list_flatten(pc.list_flatten(table["boxes"])).to_numpy().astype(np.int64)
    x0, y0, x1, y1 = corners.reshape(-1, 4).T
    sizes = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
    percent = 100 * (x1 - x0 + 1) * (y1 - y0 + 1) // np.repeat(sizes, lengths)
    _count(sums.areas, np.clip(percent, 0, 100))
    noted = table.filter(pc.is_valid(table["note"])).select(["id", "note"])
    for row in noted.to_pylist():
        for kind in {_kind(note) for note in row["note"].split("; ")}:
            sums.notes[kind] += 1
            sums.noted.setdefault(kind, row)


def _add_rejected(sums: Sums, table: pa.Table) -> None:
    _count(sums.rejected_classes, table["label"].drop_null().to_numpy())
    for row in table.select(["id", "path", "reason"]).to_pylist():
        kind = row["reason"].split(":")[0]
        sums.reasons[kind] += 1
        rows = sums.rejected.setdefault(kind, [])
        if len(rows) < SHOWN_REJECTED:
            rows.append(row)


def _count(counter: Counter[int], values: np.ndarray) -> None:
    distinct, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))


def _kind(note: str) -> str:
    """Return what notes of one kind share: `box 3 clipped to the image: was ...` and box 0's."""
    return re.sub(r"\d+(x\d+)?", "#", note.split(":")[0])


def _sample(output: str, manifest: Manifest, split: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a sample's name and ledger row, and its image, plain and with superpixel borders."""
    sample = read_sample(storage.join(output, split, row["shard"]), row["position"], manifest)
    scale = enlargement(manifest.height, manifest.width, BORDERED_SIDE)
    bordered = with_borders(sample.image, sample.segments, scale)
    return {
        "image": data_uri(encode_jpeg(sample.image), "jpeg"),
        "bordered": data_uri(encode_jpeg(bordered), "jpeg"),
        "name": manifest.class_names[sample.label],
        "row": row,
    }


def charts(sums: Sums, class_counts: Mapping[int, int]) -> list[Histogram]:
    """Return histograms of the originals' sizes, superpixels, boxes and images per class."""
    drawn = [
        histogram(class_counts, "Images per class", "images", "classes"),
        histogram(sums.widths, "Width of the originals", "pixels", "images"),
        histogram(sums.heights, "Height of the originals", "pixels", "images"),
        histogram(sums.superpixels, "Superpixels per image", "superpixels", "images"),
    ]
    if sums.areas:
        boxes = histogram(sums.boxes, "Boxes per image", "boxes", "images")
        areas = histogram(sums.areas, "Share of the image in each box", "per cent", "boxes")
        drawn += [boxes, areas]
    return drawn


def histogram(counts: Mapping[int, int], title: str, unit: str, counted: str) -> Histogram:
    """Return a histogram of values from 0, of which `counts` says how often each comes."""
    values, weights = np.array(sorted((counts or {0: 0}).items()), np.int64).T
    low, high, total = int(values[0]), int(values[-1]), int(weights.sum())
    step = _round_step((high - low + 1) / BARS)
    start = low // step * step
    bins = np.bincount((values - start) // step, weights).astype(np.int64)
    bars = []
    for number, count in enumerate(bins.tolist()):
        first, last = start + number * step, start + (number + 1) * step - 1
        name = f"{first}" if first == last else f"{first}–{last}"
        bars.append((round(100 * count / max(1, bins.max()), 1), f"{name}: {count:,} {counted}"))
    median = values[np.searchsorted(np.cumsum(weights), (total + 1) // 2)]
    mean = (values * weights).sum() / max(1, total)
    return Histogram(
        title=title,
        summary=f"{low:,} to {high:,}, median {median:,}, mean {mean:,.1f}",
        bars=bars,
        low=f"{low:,}",
        unit=f"{unit}; the highest bar: {bins.max():,} {counted}",
        high=f"{high:,}",
    )


def _round_step(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, ... that is no smaller than `least`."""
    power = 10 ** max(0, int(np.floor(np.log10(least))))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)
