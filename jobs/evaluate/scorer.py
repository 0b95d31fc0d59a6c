"""Score maps -> boxes, counts over thresholds, and AUC, batch by batch. Runs in the tasks of an
evaluation, without torch and Ray. The counts of parts add up exactly, so the figures do not depend
on the number of tasks."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from model.localization import RULES, Rule, localize, localize_by
from pipeline.evaluation.formats import read_score_map, score_map_path
from pipeline.evaluation.metrics import Sweep
from pipeline.evaluation.protocols import (
    IOU_GRID,
    PROTOCOLS,
    own_boxes,
    scale_boxes,
    thresholds,
    truth_boxes,
)
from pipeline.evaluation.results import maps_bytes
from pipeline.evaluation.sweep import (
    LevelBoxes,
    add_counts,
    level_boxes,
    level_ious,
    pixel_auc_boxes,
    quantize,
    stretch,
    threshold_levels,
)
from pipeline.evaluation.truth import GroundTruth

IMAGES_PER_PART = 256  # given score maps that a thread scores before it reports
MAPS_AT_ONCE = 16  # given score maps that a thread holds as floats


@dataclass(frozen=True, kw_only=True)
class MapTruth:
    """The ground truth of N images as maps need it, for every task. rows: int64 [N], ascending: the
    ledger's, or 0..N-1. partners: int64 [N], the image whose boxes stand for "another image's", or
    -1."""

    rows: np.ndarray
    ids: Sequence[str]
    sizes: np.ndarray
    boxes: np.ndarray
    starts: np.ndarray
    partners: np.ndarray
    protocol: str

    def of(self, image: int) -> np.ndarray:
        """Return the boxes of one image, [T, 4]."""
        return self.boxes[self.starts[image] : self.starts[image + 1]]


def map_truth(truth: GroundTruth, rows: np.ndarray, protocol: str, seed: int) -> MapTruth:
    """Return what maps of these images, of known sizes, are scored against. Partners form one
    random cycle of all images with boxes, so any division of the images pairs the same."""
    assert truth.sizes is not None
    known = np.flatnonzero(np.diff(truth.starts) > 0)
    partners = np.full(len(truth.ids), -1)
    if len(known) > 1:
        cycle = np.random.default_rng(seed).permutation(known)
        partners[cycle] = np.roll(cycle, 1)
    return MapTruth(
        rows=rows,
        ids=truth.ids,
        sizes=truth.sizes,
        boxes=truth.boxes,
        starts=truth.starts,
        partners=partners,
        protocol=protocol,
    )


@dataclass(frozen=True, kw_only=True)
class MapCounts:
    """What the maps of one kind add up to: the sweep's counts, and the sum of their levels
    (int64 [H, W], 0 to 255 each) with the number of maps."""

    sweep: Sweep
    levels: np.ndarray
    maps: int

    def __add__(self, other: "MapCounts") -> "MapCounts":
        return MapCounts(
            sweep=Sweep(
                largest=self.sweep.largest + other.sweep.largest,
                contours=self.sweep.contours + other.sweep.contours,
            ),
            levels=self.levels + other.levels,
            maps=self.maps + other.maps,
        )


def no_counts(height: int, width: int) -> MapCounts:
    """Return the counts of no map of this size."""
    shape = (len(thresholds()), len(IOU_GRID) + 1)
    return MapCounts(
        sweep=Sweep(largest=np.zeros(shape, np.int64), contours=np.zeros(shape, np.int64)),
        levels=np.zeros((height, width), np.int64),
        maps=0,
    )


def _joined(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([a[name], b[name]]) for name in a}


@dataclass(frozen=True, kw_only=True)
class ScoredMaps:
    """What follows from N maps of one kind. boxes: int64 [N, 4], pixels of the map, and found: bool
    [N], by box rule. auc, auc_other: float64 [N]. counts: over the maps."""

    boxes: dict[str, np.ndarray]
    found: dict[str, np.ndarray]
    auc: np.ndarray
    auc_other: np.ndarray
    counts: MapCounts

    def __add__(self, other: "ScoredMaps") -> "ScoredMaps":
        return ScoredMaps(
            boxes=_joined(self.boxes, other.boxes),
            found=_joined(self.found, other.found),
            auc=np.concatenate([self.auc, other.auc]),
            auc_other=np.concatenate([self.auc_other, other.auc_other]),
            counts=self.counts + other.counts,
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a task makes of some images, in order. rows: int64 [n]. maps: by name. classes: int64
    [n, k], best first, and scores, by classifier. file: of the main maps, emptied once written."""

    rows: np.ndarray
    maps: dict[str, ScoredMaps]
    classes: dict[str, np.ndarray] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    file: bytes = b""

    def __add__(self, other: "Part") -> "Part":
        return Part(
            rows=np.concatenate([self.rows, other.rows]),
            maps={name: maps + other.maps[name] for name, maps in self.maps.items()},
            classes=_joined(self.classes, other.classes),
            scores=_joined(self.scores, other.scores),
        )


def image_aucs(levels: np.ndarray, image: int, truth: MapTruth) -> tuple[float, float]:
    """Return the pixel AUC of a map (uint8 [H, W]) against the image's own boxes and its
    partner's; NaN where it has none."""
    shape = np.array(levels.shape)

    def auc(owner: int) -> float:
        boxes = scale_boxes(truth.of(owner), truth.sizes[owner], shape)
        return pixel_auc_boxes(levels, boxes)

    if truth.partners[image] < 0:
        return np.nan, np.nan
    return auc(image), auc(int(truth.partners[image]))


def sweep_image(
    at_levels: LevelBoxes, shape: np.ndarray, image: int, truth: MapTruth, sweep: Sweep
) -> None:
    """Add one image's map to the counts: at each threshold, by the IoU its boxes reach there."""
    boxes, size = truth.of(image), truth.sizes[image]
    if not len(boxes):
        return
    sizes = np.broadcast_to(size, (len(boxes), 2))
    # Where nothing is above the threshold the reference evaluator's box is [0, 0, 0, 0].
    largest, contours = level_ious(
        at_levels,
        own_boxes(at_levels.boxes, shape, size, truth.protocol),
        truth_boxes(boxes, sizes, truth.protocol),
        PROTOCOLS[truth.protocol].plus,
        np.zeros(4, np.int64),
    )
    levels = threshold_levels(at_levels.maximum)
    add_counts(sweep.largest, largest, levels)
    add_counts(sweep.contours, contours, levels)


def score_maps(
    maps: np.ndarray, levels: np.ndarray, images: np.ndarray, truth: MapTruth, rules: Sequence[Rule]
) -> ScoredMaps:
    """Score one batch of maps of one kind. maps: float [B, H, W], for boxes; levels: uint8 [B, H,
    W], for sweep and AUC; images: int64 [B], in `truth`. Raises ValueError for NaN."""
    counts = no_counts(*maps.shape[1:])
    aucs = []
    for values, image in zip(levels, images.tolist(), strict=True):
        sweep_image(level_boxes(values), np.array(values.shape), image, truth, counts.sweep)
        aucs.append(image_aucs(values, image, truth))
    auc, auc_other = np.array(aucs).reshape(-1, 2).T
    boxes, found = localize_by(maps, rules)
    return ScoredMaps(
        boxes=dict(zip(rules, boxes, strict=True)),
        found=dict.fromkeys(rules, found),
        auc=auc,
        auc_other=auc_other,
        counts=replace(counts, levels=levels.sum(axis=0, dtype=np.int64), maps=len(maps)),
    )


def mean_map(counts: MapCounts, truth: MapTruth) -> ScoredMaps:
    """Score one map for all images: the mean of all maps, by the paper's rule. No true box had a
    share in it."""
    mean = counts.levels / (255 * counts.maps)
    (box,), (found,) = localize(mean[None])
    (levels,) = quantize(stretch(mean[None]))
    at_levels, shape, n = level_boxes(levels), np.array(mean.shape), len(truth.ids)
    sweep = no_counts(*mean.shape).sweep
    aucs = np.full((2, n), np.nan)
    for image in range(n):
        sweep_image(at_levels, shape, image, truth, sweep)
        aucs[:, image] = image_aucs(levels, image, truth)
    return ScoredMaps(
        boxes={"paper": np.tile(box, (n, 1))},
        found={"paper": np.full(n, bool(found))},
        auc=aucs[0],
        auc_other=aucs[1],
        counts=replace(counts, sweep=sweep),
    )


def given_parts(root: Path, truth: MapTruth, size: tuple[int, int], workers: int) -> Iterator[Part]:
    """Score the score maps of a folder in threads, and yield what follows from them, in order.
    size: (height, width) that all maps must have. Raises UserError for a map that is missing, of
    another size, or with values that are none."""
    with ThreadPoolExecutor(workers) as pool:
        starts = range(0, len(truth.ids), IMAGES_PER_PART)
        yield from pool.map(lambda start: _given_part(root, truth, size, start), starts)


def _given_part(root: Path, truth: MapTruth, size: tuple[int, int], start: int) -> Part:
    scored: list[ScoredMaps] = []
    images = np.arange(start, min(start + IMAGES_PER_PART, len(truth.ids)))
    levels = np.empty((len(images), *size), np.uint8)
    for some in np.array_split(np.arange(len(images)), -(-len(images) // MAPS_AT_ONCE)):
        paths = (score_map_path(root, truth.ids[images[i]]) for i in some)
        maps = np.stack([read_score_map(path, size) for path in paths])
        levels[some] = quantize(maps)
        scored.append(score_maps(maps, levels[some], images[some], truth, tuple(RULES)))
    return Part(
        rows=truth.rows[images],
        maps={"given": reduce(add, scored)},
        file=maps_bytes("given", images, levels),
    )
