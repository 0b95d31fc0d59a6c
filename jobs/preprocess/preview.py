"""`SHARDS/<split>/preview.html`: what is in a set, to look at before training on it."""

import base64
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.shards.format import Manifest, read_sample
from pipeline.shards.ledger import LEDGER_NAME, OK, REJECTED

PREVIEW_NAME = "preview.html"
TEMPLATE = "preview.html.j2"
SAMPLES = 24
SHOWN_REJECTED = 100  # of each kind of reason
SHOWN_CLASSES = 12  # at each end of the table, where there are too many for one
BARS = 32  # of a histogram, at most
WIDEST_BAR = 30.0  # SVG units
LARGEST_SIDE = 1 << 14  # pixels; larger originals count as this large
VIEW = (380.0, 200.0)  # a chart's width and height, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 46.0, 374.0, 24.0, 164.0  # the plot's edges in it
COLUMNS = [
    *("split", "status", "id", "path", "label", "reason", "note"),
    *("width", "height", "superpixels", "boxes", "shard", "position"),
]
RANDOM_SEED = 0


@dataclass(kw_only=True)
class Seen:
    """What a split's ledger rows add up to; its size does not grow with theirs.

    Counts by value: widths, heights: int64 [LARGEST_SIDE + 1], of originals; superpixels, boxes:
    of accepted images; areas: int64 [101], boxes by the share of the image they cover, in per
    cent. rejected_classes: int64 [classes]. reasons, notes: by kind, with the first of each.
    chosen: rows of the samples to show.
    """

    widths: np.ndarray
    heights: np.ndarray
    superpixels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    rejected_classes: np.ndarray
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    noted: dict[str, dict[str, Any]] = field(default_factory=dict)
    chosen: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a chart, in SVG units, and what it stands for."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True, kw_only=True)
class BarChart:
    """A histogram. ticks: (position, text); summary: a line below the title."""

    title: str
    x_title: str
    y_title: str
    summary: str
    bars: tuple[Bar, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A sample's picture as a data URI, the borders of its superpixels as an SVG path over the
    stored pixels, and its ledger row."""

    image: str
    borders: str
    name: str
    row: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class's images."""

    wnid: str
    name: str
    images: int
    rejected: int


def write_previews(output: str, manifest: Manifest) -> list[str]:
    """Write the page of every split of the set at `output` that has none; their places.

    The same set gives the same bytes. Memory does not grow with the set.
    """
    places = {split: storage.join(output, split, PREVIEW_NAME) for split in manifest.splits}
    missing = {split: place for split, place in places.items() if not storage.is_file(place)}
    for split, place in missing.items():
        storage.write_atomically(place, render(output, manifest, split).encode())
    return list(missing.values())


def render(output: str, manifest: Manifest, split: str) -> str:
    """The page of one split: HTML that needs no other file and no script."""
    entry = manifest.splits[split]
    seen = read_rows(output, manifest, split)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figures"] = lambda number: f"{number:,}"
    classes = [
        ClassRow(wnid=wnid, name=name, images=images, rejected=int(rejected))
        for wnid, name, images, rejected in zip(
            manifest.classes,
            manifest.class_names,
            entry.class_counts,
            seen.rejected_classes,
            strict=True,
        )
    ]
    return environment.get_template(TEMPLATE).render(
        split=split,
        entry=entry,
        manifest=manifest,
        seen=seen,
        megabytes=sum(shard.bytes for shard in entry.shards) / 1e6,
        samples=[_shown(output, manifest, split, row) for row in seen.chosen],
        charts=charts(seen, entry.class_counts),
        classes=sorted(classes, key=lambda row: (-row.images, row.wnid)),
        shown_classes=SHOWN_CLASSES,
        shown_rejected=SHOWN_REJECTED,
        view=VIEW,
        plot=(LEFT, RIGHT, TOP, BOTTOM),
    )


def read_rows(output: str, manifest: Manifest, split: str) -> Seen:
    """Go through the split's rows of the ledger, a batch at a time."""
    seen = Seen(
        widths=np.zeros(LARGEST_SIDE + 1, np.int64),
        heights=np.zeros(LARGEST_SIDE + 1, np.int64),
        superpixels=np.zeros(manifest.max_superpixels + 1, np.int64),
        boxes=np.zeros(1, np.int64),
        areas=np.zeros(101, np.int64),
        rejected_classes=np.zeros(len(manifest.classes), np.int64),
    )
    images = manifest.splits[split].images
    chosen = np.random.default_rng(RANDOM_SEED).permutation(images)[:SAMPLES]
    with storage.open_input(storage.join(output, LEDGER_NAME)) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=COLUMNS):
            table = pa.table(batch).filter(pc.field("split") == split)
            _add_accepted(seen, table.filter(pc.field("status") == OK), np.sort(chosen))
            _add_rejected(seen, table.filter(pc.field("status") == REJECTED))
    return seen


def _add_accepted(seen: Seen, table: pa.Table, chosen: np.ndarray) -> None:
    if not table.num_rows:
        return
    width, height = (table[name].to_numpy() for name in ("width", "height"))
    for counts, values in ((seen.widths, width), (seen.heights, height)):
        counts += np.bincount(np.minimum(values, LARGEST_SIDE), minlength=len(counts))
    counts = np.bincount(table["superpixels"].to_numpy(), minlength=len(seen.superpixels))
    seen.superpixels += counts
    lengths = pc.fill_null(pc.list_value_length(table["boxes"]), 0).to_numpy()
    seen.boxes = _sum(seen.boxes, np.bincount(lengths))
    if lengths.sum():
        flat = pc.list_flatten(pc.list_flatten(table["boxes"])).to_numpy().reshape(-1, 4)
        x0, y0, x1, y1 = flat.T.astype(np.int64)
        whole = np.repeat(width.astype(np.int64) * height, lengths)
        percent = 100 * (x1 - x0 + 1) * (y1 - y0 + 1) // whole
        seen.areas += np.bincount(np.clip(percent, 0, 100), minlength=101)
    here = chosen[(chosen >= seen.accepted) & (chosen < seen.accepted + table.num_rows)]
    seen.chosen += table.take(here - seen.accepted).to_pylist()
    seen.accepted += table.num_rows
    noted = table.filter(pc.is_valid(table["note"])).select(["id", "note"])
    for row in noted.to_pylist():
        for kind in {_kind(note) for note in row["note"].split("; ")}:
            seen.notes[kind] += 1
            seen.noted.setdefault(kind, row)


def _add_rejected(seen: Seen, table: pa.Table) -> None:
    labels = table["label"].drop_null().to_numpy()
    seen.rejected_classes += np.bincount(labels, minlength=len(seen.rejected_classes))
    for row in table.select(["id", "path", "reason"]).to_pylist():
        kind = row["reason"].split(":")[0]
        seen.reasons[kind] += 1
        kept = seen.rejected.setdefault(kind, [])
        if len(kept) < SHOWN_REJECTED:
            kept.append(row)


def _kind(note: str) -> str:
    """What notes of one kind have in common: `box 3 clipped to the image: was ...` and box 0's."""
    return re.sub(r"\d+(x\d+)?", "#", note.split(":")[0])


def _sum(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    total = np.zeros(max(len(first), len(second)), np.int64)
    total[: len(first)] += first
    total[: len(second)] += second
    return total


def _shown(output: str, manifest: Manifest, split: str, row: dict[str, Any]) -> Shown:
    sample = read_sample(storage.join(output, split, row["shard"]), row["position"], manifest)
    data = cv2.imencode(".jpg", sample.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
    return Shown(
        image=f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}",
        borders=border_path(sample.segments),
        name=manifest.class_names[sample.label],
        row=row,
    )


def border_path(segments: np.ndarray) -> str:
    """The borders between superpixels, labels [H, W], as the data of an SVG path over pixels."""
    rows = [f"M{x} {y}h{n}" for y, x, n in _runs(segments[1:] != segments[:-1])]
    columns = [f"M{x} {y}v{n}" for x, y, n in _runs((segments[:, 1:] != segments[:, :-1]).T)]
    return "".join(rows + columns)


def _runs(differs: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(line, start, length) of each run of True in bool [lines, N]; line i lies after pixel i."""
    padded = np.pad(differs, ((0, 0), (1, 1))).astype(np.int8)
    lines, edges = np.nonzero(np.diff(padded, axis=1))
    for line, start, stop in zip(lines[::2] + 1, edges[::2], edges[1::2], strict=True):
        yield int(line), int(start), int(stop - start)


def charts(seen: Seen, class_counts: Sequence[int]) -> list[BarChart]:
    """Histograms of the originals' sizes, superpixels, boxes and images per class."""
    counts = np.bincount(np.array(class_counts, np.int64))
    drawn = [
        _histogram(counts, "Images per class", "images", "classes"),
        _histogram(seen.widths, "Width of the originals", "pixels", "images"),
        _histogram(seen.heights, "Height of the originals", "pixels", "images"),
        _histogram(seen.superpixels, "Superpixels per image", "superpixels", "images"),
    ]
    if seen.areas.any():
        boxes = _histogram(seen.boxes, "Boxes per image", "boxes", "images")
        areas = _histogram(seen.areas, "Share of the image in each box", "per cent", "boxes")
        drawn += [boxes, areas]
    return drawn


def _histogram(counts: np.ndarray, title: str, x_title: str, of_what: str) -> BarChart:
    """counts: int64 [N], how often each value 0, 1, ... N - 1 comes."""
    values = np.flatnonzero(counts)
    first, last = (int(values[0]), int(values[-1])) if len(values) else (0, 0)
    step = _nice((last - first + 1) / BARS)
    start = first // step * step
    bins = [int(counts[i : i + step].sum()) for i in range(start, last + 1, step)]
    highest = max([*bins, 1])
    slot = (RIGHT - LEFT) / len(bins)
    width = min(0.88 * slot, WIDEST_BAR)
    bars = []
    for i, count in enumerate(bins):
        height = (BOTTOM - TOP) * count / highest
        low, high = start + i * step, start + (i + 1) * step - 1
        bars.append(
            Bar(
                x=round(LEFT + (i + 0.5) * slot - width / 2, 2),
                y=round(BOTTOM - height, 2),
                width=round(width, 2),
                height=round(height, 2),
                text=f"{low}{'' if low == high else f'–{high}'}: {count:,} {of_what}",
            )
        )
    every = max(1, -(-len(bins) // 6))
    centre = slot / 2 if step == 1 else 0.0  # a value's bar is named in its middle, a range's start
    total = int(counts.sum())
    mean = float((counts * np.arange(len(counts))).sum() / max(1, total))
    median = int(np.searchsorted(np.cumsum(counts), (total + 1) // 2)) if total else 0
    return BarChart(
        title=title,
        x_title=x_title,
        y_title=of_what,
        summary=f"{first:,} to {last:,}, median {median:,}, mean {mean:,.1f}",
        bars=tuple(bars),
        x_ticks=tuple(
            (round(LEFT + i * slot + centre, 2), f"{start + i * step:,}")
            for i in range(0, len(bins), every)
        ),
        y_ticks=((BOTTOM, "0"), (TOP, f"{highest:,}")),
    )


def _nice(step: float) -> int:
    """The least of 1, 2, 5, 10, 20, ... that is no smaller."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= step:
                return factor * power
        power *= 10
