"""Score maps -> boxes, sweep counts and AUC, batch by batch; counts of parts add up exactly.

Runs in Ray tasks; what the maps are scored against is shared by all of them as plain arrays.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from model.localization import localize
from pipeline.evaluation.metrics import SUBSET_GROUPS, Sweep, subset_masks
from pipeline.evaluation.protocols import (
    IOU_GRID,
    PROTOCOLS,
    own_boxes,
    scale_boxes,
    thresholds,
    truth_boxes,
)
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


@dataclass(frozen=True, kw_only=True)
class MapTruth:
    """The ground truth of N images as maps need it.

    rows: int64 [N], ascending, what a batch names its images by (rows of the ledger, or 0..N-1).
    ids: the images' ids. sizes: int64 [N, 2], original (height, width). boxes: int64 [M, 4],
    inclusive original pixels, image by image; starts: int64 [N + 1]. partners: int64 [N], the
    image whose boxes stand for "another image's", -1 where there is none. groups: int64 [N],
    first axis of `model.metrics.Sweep`, -1 for images without boxes.
    """

    rows: np.ndarray
    ids: pa.Array
    sizes: np.ndarray
    boxes: np.ndarray
    starts: np.ndarray
    partners: np.ndarray
    groups: np.ndarray
    protocol: str

    def of(self, image: int) -> np.ndarray:
        """The boxes of one image, [T, 4]."""
        return self.boxes[self.starts[image] : self.starts[image + 1]]


def map_truth(truth: GroundTruth, rows: np.ndarray, protocol: str, seed: int) -> MapTruth:
    """What maps of these images are scored against. Partners form one random cycle of all images
    with boxes, from `seed` alone, so no image is its own and any sharding pairs the same."""
    assert truth.sizes is not None
    known = np.flatnonzero(np.diff(truth.starts) > 0)
    partners = np.full(len(rows), -1)
    if len(known) > 1:
        cycle = np.random.default_rng(seed).permutation(known)
        partners[cycle] = np.roll(cycle, 1)
    masks = subset_masks(truth.boxes, truth.starts, truth.sizes)
    groups = np.full(len(rows), -1)
    groups[known] = 0
    for name, members in SUBSET_GROUPS.items():
        groups[masks[name]] += members[0]
    return MapTruth(
        rows=rows,
        ids=pa.array(truth.ids),
        sizes=truth.sizes,
        boxes=truth.boxes,
        starts=truth.starts,
        partners=partners,
        groups=groups,
        protocol=protocol,
    )


@dataclass(frozen=True, kw_only=True)
class MapCounts:
    """What the maps of one method add up to: the sweep's counts, and the sum of their levels
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
    """The counts of no map of this size."""
    shape = (4, len(thresholds()), len(IOU_GRID) + 1)
    return MapCounts(
        sweep=Sweep(largest=np.zeros(shape, np.int64), contours=np.zeros(shape, np.int64)),
        levels=np.zeros((height, width), np.int64),
        maps=0,
    )


@dataclass(kw_only=True)
class Scored:
    """What scoring gave so far. columns: by name, an array per batch; counts: by map's name."""

    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    counts: dict[str, MapCounts] = field(default_factory=dict)

    def add(self, name: str, values: np.ndarray) -> None:
        """Append a batch's values to a column."""
        self.columns.setdefault(name, []).append(values)

    def table(self) -> pa.Table:
        """All batches' columns, see `fixed_lists`."""
        return pa.table({n: fixed_lists(np.concatenate(v)) for n, v in self.columns.items()})


def fixed_lists(values: np.ndarray) -> pa.Array:
    """Arrays [N] as they are, [N, k] as lists of k; classes and boxes as int32."""
    if values.dtype == np.int64:
        values = values.astype(np.int32)
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def image_aucs(levels: np.ndarray, image: int, truth: MapTruth) -> tuple[float, float]:
    """Pixel AUC of a map (uint8 [H, W]) against the image's own boxes and its partner's."""
    shape = np.array(levels.shape)

    def auc(owner: int) -> float:
        boxes = scale_boxes(truth.of(owner), truth.sizes[owner], shape)
        return pixel_auc_boxes(levels, boxes)

    if truth.groups[image] < 0 or truth.partners[image] < 0:
        return np.nan, np.nan
    return auc(image), auc(int(truth.partners[image]))


def sweep_image(
    found: LevelBoxes, shape: np.ndarray, image: int, truth: MapTruth, sweep: Sweep
) -> None:
    """Add one image's map to the counts: at each threshold, by the IoU its boxes reach there."""
    group = int(truth.groups[image])
    if group < 0:
        return
    size = truth.sizes[image]
    boxes = truth.of(image)
    sizes = np.broadcast_to(size, (len(boxes), 2))
    # Where nothing is above the threshold the reference evaluator's box is [0, 0, 0, 0].
    largest, contours = level_ious(
        found,
        own_boxes(found.boxes, shape, size, truth.protocol),
        truth_boxes(boxes, sizes, truth.protocol),
        PROTOCOLS[truth.protocol].plus,
        np.zeros(4, np.int64),
    )
    levels = threshold_levels(found.maximum)
    add_counts(sweep.largest[group], largest, levels)
    add_counts(sweep.contours[group], contours, levels)


def score_maps(
    scored: Scored,
    name: str,
    maps: np.ndarray,
    images: np.ndarray,
    truth: MapTruth,
    *,
    rules: tuple[str, ...] = ("paper",),
    own: bool = True,
) -> None:
    """Score one batch of one method's maps into `scored`.

    maps: float [B, H, W]; images: int64 [B], places in `truth`. Adds the columns `X_box` (pixels
    of the map) and `X_found` by the paper's rule, `X_RULE_box` and `X_RULE_found` by the others of
    `rules`, and `X_auc` and `X_auc_other`. own: maps of our nets, whose range is each map's own:
    the sweep stretches each to [0, 1], as the reference evaluator's authors do with theirs. Others'
    are taken as they are. Raises ValueError for NaN, and for others' maps outside [0, 1].
    """
    for rule in rules:
        boxes, found = localize(maps, rule)
        source = name if rule == "paper" else f"{name}_{rule}"
        scored.add(f"{source}_box", boxes)
        scored.add(f"{source}_found", found)
    levels = quantize(stretch(maps) if own else maps)
    counts = no_counts(*maps.shape[1:])
    aucs = []
    for values, image in zip(levels, images.tolist(), strict=True):
        sweep_image(level_boxes(values), np.array(values.shape), image, truth, counts.sweep)
        aucs.append(image_aucs(values, image, truth))
    for column, auc in zip(("auc", "auc_other"), np.array(aucs).reshape(-1, 2).T, strict=True):
        scored.add(f"{name}_{column}", auc)
    counts = replace(counts, levels=levels.sum(axis=0, dtype=np.int64), maps=len(maps))
    scored.counts[name] = scored.counts[name] + counts if name in scored.counts else counts
