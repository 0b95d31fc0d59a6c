"""A generated data set with known boxes, in ILSVRC's own folder layout. Each class is a texture,
and only in part a shape and hue; backgrounds tell no class, and no constant box scores well
(`benchmarks/synthetic_controls.py`)."""

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

JPEG_QUALITY = 92
SPLIT_SEEDS = {"train": 0, "val": 1}
CLASS_SHAPE_SHARE = 0.7  # of objects that have their class's own shape
CLASS_HUE_SHARE = 0.75  # of objects that have one of their class's two hues
SEVERAL_SHARE = 0.25  # of images that hold two or three objects of the class
GAP = 4  # pixels between the boxes of two objects


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Size and seed of the set. Sides of images are drawn uniformly from `min_side` to `max_side`
    pixels. The box of an object covers a share of `min_area` to `max_area` of the image."""

    train_images: int = 5000
    val_images: int = 1000
    min_side: int = 112
    max_side: int = 144
    min_area: float = 0.05
    max_area: float = 0.5
    seed: int = 0


CLASS_NAMES = ("stripes", "checks", "dots", "rings", "grid", "spokes", "zigzag", "speckle")
WNIDS = tuple(f"n{i + 1:08d}" for i in range(len(CLASS_NAMES)))


def _texture(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return a class's texture, about -1 (dark) to 1 (light), at the coordinates u, v. u, v: float
    arrays of one shape, in periods of the texture from the object's centre."""
    match name:
        case "stripes":
            return np.sin(2 * np.pi * u)
        case "checks":
            return np.sin(np.pi * u * 1.3) * np.sin(np.pi * v * 1.3) * 3
        case "dots":
            return (0.3 - np.hypot(u - np.round(u), v - np.round(v))) * 8
        case "rings":
            return np.sin(2 * np.pi * np.hypot(u, v))
        case "grid":
            return (0.16 - np.minimum(np.abs(u - np.round(u)), np.abs(v - np.round(v)))) * 8
        case "spokes":
            return np.sin(12 * np.arctan2(v, u)) * 2
        case "zigzag":
            return np.sin(2 * np.pi * (u + 1.2 * np.abs(v / 1.5 - np.round(v / 1.5))))
        case "speckle":
            cells = np.floor(2.5 * u).astype(np.int64), np.floor(2.5 * v).astype(np.int64)
            mixed = (cells[0] * 73856093 ^ cells[1] * 19349663) * 2654435761
            return ((mixed >> 13) & 255) / 85 - 1.5
    raise ValueError(f"no texture {name!r}; there are {', '.join(CLASS_NAMES)}")


def _polygon(corners: int, inner: float = 1.0) -> np.ndarray:
    """Return corner points [n, 2] on the unit circle; `inner` < 1 makes a star."""
    points = np.arange(2 * corners)[:: 2 if inner == 1.0 else 1]
    angles, radii = points * np.pi / corners, np.where(points % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


_QUARTERS = [(1, 0), (0, 1), (-1, 0), (0, -1)]  # cosine and sine of the angles
_ARM = [(1, -0.4), (1, 0.4), (0.4, 0.4)]
_CROSS = np.array([(x * c - y * s, x * s + y * c) for c, s in _QUARTERS for x, y in _ARM])
SHAPES = (
    _polygon(40),  # disc
    _polygon(4),  # square
    _polygon(3),  # triangle
    _polygon(6),  # hexagon
    _polygon(5, inner=0.55),  # star
    _CROSS,
    np.array([(-1, -0.6), (0.6, -0.6), (1, 0.6), (-0.6, 0.6)]),  # parallelogram
    np.concatenate([_polygon(40)[:21] * [1, 1.4] - [0, 0.6], [[-1, -0.6]]]),  # half disc
)


def _colour(hue: float, rng: np.random.Generator) -> np.ndarray:
    hsv = np.array([[[hue % 1.0 * 180, rng.uniform(110, 220), rng.uniform(120, 230)]]])
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Return float32 noise [height, width, 3], of unit variance at `cells` x `cells` points."""
    coarse = rng.normal(size=(cells, cells, 3)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return blotches and grain of several scales with distractors on them: float32 [H, W, 3]."""
    base = rng.uniform(60, 190, 3).astype(np.float32)
    canvas = base + 28 * _smooth_noise(rng, height, width, int(rng.integers(2, 5)))
    canvas += rng.uniform(4, 16) * _smooth_noise(rng, height, width, int(rng.integers(8, 24)))
    canvas += rng.uniform(2, 9) * rng.normal(size=(height, width, 1)).astype(np.float32)
    for _ in range(int(rng.integers(3, 7))):
        size = rng.uniform(0.08, 0.3) * min(height, width)
        centre = rng.uniform(0, 1, 2) * [width, height]
        corners = _rotated(SHAPES[rng.integers(len(SHAPES))], rng) * size + centre
        alpha = _fill(corners, height, width)[..., None] * rng.uniform(0.6, 1.0)
        canvas = canvas * (1 - alpha) + _colour(rng.uniform(), rng) * alpha
    return canvas


def _rotated(corners: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the shape with a random aspect, up to exp(0.3), and a random rotation."""
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return (corners * [stretch, 1 / stretch]) @ turn


def _fill(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the share, float32 [height, width] in 0..1, of each pixel that the polygon covers.
    corners: [n, 2] in pixels, x first."""
    mask = np.zeros((height, width), np.uint8)
    fixed = np.round((corners - 0.5) * 16).astype(np.int32)
    return cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, shift=4).astype(np.float32) / 255


def _draw_object(
    canvas: np.ndarray, label: int, area: float, taken: list[list[int]], rng: np.random.Generator
) -> list[int] | None:
    """Draw an object of class `label` into `canvas` and return its box, None without room for it.
    area: of the box, as a share of the image. taken: boxes to stay away from."""
    height, width = canvas.shape[:2]
    own_shape = rng.uniform() < CLASS_SHAPE_SHARE
    corners = _rotated(SHAPES[label if own_shape else rng.integers(len(SHAPES))], rng)
    low, high = corners.min(axis=0), corners.max(axis=0)
    scale = np.sqrt(area * height * width / np.prod(high - low))
    room = np.array([width, height]) - (high - low) * scale
    if room.min() < 0:
        return None
    corners = (corners - low) * scale + rng.uniform(0, 1, 2) * room
    alpha = _fill(corners, height, width)
    rows, columns = (alpha > 0.5).nonzero()
    box = [int(x) for x in (columns.min(), rows.min(), columns.max(), rows.max())]
    if any(_near(box, other) for other in taken):
        return None
    hue = (label // 2) * 0.25 + rng.choice([0.0, 0.12]) + rng.normal() * 0.01
    if rng.uniform() > CLASS_HUE_SHARE:
        hue = rng.uniform()
    dark, light = _colour(hue, rng) * 0.45, _colour(hue + rng.normal() * 0.03, rng) + 45
    period = rng.uniform(9, 14)
    turn = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x - np.float32(corners[:, 0].mean()), y - np.float32(corners[:, 1].mean())
    u = (np.cos(turn) * x + np.sin(turn) * y) / period
    v = (-np.sin(turn) * x + np.cos(turn) * y) / period
    blend = 0.5 + 0.5 * np.tanh(2 * _texture(CLASS_NAMES[label], u, v))[..., None]
    colour = dark + (light - dark) * blend
    canvas[:] = canvas * (1 - alpha[..., None]) + colour * alpha[..., None]
    return box


def _near(box: list[int], other: list[int]) -> bool:
    """Return whether less than GAP pixels lie between two boxes, in both directions."""
    return all(
        box[axis] <= other[axis + 2] + GAP and other[axis] <= box[axis + 2] + GAP for axis in (0, 1)
    )


def draw_image(
    config: SyntheticConfig, split: str, index: int
) -> tuple[np.ndarray, np.ndarray, int, list[list[int]]]:
    """Draw image `index` of a split: (image, the same without its objects, label, boxes). Images
    are uint8 RGB [H, W, 3], boxes [x0, y0, x1, y1] in inclusive pixels."""
    rng = np.random.default_rng([config.seed, SPLIT_SEEDS[split], index])
    label = index % len(CLASS_NAMES)
    height, width = (int(side) for side in rng.integers(config.min_side, config.max_side + 1, 2))
    canvas = _background(rng, height, width)
    empty = canvas.copy()
    wanted = int(rng.integers(2, 4)) if rng.uniform() < SEVERAL_SHARE else 1
    smallest, largest = np.sqrt([config.min_area * 1.1, config.max_area / wanted * 0.95])
    boxes: list[list[int]] = []
    while len(boxes) < wanted:
        area = rng.uniform(smallest, largest) ** 2
        box = _draw_object(canvas, label, area, boxes, rng)
        if box is not None:
            boxes.append(box)
        elif boxes and rng.uniform() < 0.05:
            break  # no room beside the others: one object fewer
    grain = rng.normal(size=(height, width, 3)).astype(np.float32) * 4
    image, without = (np.clip(x + grain, 0, 255).astype(np.uint8) for x in (canvas, empty))
    return image, without, label, boxes


def annotation_xml(
    name: str, wnid: str, boxes: Iterable[Sequence[int]], size: tuple[int, int] | None
) -> str:
    """Return an annotation as ILSVRC writes it. boxes: [x0, y0, x1, y1] in inclusive pixels of an
    image of `size` (width, height); None leaves the size out."""
    sides = "<size><width>{}</width><height>{}</height><depth>3</depth></size>"
    stated = sides.format(*size) if size else ""
    objects = "".join(
        f"<object><name>{wnid}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for x0, y0, x1, y1 in boxes
    )
    return f"<annotation><filename>{name}</filename>{stated}{objects}</annotation>\n"


def _write_image(output: Path, config: SyntheticConfig, split: str, index: int) -> None:
    image, _, label, boxes = draw_image(config, split, index)
    wnid = WNIDS[label]
    if split == "train":
        name = f"train/{wnid}/{wnid}_{index // len(WNIDS)}"
    else:
        name = f"val/ILSVRC2012_val_{index + 1:08d}"
    xml = annotation_xml(name.split("/")[-1], wnid, boxes, (image.shape[1], image.shape[0]))
    encoded = simplejpeg.encode_jpeg(image, JPEG_QUALITY, colorsubsampling="420")
    (output / f"{name}.JPEG").write_bytes(encoded)
    (output / f"boxes/{name}.xml").write_text(xml)


def write_synthetic(output: Path, config: SyntheticConfig) -> None:
    """Write `train/<wnid>/*.JPEG`, `val/*.JPEG`, `boxes/` with the XML of both, and
    `LOC_synset_mapping.txt`. The same configuration gives the same bytes."""
    for folder in ["val", *(f"train/{wnid}" for wnid in WNIDS)]:
        (output / folder).mkdir(parents=True, exist_ok=True)
        (output / "boxes" / folder).mkdir(parents=True, exist_ok=True)
    mapping = "".join(f"{w} {name}\n" for w, name in zip(WNIDS, CLASS_NAMES, strict=True))
    (output / "LOC_synset_mapping.txt").write_text(mapping)
    write = partial(_write_image, output, config)
    with ProcessPoolExecutor() as pool:
        for split, count in (("train", config.train_images), ("val", config.val_images)):
            deque(pool.map(write, repeat(split, count), range(count), chunksize=250), maxlen=0)
