"""`python -m jobs.localize`: boxes and overlay pictures for images of any size."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from jobs import cli
from jobs.cli import UserError, option
from jobs.models import Nets, colour_statistics, load_nets
from jobs.report import heat
from model.adversarial import normalize
from model.localization import localize, mask_map, scale_boxes
from pipeline.images import ImageError, read_image
from pipeline.shards import write_atomically
from pipeline.sources import IMAGE_SUFFIXES
from pipeline.superpixels import superpixels

BOXES_NAME = "boxes.json"
BLEND = 0.45  # weight of the map's colours in an overlay
BOX_COLOUR = (255, 79, 154)


@dataclass(frozen=True, kw_only=True)
class LocalizeConfig:
    """Which images, by which nets, and where the results go."""

    images: tuple[Path, ...] = option(
        help="image files, or folders that are searched for them", positional=True
    )
    run: Path = option(help="folder of a finished jobs.train")
    output: Path = option(help="folder for an overlay PNG per image and boxes.json")


@dataclass(frozen=True, kw_only=True)
class Located:
    """What was found in one image. map: float32 [h, w] at the nets' size, in [0, 1]. box:
    [x0, y0, x1, y1] in inclusive pixels of the file, not rotated by EXIF. found: False where the
    map was flat and the box therefore is the whole image. wnid, name, score: the top class on the
    unmasked image by the classifier trained on clean images, and its probability."""

    map: np.ndarray
    box: list[int]
    found: bool
    wnid: str
    name: str
    score: float
    width: int
    height: int


def find_images(arguments: Sequence[Path]) -> list[Path]:
    """The files named, and those under the folders named that have an image's suffix, in order.

    Raises UserError for a folder without images; a missing file is reported when it is read.
    """
    found = []
    for argument in arguments:
        if not argument.is_dir():
            found.append(argument)
            continue
        inside = sorted(
            path
            for path in argument.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        )
        if not inside:
            raise UserError(
                f"folder {argument} holds no image files ({', '.join(IMAGE_SUFFIXES)})."
            )
        found += inside
    return found


def overlay_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each image's overlay: its stem and .png, numbered from the second one of
    the same name (letter case aside) on."""
    used: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem, 1
        while name.lower() in used:
            number += 1
            name = f"{path.stem}-{number}"
        used.add(name.lower())
        names.append(f"{name}.png")
    return names


def locate(nets: Nets, data: bytes) -> Located:
    """The box and class of one image file's bytes.

    Raises ImageError for unusable bytes, UserError for nets that give no finite map.
    """
    config = nets.config
    image = read_image(data, config.height, config.width)
    labels = superpixels(image.pixels, config.superpixels, config.compactness)
    segments = torch.from_numpy(labels.astype(np.int64)).unsqueeze(0)
    x = torch.from_numpy(image.pixels).permute(2, 0, 1).unsqueeze(0).contiguous()
    x = normalize(x, *colour_statistics(config, x.device))
    with torch.no_grad():
        values = mask_map(nets.corruption, x, segments, int(labels.max()) + 1).numpy()
        score, top = torch.softmax(nets.clean_classifier(x), dim=1)[0].max(dim=0)
    try:
        boxes, found = localize(values)
    except ValueError as error:  # of the nets, not of the image: every other one would fail too
        raise UserError(str(error)) from None
    size = np.array([[image.height, image.width]])
    return Located(
        map=values[0],
        box=scale_boxes(boxes, (config.height, config.width), size)[0].tolist(),
        found=bool(found[0]),
        wnid=config.classes[int(top)],
        name=config.class_names[int(top)],
        score=float(score),
        width=image.width,
        height=image.height,
    )


def draw_overlay(pixels: np.ndarray, located: Located) -> Image.Image:
    """The image (uint8 [H, W, 3]) with the map's colours, the box and the class over it."""
    height, width = pixels.shape[:2]
    values = cv2.resize(located.map, (width, height), interpolation=cv2.INTER_LINEAR)
    blended = cv2.addWeighted(pixels, 1 - BLEND, heat(values), BLEND, 0)
    picture = Image.fromarray(blended)
    draw = ImageDraw.Draw(picture)
    line = max(1, round(min(height, width) / 150))
    x0, y0, x1, y1 = located.box
    draw.rectangle((x0, y0, x1, y1), outline=BOX_COLOUR, width=line)
    font = ImageFont.load_default(max(10, min(height, width) / 22))
    text = f"{located.name} {located.score:.0%}"
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font, anchor="lt")
    pad = 2 * line
    label = (right - left + 2 * pad, bottom - top + 2 * pad)
    x = max(0, min(x0, width - label[0]))
    y = y0 - label[1] if y0 >= label[1] else y0  # above the box, or inside where there is no room
    draw.rectangle((x, y, x + label[0], y + label[1]), fill=BOX_COLOUR)
    draw.text((x + pad, y + pad), text, fill="black", font=font, anchor="lt")
    return picture


def process(nets: Nets, path: Path, overlay: Path) -> dict[str, Any]:
    """Locate one file, write its overlay, and return its entry of boxes.json.

    Raises ImageError or OSError where the file cannot be used.
    """
    data = path.read_bytes()
    located = locate(nets, data)
    pixels = read_image(data, located.height, located.width).pixels
    partial = overlay.with_name(f".{overlay.name}.tmp")
    draw_overlay(pixels, located).save(partial, format="PNG")
    partial.replace(overlay)
    return {
        "image": str(path),
        "overlay": overlay.name,
        "width": located.width,
        "height": located.height,
        "box": located.box,
        "found": located.found,
        "class": located.wnid,
        "name": located.name,
        "score": located.score,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job with command-line flags (`--help` lists them)."""
    config = cli.parse(LocalizeConfig, argv, __doc__ or "")
    nets = load_nets(config.run)
    paths = find_images(config.images)
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"--output {config.output} is a file; give a folder.")
    names = overlay_names(paths)
    inputs = {path.resolve() for path in paths}
    for name in names:
        if (config.output / name).resolve() in inputs:
            raise UserError(
                f"overlay {config.output / name} would replace an image given; "
                "choose another --output."
            )
    config.output.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for path, name in zip(paths, names, strict=True):
        try:
            entry = process(nets, path, config.output / name)
        except (ImageError, OSError) as error:
            entries.append({"image": str(path), "error": str(error)})
            print(f"{path}: failed, {error}", file=sys.stderr)
            continue
        entries.append(entry)
        print(f"{path}: {entry['name']} {entry['score']:.0%}, box {entry['box']}")
    content = {"format": 1, "images": entries, **cli.record(config)}
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(config.output / BOXES_NAME, text.encode())
    failed = sum("error" in entry for entry in entries)
    print(f"{len(entries) - failed} of {len(entries)} images located, in {config.output}")
    if failed:
        raise UserError(f"{failed} of {len(entries)} images failed; the reasons are printed above.")


if __name__ == "__main__":
    cli.run(main)
