"""An image file's bytes -> RGB pixels at the stored size."""

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, ExifTags, Image

from pipeline.shards.jpeg import decode_jpeg

MAX_PIXELS = 2**26  # 67 million: above any ILSVRC image, and 200 MB once decoded
# Pillow's other formats include PostScript, which it hands to an interpreter.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")
OTHER_FORMATS = {  # by bytes near their start
    b"ftyphei": "HEIC",
    b"ftyphev": "HEIC",
    b"ftypm": "HEIC",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "Photoshop",
    b"%PDF": "PDF",
    b"<svg": "SVG",
}
PNG = b"\x89PNG\r\n\x1a\n"
DECODE_FACTOR = 2  # JPEGs are decoded to at least this many times the stored size, then averaged
# Of the eighths in which JPEGs can be decoded. The others have no vectorized transform: 3/8 takes
# as long as 4/8, and 5/8 to 7/8 longer than the whole.
EIGHTHS = (1, 2, 4, 8)

# By EXIF's orientation: where rows and columns change places, rows run upwards, columns leftwards.
SWAPPED, UPWARDS, LEFTWARDS = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)

# Images are spread over processes; threads inside one would only fight for the same cores.
cv2.setNumThreads(1)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


class ImageError(ValueError):
    """Bytes that hold no usable image. The message is `kind: detail`; kinds are few."""


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """A decoded image. pixels: uint8 [H, W, 3], RGB, at the size asked for. height, width: the
    file's own, in pixels as stored, or as shown where that was asked for. note: harmless damage,
    or None. orientation: EXIF's, 1 to 8, where pixels are as shown."""

    pixels: np.ndarray
    height: int
    width: int
    note: str | None = None
    orientation: int = 1


def read_image(data: bytes, height: int, width: int, *, as_shown: bool = False) -> DecodedImage:
    """Decode `data` and resize it, without keeping its aspect: shrinking averages areas, enlarging
    interpolates linearly. EXIF orientation is ignored, since boxes of data sets refer to stored
    pixels; as_shown: the image is turned by it, as viewers do. Raises ImageError for undecodable
    data and for more than MAX_PIXELS pixels."""
    if not data:
        raise ImageError("empty file: it has 0 bytes")
    orientation = _orientation(data) if as_shown else 1
    swaps = orientation in SWAPPED
    stored = (width, height) if swaps else (height, width)
    image = _decode(data, *stored)
    pixels, sides = resize(image.pixels, *stored), (image.height, image.width)
    if swaps:
        pixels, sides = pixels.swapaxes(0, 1), sides[::-1]
    down, right = (-1 if orientation in x else 1 for x in (UPWARDS, LEFTWARDS))
    return DecodedImage(
        pixels=np.ascontiguousarray(pixels[::down, ::right]),
        height=sides[0],
        width=sides[1],
        note=image.note,
        orientation=orientation,
    )


def _orientation(data: bytes) -> int:
    """Return the orientation that EXIF states, or 1 where none can be read: decoding says why."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))  # getexif() would decode PNGs, and read XMP
            own = image.getexif() if image.format == "TIFF" else exif
            stated = own.get(ExifTags.Base.Orientation)
            return stated if isinstance(stated, int) and 1 <= stated <= 8 else 1
    return 1


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [h, w, 3] to uint8 [height, width, 3]. Areas are averaged where an axis shrinks,
    and interpolated linearly where it grows."""
    from pipeline.shards.pixels import shrink

    h, w = pixels.shape[:2]
    shrunk = (min(w, width), min(h, height))
    if shrunk != (w, h):
        pixels = shrink(np.ascontiguousarray(pixels), shrunk[1], shrunk[0])
    if shrunk != (width, height):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(pixels)


def _decode(data: bytes, height: int, width: int) -> DecodedImage:
    """Decode data at their own size, or a JPEG at one that suffices for `height` and `width`."""
    note = None
    if data[:2] == b"\xff\xd8":
        try:
            *full, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        except (ValueError, KeyError):
            # Also sound files, of a rare chroma subsampling: Pillow decides.
            note = "JPEG with a rare chroma subsampling: damage to it would not be noticed"
        else:
            _check_size(*full)
            try:
                if colours in ("YCbCr", "Gray", "RGB"):
                    least = decoded_size((full[0], full[1]), (height, width))
                    pixels, note = decode_jpeg(data, *least)
                    return DecodedImage(pixels=pixels, height=full[0], width=full[1], note=note)
                _, note = decode_jpeg(data, 1, 1, "CMYK")  # a check: Pillow converts the colours
            except ValueError as error:
                raise ImageError(f"damaged JPEG: {error}") from error
    pixels = _decode_with_pillow(data)
    return DecodedImage(pixels=pixels, height=pixels.shape[0], width=pixels.shape[1], note=note)


def decoded_size(full: tuple[int, int], stored: tuple[int, int]) -> tuple[int, int]:
    """Return height and width at which to decode a JPEG of the size `full`, to store at `stored`.
    It is the smallest of its EIGHTHS that is DECODE_FACTOR times as large, or the whole."""
    wanted = [8 * DECODE_FACTOR * side for side in stored]
    fits = (n for n in EIGHTHS if n * full[0] >= wanted[0] and n * full[1] >= wanted[1])
    eighths = next(fits, EIGHTHS[-1])
    return -(-full[0] * eighths // 8), -(-full[1] * eighths // 8)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    if data.startswith(PNG):
        data = _critical_chunks(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below, odd EXIF does not matter
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.height, image.width)
                image.getexif().pop(ExifTags.Base.Orientation, None)  # TIFFs would be turned
                image.load()
                return _to_rgb(image)
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(_unidentified(data[:12])) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from error
    except Exception as error:  # decoders raise anything, from struct.error to SyntaxError
        raise ImageError(f"cannot be decoded: {error}") from error


def _critical_chunks(data: bytes) -> bytes:
    """Return a PNG without texts, profiles and EXIF, for which Pillow refuses some pictures."""
    kept, end = [data[: len(PNG)]], len(PNG)
    while end < len(data):
        start, end = end, end + 12 + int.from_bytes(data[end : end + 4])
        if data[start + 4 : start + 5].isupper():
            kept.append(data[start:end])
    return b"".join(kept)


def _unidentified(start: bytes) -> str:
    if start.startswith(b"\xff\xd8"):
        return "damaged JPEG: its header cannot be read"
    for mark, name in OTHER_FORMATS.items():
        if mark in start:
            return f"format not read: {name}; convert it to JPEG or PNG"
    return f"no image format: it begins with {start[:8].hex(' ')}"


def _to_rgb(image: Image.Image) -> np.ndarray:
    # Pillow gives the 16 bits of PGM as 32.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)  # convert() would clip
        return np.stack([grey] * 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ImageError(f"unknown range of grey: its pixels are {image.mode!r}, of 32 bits")
    return np.asarray(image.convert("RGB"))


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ImageError(f"too many pixels: {width}x{height} is above the limit of {MAX_PIXELS}")
