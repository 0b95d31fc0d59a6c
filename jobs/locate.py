"""Locate objects in images: what jobs.localize and jobs.serve share."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jobs.runs import ModelConfig, Nets, colour_statistics
from model.decoder import object_map, resize
from model.localization import Rule, localize
from model.masking import normalize
from pipeline.errors import UserError
from pipeline.evaluation.protocols import TOP, scale_boxes
from pipeline.shards.images import read_image
from pipeline.shards.superpixels import superpixels

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An image at the size that the corruption net sees. pixels: uint8 [h, w, 3]; segments: labels
    [h, w]; height, width: of the image as turned by EXIF's orientation; note: harmless damage to
    the file, or None."""

    pixels: np.ndarray
    segments: np.ndarray
    height: int
    width: int
    orientation: int = 1
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Located:
    """One image's result. map: float32 [h, w] at the nets' size, in [0, 1]. box: [x0, y0, x1, y1]
    in inclusive pixels of the image as EXIF turns it. found: False where the map was flat and
    the box therefore is the whole image. top5: (wnid, name, probability) of up to five classes on
    the unmasked image, by the classifier trained on clean images, best first."""

    map: np.ndarray
    box: list[int]
    found: bool
    top5: list[tuple[str, str, float]]


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, in one arena, for the process's later threads too: the nets'
    maps are as large in every batch, and clearing fresh pages for them took a sixth of the time."""
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**30), (M_ARENA_MAX, 1)):
        mallopt(option, value)


def prepare(config: ModelConfig, data: bytes) -> Prepared:
    """Decode an image file's bytes to the size that the corruption net sees, and cut superpixels
    where the nets see any. Raises ImageError."""
    size = (config.height, config.width)
    if config.network is not None:
        size = (config.sides[-1], config.sides[-1])
    image = read_image(data, *size, as_shown=True)
    if config.network is None:
        segments = superpixels(image.pixels, config.superpixels, config.compactness)
    else:  # whose maps are of single pixels
        segments = np.zeros(size, np.int64)
    return Prepared(
        pixels=image.pixels,
        segments=segments,
        height=image.height,
        width=image.width,
        orientation=image.orientation,
        note=image.note,
    )


def locate(
    nets: Nets, prepared: Sequence[Prepared], *, batch_size: int, rule: Rule | None = None
) -> list[Located]:
    """Return boxes and classes of up to `batch_size` images, on the device where the nets are.

    The nets always see `batch_size` images, the last ones blank where there are fewer: kernels
    are chosen, and sums rounded, by a batch's size, so that an image's result depends on that
    but not on its neighbours. Raises UserError for nets that give no finite map.
    """
    config, count = nets.config, len(prepared)
    device = next(nets.corruption.parameters()).device
    size, seen = (config.height, config.width), prepared[0].segments.shape
    pixels = np.zeros((batch_size, *seen, 3), np.uint8)
    labels = np.zeros((batch_size, *seen), np.int64)
    for i, image in enumerate(prepared):
        pixels[i], labels[i] = image.pixels, image.segments
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).contiguous()
    segments = torch.from_numpy(labels).to(device)
    x = normalize(images, *colour_statistics(config, device))
    half = config.network is not None and computes_bfloat16(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        maps = object_map(nets.corruption, x, segments, config.superpixels)
        maps = resize(maps.unsqueeze(1), size).squeeze(1)
        logits = nets.clean_classifier(resize(x, size)).float()
        scores, order = torch.softmax(logits, dim=1).sort(dim=1, descending=True, stable=True)
    values = maps[:count].cpu().numpy()
    try:
        boxes, found = localize(values, rule or config.rule)
    except ValueError as error:  # of the nets, not of an image: every other one would fail too
        raise UserError(str(error)) from None
    sizes = np.array([(image.height, image.width) for image in prepared])
    boxes = scale_boxes(boxes, np.array(size), sizes)
    return [
        Located(
            map=values[i],
            box=boxes[i].tolist(),
            found=bool(found[i]),
            top5=[
                (config.classes[c], config.class_names[c], score)
                for c, score in zip(order[i, :TOP].tolist(), scores[i, :TOP].tolist(), strict=True)
            ],
        )
        for i in range(count)
    ]


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16, which halve the nets' time."""
    capabilities = {} if device.type == "cuda" else torch.cpu.get_capabilities()
    return device.type == "cuda" or capabilities.get("avx512_bf16", False)
