"""All thresholds of a score map at once: exact MaxBoxAcc, MaxBoxAccV2 and pixel AUC.

The definition (Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right",
CVPR 2020, and their evaluator): a score map in [0, 1] becomes 256 integer levels; at each of 1000
thresholds the pixels above it are drawn as OpenCV contours, outer borders and borders of holes,
and the box of the largest one (MaxBoxAcc) or the boxes of all of them (V2) are compared with the
true boxes. Only 256 of the thresholds differ, and the contours of neighbouring levels differ
little, so here no contour is drawn at all:

- A hole at level t is a 4-connected component of pixels <= t that does not reach the outside.
  Filling holes commutes with thresholding: one filled map has, at every level, the map's outermost
  8-connected components without their holes.
- An outer contour's area is that of the polygon through its pixels' centres, holes included: over
  the 2 x 2 quads of a filled component, 1 for four pixels and 1/2 for three. The area of a hole's
  contour or of what lies within a hole never exceeds that of the component around it, which OpenCV
  lists before them. So the largest contour is an outermost component. Of equally large ones OpenCV
  lists that first whose first pixel in reading order comes last.
- Components merge as the level falls: one pass over the pixels in descending order gives all of
  them with their boxes and areas (`_components`). It runs on the filled map (outermost contours),
  on the holes' pixels upside down (holes), and on the part that holes enclose (contours in holes).
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

THRESHOLD_STEP = 0.001
IOU_GRID = np.arange(1, 20) / 20  # correctly rounded, so 6 / 20 is the float 0.3
LEVELS = 256
MAX_BOX_ACC_IOU = 0.5
V2_IOUS = (0.3, 0.5, 0.7)

# The eight neighbours (dy, dx) of a pixel in circular order; bit i of a ring mask is neighbour i.
RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


@dataclass(frozen=True, kw_only=True)
class LevelBoxes:
    """Boxes of all contours of a map at all levels, as `level_boxes` finds them.

    boxes: int32 [C, 4], [x0, y0, x1, y1] in inclusive pixels of the map; a contour whose box
    changes with the level has a row for each box, and rows may repeat.
    first, last: int16 [C], the levels t, inclusive, at which that contour has that box.
    largest: int32 [256], the row of the largest contour at each level, -1 where there is none.
    maximum: the map's highest level.
    """

    boxes: np.ndarray
    first: np.ndarray
    last: np.ndarray
    largest: np.ndarray
    maximum: int


def thresholds(step: float = THRESHOLD_STEP) -> np.ndarray:
    """The thresholds, as shares of a map's maximum: float64, 0, step ... below 1."""
    return np.arange(0, 1, step)


def threshold_levels(maximum: int) -> np.ndarray:
    """The level of each threshold for a map whose highest level is `maximum`: int64 [T].

    Pixels strictly above that level are drawn. Truncated from the float64 product.
    """
    return (thresholds() * float(maximum)).astype(np.int64)


def quantize(maps: np.ndarray) -> np.ndarray:
    """Scores in [0, 1] -> levels 0 ... 255: 255 times the score in float64, truncated.

    maps: any float dtype and shape. Returns uint8 of the same shape. Raises ValueError for NaN and
    for scores outside [0, 1].
    """
    scores = np.asarray(maps, np.float64)
    if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(
            f"scores from {scores.min():g} to {scores.max():g} in a map that must lie in [0, 1] "
            "without NaN: levels would wrap around; stretch the maps first."
        )
    return (scores * 255).astype(np.uint8)


def stretch(maps: np.ndarray) -> np.ndarray:
    """Each map's minimum to 0 and maximum to 1: float [B, H, W] -> float64 [B, H, W].

    A flat map becomes zeros. Raises ValueError for NaN and infinite values.
    """
    scores = np.asarray(maps, np.float64)
    lowest = scores.min(axis=(1, 2), keepdims=True)
    spread = scores.max(axis=(1, 2), keepdims=True) - lowest
    if not np.isfinite(spread).all():
        bad = np.flatnonzero(~np.isfinite(spread.ravel())).tolist()
        raise ValueError(
            f"maps {bad} of the batch hold NaN or infinite values, which no range can be "
            "stretched from; check the net that made them."
        )
    return (scores - lowest) / np.where(spread > 0, spread, 1.0)


def _ring_tables(connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """What a pixel joins, by the mask of its neighbours that came before it.

    Returns int8 [256, 4]: a neighbour (index in RING) of each component that the pixel touches, -1
    where there are fewer than four; and int8 [256]: by how much it raises twice the polygon area,
    1 for each 2 x 2 quad in which it is the third or the fourth pixel.
    """

    def reach(dy: int, dx: int) -> bool:
        return max(abs(dy), abs(dx)) == 1 if connectivity == 8 else abs(dy) + abs(dx) == 1

    joins = np.full((256, 4), -1, np.int8)
    gains = np.zeros(256, np.int8)
    for mask in range(256):
        left = {i for i in range(8) if mask >> i & 1}
        found = []
        while left:
            group = [left.pop()]
            for i in group:
                near = {j for j in left if reach(RING[i][0] - RING[j][0], RING[i][1] - RING[j][1])}
                group += near
                left -= near
            touching = [i for i in group if reach(*RING[i])]
            found += touching[:1]
        joins[mask, : len(found)] = found
        corners = ((7, 0, 1), (1, 2, 3), (3, 4, 5), (5, 6, 7))
        gains[mask] = sum(sum(mask >> i & 1 for i in corner) >= 2 for corner in corners)
    return joins, gains


JOINS_8, GAINS = _ring_tables(8)
JOINS_4, _ = _ring_tables(4)


@njit(cache=True)
def _fill_holes(values: np.ndarray) -> np.ndarray:
    """Raise every pixel to the lowest level at which a 4-connected path leads outside.

    values: uint8 [H + 2, S], a map within a frame of zeros. Returns the same form. Two scans and a
    queue for what they leave (Vincent, "Morphological grayscale reconstruction", 1993).
    """
    rows, stride = values.shape
    filled = np.zeros_like(values)
    for y in range(1, rows - 1):
        own, above, here = values[y], filled[y - 1], filled[y]
        level = np.uint8(0)
        for x in range(1, stride - 1):
            level = max(own[x], min(above[x], level))
            here[x] = level
    size = rows * stride
    queue = np.empty(size, np.int32)
    queued = np.zeros(size, np.bool_)
    head = tail = 0
    for y in range(rows - 2, 0, -1):
        own, below, here = values[y], filled[y + 1], filled[y]
        own_below = values[y + 1]
        right = np.uint8(0)
        for x in range(stride - 2, 0, -1):
            level = max(own[x], min(here[x], min(below[x], right)))
            here[x] = level
            if (below[x] > level and below[x] > own_below[x]) or (
                right > level and right > own[x + 1]
            ):
                queue[tail] = y * stride + x
                queued[y * stride + x] = True
                tail += 1
            right = level
    waiting = tail
    tail %= size
    flat, source = filled.ravel(), values.ravel()
    while waiting:
        p = queue[head]
        queued[p] = False
        head = head + 1 if head + 1 < size else 0
        waiting -= 1
        for step in (-stride, -1, 1, stride):
            q = p + step
            if flat[q] > flat[p] and flat[q] > source[q]:
                flat[q] = max(flat[p], source[q])
                if not queued[q]:
                    queued[q] = True
                    queue[tail] = q
                    tail = tail + 1 if tail + 1 < size else 0
                    waiting += 1
    return filled


@njit(cache=True)
def _descending(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels above 0 from the highest to the lowest, those of a level in reading order.

    Returns int32 [N] of flat positions; int64 [257], where each level's pixels end (level v holds
    [ends[v + 1], ends[v])); and uint8 [H + 2, S], for each pixel the ring mask of the neighbours
    that come before it.
    """
    rows, stride = values.shape
    ends = np.zeros(LEVELS + 1, np.int64)
    masks = np.zeros_like(values)
    for y in range(1, rows - 1):
        up, here, down = values[y - 1], values[y], values[y + 1]
        mask = masks[y]
        for x in range(1, stride - 1):
            v = here[x]
            mask[x] = (
                np.uint8(up[x - 1] >= v)
                | np.uint8(up[x] >= v) << np.uint8(1)
                | np.uint8(up[x + 1] >= v) << np.uint8(2)
                | np.uint8(here[x + 1] > v) << np.uint8(3)
                | np.uint8(down[x + 1] > v) << np.uint8(4)
                | np.uint8(down[x] > v) << np.uint8(5)
                | np.uint8(down[x - 1] > v) << np.uint8(6)
                | np.uint8(here[x - 1] >= v) << np.uint8(7)
            )
        for x in range(1, stride - 1):
            ends[here[x]] += 1
    ends[0] = 0
    for v in range(LEVELS - 1, -1, -1):
        ends[v] += ends[v + 1]
    place = ends[1:].copy()
    order = np.empty(ends[0], np.int32)
    for y in range(1, rows - 1):
        for x in range(1, stride - 1):
            v = values[y, x]
            if v:
                order[place[v]] = y * stride + x
                place[v] += 1
    return order, ends, masks


@njit(cache=True)
def _root(parent: np.ndarray, label: int) -> int:
    while parent[label] != label:
        parent[label] = parent[parent[label]]
        label = parent[label]
    return label


@njit(cache=True)
def _first_listed(parent: np.ndarray, area: np.ndarray, start: np.ndarray, best: int) -> int:
    """Of the components of area `best` the one that OpenCV lists first."""
    found = -1
    for label in range(len(parent)):
        if (
            parent[label] == label
            and area[label] == best
            and (found < 0 or start[label] > start[found])
        ):
            found = label
    return found


@njit(cache=True)
def _components(
    values: np.ndarray, joins: np.ndarray, gains: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The components of {values > t} for every t, as rows of (box, first t, last t).

    values: uint8 [H + 2, S], a map within a frame of zeros; S is a power of two. Returns boxes
    int32 [C, 4] in the map's pixels, first and last int16 [C], a pixel of each (int32 [C], flat),
    and the row of the largest component at each level, int32 [256], -1 where there is none.

    A component is a label, that of its first pixel, at the root of a union-find over labels. Its
    row is open while its box stays; `first > last` marks rows that did not outlive a level.
    """
    rows, stride = values.shape
    order, ends, masks = _descending(values)
    masks = masks.ravel()
    shift = 0
    while 1 << shift < stride:
        shift += 1
    ring = np.array([-stride - 1, -stride, 1 - stride, 1, stride + 1, stride, stride - 1, -1])
    steps = np.zeros((256, 4), np.int32)  # as joins, but flat; 0 for none
    # Most pixels join one component beside and above or below a pixel of it: they move neither its
    # box nor, with one before them in reading order, its first pixel, and add to its area.
    quiet = np.zeros(256, np.bool_)
    for mask in range(256):
        vertical, sideways, before = mask & 0x22, mask & 0x88, mask & 0x87
        quiet[mask] = joins[mask, 1] < 0 and vertical and sideways and before
        for k in range(4):
            if joins[mask, k] >= 0:
                steps[mask, k] = ring[joins[mask, k]]
    size = len(order)
    label = np.empty(rows * stride, np.int32)
    parent, area = np.empty(size, np.int32), np.empty(size, np.int32)
    row, start = np.empty(size, np.int32), np.empty(size, np.int32)
    boxes = np.empty((size, 4), np.int32)
    first, last = np.empty(size, np.int16), np.empty(size, np.int16)
    pixel = np.empty(size, np.int32)
    largest = np.full(LEVELS, -1, np.int32)
    labels = used = equal = 0  # equal: how many components have the largest area
    best, holder = -1, -1
    for v in range(LEVELS - 1, 0, -1):
        for i in range(ends[v + 1], ends[v]):
            p = order[i]
            mask = masks[p]
            if quiet[mask]:
                r = label[p + steps[mask, 0]]
                if parent[r] != r:
                    r = _root(parent, r)
                label[p] = r
                area[r] += gains[mask]
                if area[r] > best:
                    best, equal, holder = area[r], 1, r
                elif area[r] == best:
                    equal += 1
                    holder = r
                continue
            x0 = x1 = (p & (stride - 1)) - 1
            y0 = y1 = (p >> shift) - 1
            if steps[mask, 0] == 0:
                r = labels
                labels += 1
                parent[r], area[r], row[r], start[r] = r, 0, used, p
                boxes[used, 0], boxes[used, 1], boxes[used, 2], boxes[used, 3] = x0, y0, x1, y1
                last[used], pixel[used] = v - 1, p
                used += 1
                total = 0
            else:
                r = _root(parent, label[p + steps[mask, 0]])
                equal -= area[r] == best
                total = area[r] + gains[mask]
                for k in range(1, 4):
                    if steps[mask, k] == 0:
                        break
                    other = _root(parent, label[p + steps[mask, k]])
                    if other == r:
                        continue
                    equal -= area[other] == best
                    total += area[other]
                    if area[other] > area[r]:
                        r, other = other, r
                    parent[other] = r
                    start[r] = min(start[r], start[other])
                    e = row[other]
                    first[e] = v
                    x0, y0 = min(x0, boxes[e, 0]), min(y0, boxes[e, 1])
                    x1, y1 = max(x1, boxes[e, 2]), max(y1, boxes[e, 3])
                start[r] = min(start[r], p)
                e = row[r]
                if x0 < boxes[e, 0] or y0 < boxes[e, 1] or x1 > boxes[e, 2] or y1 > boxes[e, 3]:
                    if last[e] >= v:
                        first[e] = v
                        boxes[used] = boxes[e]
                        last[used], pixel[used] = v - 1, p
                        row[r] = e = used
                        used += 1
                    boxes[e, 0], boxes[e, 1] = min(x0, boxes[e, 0]), min(y0, boxes[e, 1])
                    boxes[e, 2], boxes[e, 3] = max(x1, boxes[e, 2]), max(y1, boxes[e, 3])
            label[p] = r
            area[r] = total
            if total > best:
                best, equal, holder = total, 1, r
            elif total == best:
                equal += 1
                holder = r
        winner = _first_listed(parent[:labels], area, start, best) if equal > 1 else holder
        if winner >= 0:
            largest[v - 1] = row[winner]
    for r in range(labels):
        if parent[r] == r:
            first[row[r]] = 0
    kept = 0
    moved = np.full(used, -1, np.int32)
    for e in range(used):
        if first[e] <= last[e]:
            boxes[kept], first[kept], last[kept] = boxes[e], first[e], last[e]
            pixel[kept] = pixel[e]
            moved[e] = kept
            kept += 1
    for t in range(LEVELS):
        if largest[t] >= 0:
            largest[t] = moved[largest[t]]
    return (
        boxes[:kept].copy(),
        first[:kept].copy(),
        last[:kept].copy(),
        pixel[:kept].copy(),
        largest,
    )


def _framed(levels: np.ndarray) -> np.ndarray:
    """A map within a frame of zeros, its rows padded to a power of two."""
    height, width = levels.shape
    framed = np.zeros((height + 2, 1 << (width + 1).bit_length()), np.uint8)
    framed[1 : height + 1, 1 : width + 1] = levels
    return framed


@njit(cache=True)
def _enclosed(
    levels: np.ndarray, basins: np.ndarray, joins: np.ndarray, gains: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows of the contours that lie within `basins`, boxes int32 [N, 4] of holes.

    Components that reach the edge of such a box are not enclosed, so they are listed already.
    """
    found = []
    for i in range(len(basins)):
        x0, y0, x1, y1 = basins[i]
        stride = 1
        while stride < x1 - x0 + 3:
            stride *= 2
        framed = np.zeros((y1 - y0 + 3, stride), np.uint8)
        framed[1:-1, 1 : x1 - x0 + 2] = levels[y0 : y1 + 1, x0 : x1 + 1]
        boxes, first, last, _, _ = _components(framed, joins, gains)
        kept = 0
        for k in range(len(boxes)):
            low, high = boxes[k, :2], boxes[k, 2:]
            if min(low[0], low[1]) > 0 and high[0] < x1 - x0 and high[1] < y1 - y0:
                boxes[kept, :2] = low + basins[i, :2]
                boxes[kept, 2:] = high + basins[i, :2]
                first[kept], last[kept] = first[k], last[k]
                kept += 1
        if kept:
            found.append((boxes[:kept], first[:kept], last[:kept]))
    return found


def _basins(holes: np.ndarray, map_size: int) -> np.ndarray:
    """Where contours in holes can be: boxes of the holes with room, or one around them all if
    that is less to look at."""
    roomy = holes[(holes[:, 2:] - holes[:, :2] >= 2).all(axis=1)]
    if (roomy[:, 2:] - roomy[:, :2] + 1).prod(axis=1).sum() <= map_size:
        return roomy
    return np.concatenate([roomy[:, :2].min(axis=0), roomy[:, 2:].max(axis=0)])[None]


def level_boxes(levels: np.ndarray) -> LevelBoxes:
    """Every contour's box at every level, exactly as OpenCV's contours at each level give them.

    levels: uint8 [H, W]. A hole's box includes the pixels around the hole, on which its contour
    lies. Raises ValueError for other arrays.
    """
    if levels.dtype != np.uint8 or levels.ndim != 2 or not levels.size:
        raise ValueError(
            f"levels are {levels.dtype} {list(levels.shape)}; they must be uint8 [H, W] with at "
            "least one pixel: thresholds would mean nothing; use quantize on each map."
        )
    framed = _framed(levels)
    filled = _fill_holes(framed)
    boxes, first, last, _, largest = _components(filled, JOINS_8, GAINS)
    found = [(boxes, first, last)]
    in_holes = filled > framed
    if in_holes.any():
        upside_down = np.where(in_holes, 255 - framed, 0).astype(np.uint8)
        boxes, low, high, pixels, _ = _components(upside_down, JOINS_4, GAINS)
        gone = filled.ravel()[pixels].astype(np.int16) - 1  # from there the hole is outside
        grown = boxes + np.array([-1, -1, 1, 1], np.int32)
        found.append((grown, 254 - high, np.minimum(254 - low, gone)))
        basins = _basins(boxes[low == 0], levels.size)
        if len(basins):
            found += _enclosed(levels, basins, JOINS_8, GAINS)
    return LevelBoxes(
        boxes=np.concatenate([rows[0] for rows in found]),
        first=np.concatenate([rows[1] for rows in found]),
        last=np.concatenate([rows[2] for rows in found]),
        largest=largest,
        maximum=int(levels.max()),
    )


@njit(cache=True)
def _iou(box: np.ndarray, truths: np.ndarray, plus: int) -> float:
    """The best IoU of a box over truths; 0 where both are empty."""
    best = 0.0
    area = (box[2] - box[0] + plus) * (box[3] - box[1] + plus)
    for k in range(len(truths)):
        other = truths[k]
        width = min(box[2], other[2]) - max(box[0], other[0]) + plus
        height = min(box[3], other[3]) - max(box[1], other[1]) + plus
        shared = max(0.0, width) * max(0.0, height)
        union = area + (other[2] - other[0] + plus) * (other[3] - other[1] + plus) - shared
        if union > 0:
            best = max(best, shared / union)
    return best


@njit(cache=True)
def _level_ious(
    boxes: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    largest: np.ndarray,
    truths: np.ndarray,
    plus: int,
    empty: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    one = np.empty(LEVELS, np.float64)
    each = np.empty(len(boxes), np.float64)
    # Row k holds maxima over 2 ** k levels: a span of levels is two entries, passed down at last.
    spans = np.zeros((9, LEVELS), np.float64)
    for i in range(len(boxes)):
        value = each[i] = _iou(boxes[i], truths, plus)
        k = 0
        while 2 << k <= last[i] - first[i] + 1:
            k += 1
        early, late = int(first[i]), int(last[i]) + 1 - (1 << k)
        spans[k, early] = max(spans[k, early], value)
        spans[k, late] = max(spans[k, late], value)
    for k in range(8, 0, -1):
        half = 1 << (k - 1)
        for start in range(LEVELS - 2 * half + 1):
            value = spans[k, start]
            spans[k - 1, start] = max(spans[k - 1, start], value)
            spans[k - 1, start + half] = max(spans[k - 1, start + half], value)
    nothing = _iou(empty, truths, plus)
    for t in range(LEVELS):
        if largest[t] >= 0:
            one[t] = each[largest[t]]
        else:
            one[t] = spans[0, t] = nothing
    return one, spans[0].copy()


def level_ious(
    found: LevelBoxes, boxes: np.ndarray, truths: np.ndarray, plus: int, empty: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """IoU with the true boxes at each level: of the largest contour's box, and the best of all.

    boxes: [C, 4], `found.boxes` in the coordinates of truths; truths: [T, 4], the best counts;
    plus: 1 where coordinates are inclusive pixels, else 0; empty: [4], the box that stands for
    "nothing found". Returns two float64 [256] in [0, 1].
    """
    return _level_ious(
        np.ascontiguousarray(boxes, np.float64),
        found.first,
        found.last,
        found.largest,
        np.ascontiguousarray(truths, np.float64),
        plus,
        np.ascontiguousarray(empty, np.float64),
    )


@njit(cache=True)
def _add_counts(counts: np.ndarray, ious: np.ndarray, levels: np.ndarray, grid: np.ndarray) -> None:
    passed = np.searchsorted(grid, ious, side="right")
    for i in range(len(levels)):
        counts[i, passed[levels[i]]] += 1


def add_counts(counts: np.ndarray, ious: np.ndarray, levels: np.ndarray) -> None:
    """Count one image in place: at each threshold, how many IoUs of IOU_GRID its own reaches.

    counts: int64 [T, 20]; ious: float64 [256], by level; levels: int [T], `threshold_levels`.
    Counts of parts of a data set add up to the counts of the whole.
    """
    _add_counts(counts, ious, levels, IOU_GRID)


def _right(counts: np.ndarray, iou: float) -> np.ndarray:
    """Images whose IoU is at least `iou` (of IOU_GRID), by threshold: int64 [T]."""
    return counts[:, int(np.flatnonzero(iou == IOU_GRID)[0]) + 1 :].sum(axis=1)


def max_box_acc(counts: np.ndarray, images: int) -> tuple[float, float]:
    """MaxBoxAcc: the best share of right images (IoU .5) over the thresholds, and its threshold.

    counts: int64 [T, 20] of the largest contours (`add_counts`), T = len(thresholds()). Of equal
    thresholds the smallest.
    """
    right = _right(counts, MAX_BOX_ACC_IOU)
    best = int(right.argmax())
    return int(right[best]) / images, float(thresholds()[best])


def max_box_acc_v2(counts: np.ndarray, images: int) -> float:
    """MaxBoxAccV2: the mean over IoU .3, .5, .7 of the best share over the thresholds of each.

    counts: int64 [T, 20] of the best of all contours (`add_counts`).
    """
    return sum(int(_right(counts, iou).max()) for iou in V2_IOUS) / (len(V2_IOUS) * images)


@njit(cache=True)
def _histograms(levels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    counts = np.zeros((2, LEVELS), np.int64)
    for y in range(levels.shape[0]):
        for x in range(levels.shape[1]):
            counts[int(inside[y, x]), levels[y, x]] += 1
    return counts


def pixel_auc(levels: np.ndarray, inside: np.ndarray) -> float:
    """The probability that a pixel inside scores above one outside, equal scores counted half.

    levels: uint8 [H, W]; inside: bool [H, W]. From integer counts, rounded once. NaN where there
    is nothing inside or nothing outside.
    """
    outside, within = _histograms(levels, inside)
    pairs = int(outside.sum()) * int(within.sum())
    if not pairs:
        return float("nan")
    below = np.cumsum(outside) - outside
    return int((within * (2 * below + outside)).sum()) / (2 * pairs)


def pixel_auc_boxes(levels: np.ndarray, boxes: np.ndarray) -> float:
    """`pixel_auc` of the union of boxes: int [T, 4], inclusive pixels within the map."""
    inside = np.zeros(levels.shape, bool)
    for x0, y0, x1, y1 in boxes.tolist():
        inside[y0 : y1 + 1, x0 : x1 + 1] = True
    return pixel_auc(levels, inside)
