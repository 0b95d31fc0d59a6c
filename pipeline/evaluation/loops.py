"""The sweep's loops over pixels, components and levels, compiled by numba (see `sweep`)."""

from typing import NamedTuple

import numpy as np

from pipeline.compiled import njit

LEVELS = 256

# The eight neighbours (dy, dx) of a pixel in circular order; bit i of a ring mask is neighbour i.
RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def _ring_tables(connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """Tabulate what a pixel joins, by the ring mask of the neighbours before it: int8 [256, 4], a
    neighbour (index in RING) of each component that it touches, or -1; and int8 [256], by how much
    it raises twice the polygon's area, 1 for each 2 x 2 quad in which it is the third or fourth
    pixel."""

    def reach(dy: int, dx: int) -> bool:
        return max(abs(dy), abs(dx)) == 1 if connectivity == 8 else abs(dy) + abs(dx) == 1

    joins = np.full((256, 4), -1, np.int8)
    gains = np.zeros(256, np.int8)
    for mask in range(256):
        left = {i for i in range(8) if mask >> i & 1}
        touched = []
        while left:
            group = [left.pop()]
            for i in group:
                near = {j for j in left if reach(RING[i][0] - RING[j][0], RING[i][1] - RING[j][1])}
                group += near
                left -= near
            touched += [i for i in group if reach(*RING[i])][:1]
        joins[mask, : len(touched)] = touched
        corners = ((7, 0, 1), (1, 2, 3), (3, 4, 5), (5, 6, 7))
        gains[mask] = sum(sum(mask >> i & 1 for i in corner) >= 2 for corner in corners)
    return joins, gains


JOINS_8, GAINS = _ring_tables(8)
JOINS_4, _ = _ring_tables(4)


@njit(cache=True, nogil=True)
def fill_holes(values: np.ndarray) -> np.ndarray:
    """Raise every pixel to the lowest level at which a 4-connected path leads outside. values:
    uint8 [H + 2, S], a map within a frame of zeros. Returns the same form. Two scans and a queue
    for what they leave (Vincent, "Morphological grayscale reconstruction", 1993)."""
    rows, stride = values.shape
    filled = np.zeros_like(values)
    for y in range(1, rows - 1):
        own, above, row = values[y], filled[y - 1], filled[y]
        level = np.uint8(0)
        for x in range(1, stride - 1):
            level = max(own[x], min(above[x], level))
            row[x] = level
    size = rows * stride
    queue = np.empty(size, np.int32)
    queued = np.zeros(size, np.bool_)
    head = tail = 0
    for y in range(rows - 2, 0, -1):
        own, below, row = values[y], filled[y + 1], filled[y]
        own_below = values[y + 1]
        right = np.uint8(0)
        for x in range(stride - 2, 0, -1):
            level = max(own[x], min(row[x], min(below[x], right)))
            row[x] = level
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


@njit(cache=True, nogil=True)
def _descending(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort the pixels above 0 from the highest to the lowest, within a level in reading order.
    Returns their flat positions, uint32 [N]; where each level's end, int64 [257]; and each pixel's
    ring mask of the neighbours before it, uint8 [H + 2, S]."""
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
    following = ends[1:].copy()  # where the next pixel of each level goes
    order = np.empty(ends[0], np.uint32)
    for y in range(1, rows - 1):
        for x in range(1, stride - 1):
            v = values[y, x]
            if v:
                order[following[v]] = y * stride + x
                following[v] += 1
    return order, ends, masks


# A component of {values > t} while t falls, an element of a union-find: parent, its index or that
# of what it was merged into. Valid at roots: area, twice the polygon's; start, the first pixel in
# reading order; row, the index of the row with its box.
COMPONENT = np.dtype([("parent", "i4"), ("area", "i4"), ("start", "i4"), ("row", "i4")])
# A box of a component, in the map's pixels, inclusive; a pixel of the component, flat; and the
# levels t at which it has that box.
_CORNERS = [("x0", "i4"), ("y0", "i4"), ("x1", "i4"), ("y1", "i4")]
ROW = np.dtype([*_CORNERS, ("pixel", "i4"), ("first", "i2"), ("last", "i2")])


_Box = tuple[int, int, int, int]  # x0, y0, x1, y1


class _Rows(NamedTuple):
    """Rows of boxes, a column per field of ROW; largest: int32 [256], the row of the largest
    component at each level t, -1 where there is none."""

    boxes: np.ndarray
    first: np.ndarray
    last: np.ndarray
    pixel: np.ndarray
    largest: np.ndarray


@njit(cache=True, nogil=True)
def _flat_joins(joins: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Return joins as steps between flat positions, int32 [256, 4], 0 for none; and bool [256],
    whether such a pixel only adds to a component's area: with a horizontal and a vertical neighbour
    it cannot enlarge the box, with an earlier one it cannot become the first pixel."""
    ring = np.array([-stride - 1, -stride, 1 - stride, 1, stride + 1, stride, stride - 1, -1])
    steps = np.zeros((256, 4), np.int32)
    only_area = np.zeros(256, np.bool_)
    for mask in range(256):
        vertical, horizontal, earlier = mask & 0x22, mask & 0x88, mask & 0x87
        only_area[mask] = joins[mask, 1] < 0 and vertical and horizontal and earlier
        for k in range(4):
            if joins[mask, k] >= 0:
                steps[mask, k] = ring[joins[mask, k]]
    return steps, only_area


@njit(cache=True, nogil=True)
def _root(components: np.ndarray, r: int) -> int:
    parent = components[r].parent
    while parent != r:
        grandparent = components[parent].parent
        components[r].parent = grandparent
        r, parent = grandparent, components[grandparent].parent
    return r


@njit(inline="always")
def _start_component(
    components: np.ndarray, r: int, rows: np.ndarray, e: int, p: int, x: int, y: int, v: int
) -> None:
    """Make the pixel p = (x, y), which touches no other at level v, component r with row e."""
    component, row = components[r], rows[e]
    component.parent, component.area, component.start, component.row = r, 0, p, e
    row.x0, row.y0, row.x1, row.y1 = x, y, x, y
    row.pixel, row.last = p, v - 1


@njit(inline="always")
def _merge(
    components: np.ndarray, r: int, other: int, rows: np.ndarray, box: _Box, v: int
) -> tuple[int, _Box]:
    """Unite two components at level v; the larger one lives on. Returns it, and `box` enlarged by
    that of the other, whose row ends."""
    if components[other].area > components[r].area:
        r, other = other, r
    components[other].parent = r
    components[r].start = min(components[r].start, components[other].start)
    row = rows[components[other].row]
    row.first = v
    x0, y0, x1, y1 = box
    return r, (min(x0, row.x0), min(y0, row.y0), max(x1, row.x1), max(y1, row.y1))


@njit(inline="always")
def _extend_row(
    components: np.ndarray, r: int, rows: np.ndarray, used: int, box: _Box, p: int, v: int
) -> int:
    """Enlarge the box of component r by `box`. Returns the number of rows: a box that lived at a
    higher level stays in its row, and the component gets a new one."""
    row = rows[components[r].row]
    x0, y0, x1, y1 = box
    if x0 < row.x0 or y0 < row.y0 or x1 > row.x1 or y1 > row.y1:
        x0, y0, x1, y1 = min(x0, row.x0), min(y0, row.y0), max(x1, row.x1), max(y1, row.y1)
        if row.last >= v:
            row.first = v
            components[r].row = used
            row = rows[used]
            row.pixel, row.last = p, v - 1
            used += 1
        row.x0, row.y0, row.x1, row.y1 = x0, y0, x1, y1
    return used


@njit(cache=True, nogil=True)
def _first_listed(components: np.ndarray, best: int) -> int:
    """Return the component, of those with area `best`, that OpenCV lists first."""
    first = -1
    for r in range(len(components)):
        if (
            components[r].parent == r
            and components[r].area == best
            and (first < 0 or components[r].start > components[first].start)
        ):
            first = r
    return first


@njit(cache=True, nogil=True)
def find_components(values: np.ndarray, joins: np.ndarray, gains: np.ndarray) -> _Rows:
    """Find the components of {values > t} for every t. values: uint8 [H + 2, S], a map within a
    frame of zeros; S is a power of two. joins, gains: see `_ring_tables`."""
    stride = values.shape[1]
    order, ends, masks = _descending(values)
    masks = masks.ravel()
    shift = 0
    while 1 << shift < stride:
        shift += 1
    steps, only_area = _flat_joins(joins, stride)
    component = np.empty(values.size, np.int32)  # of each pixel; its root counts
    components = np.empty(len(order), COMPONENT)
    rows = np.empty(len(order), ROW)
    largest = np.full(LEVELS, -1, np.int32)
    started = used = 0  # components and rows
    # The largest area, how many components have it, and one of them.
    best, equal, holder = -1, 0, -1
    for v in range(LEVELS - 1, 0, -1):
        for i in range(ends[v + 1], ends[v]):
            p = order[i]
            mask = masks[p]
            if only_area[mask]:  # most pixels
                r = component[p + steps[mask, 0]]
                root = components[r]
                if root.parent != r:
                    r = _root(components, r)
                    root = components[r]
                area = root.area + gains[mask]
            elif steps[mask, 0] == 0:
                r, area = started, 0
                x, y = (p & (stride - 1)) - 1, (p >> shift) - 1
                _start_component(components, r, rows, used, p, x, y, v)
                started += 1
                used += 1
            else:
                x, y = (p & (stride - 1)) - 1, (p >> shift) - 1
                box = x, y, x, y
                r = _root(components, component[p + steps[mask, 0]])
                equal -= components[r].area == best
                area = components[r].area + gains[mask]
                for k in range(1, 4):
                    if steps[mask, k] == 0:
                        break
                    other = _root(components, component[p + steps[mask, k]])
                    if other != r:
                        equal -= components[other].area == best
                        area += components[other].area
                        r, box = _merge(components, r, other, rows, box, v)
                components[r].start = min(components[r].start, p)
                used = _extend_row(components, r, rows, used, box, p, v)
            component[p] = r
            components[r].area = area
            if area > best:
                best, equal, holder = area, 1, r
            elif area == best:
                equal += 1
                holder = r
        winner = _first_listed(components[:started], best) if equal > 1 else holder
        if winner >= 0:
            largest[v - 1] = components[winner].row
    for r in range(started):
        if components[r].parent == r:
            rows[components[r].row].first = 0
    return _compact(rows[:used], largest)


@njit(cache=True, nogil=True)
def _compact(rows: np.ndarray, largest: np.ndarray) -> _Rows:
    """Keep the rows that outlived a level: of the others first is above last."""
    moved = np.full(len(rows), -1, np.int32)
    kept = 0
    for e in range(len(rows)):
        if rows[e].first <= rows[e].last:
            moved[e] = kept
            kept += 1
    boxes, pixels = np.empty((kept, 4), np.int32), np.empty(kept, np.int32)
    first, last = np.empty(kept, np.int16), np.empty(kept, np.int16)
    for e in range(len(rows)):
        if moved[e] >= 0:
            row, k = rows[e], moved[e]
            boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3] = row.x0, row.y0, row.x1, row.y1
            first[k], last[k], pixels[k] = row.first, row.last, row.pixel
    for t in range(LEVELS):
        if largest[t] >= 0:
            largest[t] = moved[largest[t]]
    return _Rows(boxes, first, last, pixels, largest)


@njit(cache=True, nogil=True)
def find_enclosed(
    levels: np.ndarray, basins: np.ndarray, joins: np.ndarray, gains: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Find the contours that lie within `basins`, boxes int32 [N, 4] of holes: boxes, first, last.
    Components that reach the edge of such a box are not enclosed: they are known already."""
    parts = []
    for i in range(len(basins)):
        x0, y0, x1, y1 = basins[i]
        stride = 1
        while stride < x1 - x0 + 3:
            stride *= 2
        framed = np.zeros((y1 - y0 + 3, stride), np.uint8)
        framed[1:-1, 1 : x1 - x0 + 2] = levels[y0 : y1 + 1, x0 : x1 + 1]
        boxes, first, last, _, _ = find_components(framed, joins, gains)
        kept = 0
        for k in range(len(boxes)):
            low, high = boxes[k, :2], boxes[k, 2:]
            if min(low[0], low[1]) > 0 and high[0] < x1 - x0 and high[1] < y1 - y0:
                boxes[kept, :2] = low + basins[i, :2]
                boxes[kept, 2:] = high + basins[i, :2]
                first[kept], last[kept] = first[k], last[k]
                kept += 1
        if kept:
            parts.append((boxes[:kept], first[:kept], last[:kept]))
    return parts


@njit(cache=True, nogil=True)
def _iou(box: np.ndarray, truths: np.ndarray, plus: int) -> float:
    """Return the best IoU of a box over truths; 0 where both are empty."""
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


@njit(cache=True, nogil=True)
def level_ious(
    boxes: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    largest: np.ndarray,
    truths: np.ndarray,
    plus: int,
    empty: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    of_largest = np.empty(LEVELS, np.float64)
    each = np.empty(len(boxes), np.float64)
    # Row k has maxima over 2 ** k levels: a span of levels is two entries, which may overlap. The
    # maxima are passed down to row 0 at the end.
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
            of_largest[t] = each[largest[t]]
        else:
            of_largest[t] = spans[0, t] = nothing
    return of_largest, spans[0].copy()


@njit(cache=True, nogil=True)
def add_counts(counts: np.ndarray, ious: np.ndarray, levels: np.ndarray, grid: np.ndarray) -> None:
    passed = np.searchsorted(grid, ious, side="right")
    for i in range(len(levels)):
        counts[i, passed[levels[i]]] += 1


@njit(cache=True, nogil=True)
def histograms(levels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    counts = np.zeros((2, LEVELS), np.int64)
    for y in range(levels.shape[0]):
        for x in range(levels.shape[1]):
            counts[int(inside[y, x]), levels[y, x]] += 1
    return counts
