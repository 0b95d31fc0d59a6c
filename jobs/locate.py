"""Locate objects in images: what jobs.localize and jobs.serve share."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.runs import ModelConfig, Nets, colour_statistics
from model.decoder import object_map, resize
from model.localization import Rule, localize
from model.masking import normalize
from pipeline.errors import UserError
from pipeline.evaluation.protocols import TOP, scale_boxes
from pipeline.shards.images import DecodedImage, read_image
from pipeline.shards.images import resize as resize_pixels
from pipeline.shards.superpixels import superpixels

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


@dataclass(frozen=True, kw_only=True)
class Prepared(DecodedImage):
    """An image as the nets see it, its `pixels` for the corruption net. view: uint8 [h, w, 3], for
    the classifier; segments: labels [h, w] of `pixels`."""

    view: np.ndarray
    segments: np.ndarray


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
    """Decode an image file's bytes to the sizes that the nets see, and cut superpixels where the
    nets see any. Raises ImageError."""
    size = (config.height, config.width)
    if config.network is None:
        image = read_image(data, *size, as_shown=True)
        segments = superpixels(image.pixels, config.superpixels, config.compactness)
        view = image.pixels
    else:  # whose maps are of single pixels
        side = config.sides[-1]
        image = read_image(data, side, side, as_shown=True)
        segments = np.zeros((side, side), np.int64)
        if min(image.height, image.width) >= side:
            view = resize_pixels(image.pixels, *size)
        else:  # enlarged pixels would reach the classifier blurred
            view = read_image(data, *size, as_shown=True).pixels
    return Prepared(**vars(image), view=view, segments=segments)


def locate(
    nets: Nets, prepared: Sequence[Prepared], *, batch_size: int, rule: Rule | None = None
) -> list[Located]:
    """Return boxes and classes of up to `batch_size` images, on the device where the nets are. The
    nets always see `batch_size` images, the last ones blank where there are fewer: kernels are
    chosen, and sums rounded, by a batch's size, so that an image's result depends on that but not
    on its neighbours. Raises UserError for nets that give no finite map."""
    config, count = nets.config, len(prepared)
    device = next(nets.corruption.parameters()).device
    size = (config.height, config.width)

    def batch_of(arrays: list[np.ndarray]) -> Tensor:
        blank = [np.zeros_like(arrays[0])] * (batch_size - count)
        return torch.from_numpy(np.stack(arrays + blank)).to(device)

    def net_inputs(arrays: list[np.ndarray]) -> Tensor:
        images = batch_of(arrays).permute(0, 3, 1, 2).contiguous()
        return normalize(images, *colour_statistics(config, device))

    segments = batch_of([image.segments.astype(np.int64) for image in prepared])
    x = net_inputs([image.pixels for image in prepared])
    views = net_inputs([image.view for image in prepared])
    half = config.network is not None and computes_bfloat16(device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        maps = object_map(nets.corruption, x, segments, config.superpixels)
        maps = resize(maps.unsqueeze(1), size).squeeze(1)
        logits = nets.clean_classifier(views).float()
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


def facts(image: Prepared, result: Located) -> dict[str, Any]:
    """Return the entry of an image in boxes.json and in the answer over HTTP."""
    top = [{"class": wnid, "name": name, "score": score} for wnid, name, score in result.top5]
    note = {"note": image.note} if image.note else {}
    return {
        "width": image.width,
        "height": image.height,
        "orientation": image.orientation,
        "box": result.box,
        "found": result.found,
        **top[0],
        "top5": top,
        **note,
    }


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16, which halve the nets' time."""
    capabilities = {} if device.type == "cuda" else torch.cpu.get_capabilities()
    return device.type == "cuda" or capabilities.get("avx512_bf16", False)
