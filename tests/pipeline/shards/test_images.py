import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.shards.images import MAX_PIXELS, ImageError, decoded_size, read_image, resize
from pipeline.shards.pixels import moments


def encoded(pixels: np.ndarray, format: str, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def halves(height: int = 40, width: int = 60) -> np.ndarray:
    """Left half red, right half blue, brightest in the upper rows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 200
    pixels[:, width // 2 :, 2] = 100
    return pixels


def close(pixels: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return float(np.abs(pixels.astype(int) - expected.astype(int)).mean()) <= tolerance


def test_png_pixels_come_unchanged_at_their_own_size() -> None:
    decoded = read_image(encoded(halves(), "PNG"), 40, 60)
    assert np.array_equal(decoded.pixels, halves())
    assert (decoded.height, decoded.width, decoded.note) == (40, 60, None)


def test_enlarging_interpolates_and_keeps_the_range() -> None:
    enlarged = resize(halves(4, 4), 32, 32)
    assert enlarged.shape == (32, 32, 3)
    assert (enlarged[:, 0, 0].min(), enlarged[:, -1, 2].max()) == (200, 100)
    assert set(np.unique(enlarged[:, :, 1])) == {0}
    assert len(np.unique(enlarged[0, :, 0])) > 2  # a ramp between the halves, not blocks


def test_an_axis_that_shrinks_is_averaged_while_the_other_grows() -> None:
    pixels = np.zeros((4, 1, 3), np.uint8)
    pixels[0] = 100
    assert resize(pixels, 2, 3)[:, :, 0].tolist() == [[50, 50, 50], [0, 0, 0]]


@settings(max_examples=40)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    shrunk=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 9),
)
def test_shrinking_is_the_mean_of_the_covered_area(
    height: int, width: int, shrunk: tuple[float, float], seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    if seed == 0:
        pixels[:] = 255
    small = max(1, round(height * shrunk[0])), max(1, round(width * shrunk[1]))
    exact = pixels.astype(np.float64)
    for axis in (0, 1):  # repeat each pixel so often that outputs cover whole ones
        exact = exact.repeat(small[axis], axis=axis)
    exact = exact.reshape(small[0], height, small[1], width, 3).mean(axis=(1, 3))
    assert np.abs(resize(pixels, *small) - exact).max() <= 0.5 + 0.03


def test_a_scaled_jpeg_is_close_to_the_average_of_the_whole_one() -> None:
    row, column = np.mgrid[:600, :800]
    smooth = np.stack([row * 255 // 599, column * 255 // 799, (row + column) % 256 // 2], -1)
    data = encoded(smooth.astype(np.uint8), "JPEG", quality=95)
    decoded = read_image(data, 64, 64)
    assert close(decoded.pixels, resize(simplejpeg.decode_jpeg(data), 64, 64), 2.0)
    assert (decoded.height, decoded.width) == (600, 800)


@pytest.mark.parametrize(
    ("full", "stored", "expected"),
    [
        ((375, 500), (64, 64), (188, 250)),  # 3/8 would do, and takes as long
        ((375, 500), (224, 224), (375, 500)),  # never enlarged
        ((256, 256), (64, 64), (128, 128)),
        ((255, 257), (64, 64), (255, 257)),  # a half would be 127.5
        ((1100, 1000), (64, 64), (275, 250)),
        ((9000, 4096), (256, 32), (1125, 512)),
        ((64, 9000), (32, 32), (64, 9000)),
    ],
)
def test_the_size_to_decode_to_by_hand(
    full: tuple[int, int], stored: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert decoded_size(full, stored) == expected
    data = encoded(np.zeros((*full, 3), np.uint8), "JPEG")
    decoded = simplejpeg.decode_jpeg(data, min_height=expected[0], min_width=expected[1])
    assert decoded.shape[:2] == expected


def test_moments_are_exact_sums_over_images_of_any_size() -> None:
    random = np.random.default_rng(0)
    bright = np.full((512, 512, 3), 255, np.uint8)
    for pixels in (*(random.integers(0, 256, (7, n, 3), np.uint8) for n in range(1, 30)), bright):
        levels = pixels.reshape(-1, 3).astype(np.int64)
        assert np.array_equal(moments(pixels), [levels.sum(axis=0), (levels**2).sum(axis=0)])


@pytest.mark.parametrize(
    ("format", "orientation"),
    [("JPEG", n) for n in range(1, 9)] + [(name, 6) for name in ("PNG", "TIFF", "WEBP", "AVIF")],
)
def test_an_image_is_turned_by_its_exif_only_as_shown(format: str, orientation: int) -> None:
    exif, pixels = Image.Exif(), halves()
    exif[0x0112] = orientation
    pixels[:20, :, 1] = 150  # so that every turn gives another picture
    data = encoded(pixels, format, quality=95, exif=exif)
    stored = read_image(data, 40, 60)
    assert (stored.height, stored.width, stored.orientation) == (40, 60, 1)
    assert close(stored.pixels, pixels, 6)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    shown = read_image(data, *expected.shape[:2], as_shown=True)
    assert (shown.height, shown.width) == expected.shape[:2]
    assert shown.orientation == orientation
    assert close(shown.pixels, expected, 6)


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", bytes(30), b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    shown = read_image(encoded(halves(), "JPEG", exif=exif), 40, 60, as_shown=True)
    assert (shown.height, shown.width, shown.orientation) == (40, 60, 1)


@pytest.mark.parametrize("format", ["PNG", "PPM", "TIFF", "JPEG2000"])
def test_sixteen_bit_grey_keeps_its_high_byte(format: str) -> None:
    pixels = read_image(encoded(np.full((32, 32), 40000, np.uint16), format), 32, 32).pixels
    assert np.unique(pixels).tolist() == [40000 // 256]


def test_twelve_bit_pgm_is_scaled_to_its_largest_value() -> None:
    data = b"P5 32 32 4095\n" + (4095).to_bytes(2) * 32 * 16 + (2048).to_bytes(2) * 32 * 16
    assert np.unique(read_image(data, 32, 32).pixels).tolist() == [128, 255]


def png_chunk(name: bytes, content: bytes, damage: int = 0) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content) ^ damage)
    return struct.pack(">I", len(content)) + name + content + check


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"notes\0\0" + zlib.compress(bytes(3 << 20))),
        png_chunk(b"iTXt", b"notes\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20))),
        png_chunk(b"tEXt", b"notes\0text", damage=1),
    ],
)
def test_what_a_png_says_beside_its_pixels_does_not_matter(chunk: bytes) -> None:
    data = encoded(halves(), "PNG")
    start = data.index(b"IDAT") - 4
    decoded = read_image(data[:start] + chunk + data[start:], 40, 60)
    assert np.array_equal(decoded.pixels, halves())


def test_palettes_bilevel_and_alpha_are_converted() -> None:
    assert close(read_image(encoded(halves(), "PNG", "P"), 40, 60).pixels, halves(), 8)
    assert np.array_equal(read_image(encoded(halves(), "PNG", "RGBA"), 40, 60).pixels, halves())
    bilevel = read_image(encoded(np.full((32, 32), 255, np.uint8), "PNG", "1"), 32, 32)
    assert np.unique(bilevel.pixels).tolist() == [255]


def test_float_pixels_of_unknown_range_are_rejected() -> None:
    with pytest.raises(ImageError, match="unknown range of grey"):
        read_image(encoded(np.full((32, 32), 0.5, np.float32), "TIFF"), 32, 32)


def before_end(data: bytes, stray: bytes) -> bytes:
    end = data.rindex(b"\xff\xd9")
    return data[:end] + stray + data[end:]


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda data: before_end(data, b"\0" * 20), "extraneous bytes before marker 0xd9"),
        (lambda data: before_end(data, b"\x7f" * 9), "extraneous bytes before marker 0xd9"),
        (lambda data: data[:2] + b"camera" + data[2:], "6 extraneous bytes before marker 0xe0"),
        (lambda data: data.replace(b"JFIF\0\1", b"JFIF\0\0"), "unknown JFIF revision number 0.01"),
        (lambda data: data.replace(b"\0\x3f\0", b"\0\0\0", 1), "Invalid SOS parameters"),
    ],
)
def test_what_concerns_no_pixel_of_a_jpeg_is_noted_but_hides_no_damage(
    change: Callable[[bytes], bytes], warning: str
) -> None:
    data = encoded(halves(), "JPEG", quality=95)
    decoded = read_image(change(data), 40, 60)
    assert warning in (decoded.note or "")
    assert np.array_equal(decoded.pixels, read_image(data, 40, 60).pixels)
    noise = encoded(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8), "JPEG")
    with pytest.raises(ImageError, match=r"damaged JPEG: .*premature end"):
        read_image(change(noise[:-500] + noise[-2:]), 40, 60)


def with_lost_block(data: bytes, size: int = 4096) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(size) + data[middle + size :]


def test_every_sample_with_a_lost_block_is_rejected_and_no_sound_one(
    imagenet_samples: Path,
) -> None:
    samples = [path.read_bytes() for path in sorted(imagenet_samples.glob("*.JPEG"))]
    assert {read_image(data, 64, 64).note for data in samples} == {None}
    large = [data for data in samples if len(data) > 30_000]
    for data in large:
        with pytest.raises(ImageError, match=r"^damaged JPEG: "):
            read_image(with_lost_block(data), 64, 64)
    assert (len(samples), len(large)) == (120, 99)


@pytest.mark.parametrize("options", [{"mode": "CMYK"}, {"progressive": True}, {"optimize": True}])
def test_a_lost_block_is_noticed_in_other_jpegs(options: dict[str, Any]) -> None:
    row, column = np.mgrid[:600, :800]
    noise = np.random.default_rng(0).integers(0, 40, (600, 800, 3))
    pixels = (noise + (row % 200 + column % 15)[..., None]).astype(np.uint8)
    data = encoded(pixels, "JPEG", **options)
    read_image(data, 64, 64)
    with pytest.raises(ImageError, match=r"^damaged JPEG: "):
        read_image(with_lost_block(data), 64, 64)


@pytest.mark.parametrize("level", [0, 127, 255])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_zeros_that_code_a_flat_area_are_no_damage(level: int, options: dict[str, Any]) -> None:
    data = encoded(np.full((2048, 2048), level, np.uint8), "JPEG", "RGB", **options)
    assert (bytes(512) in data) == bool(options)
    assert read_image(data, 32, 32).note is None


def test_a_jpeg_that_cannot_be_checked_is_noted() -> None:
    data = encoded(np.full((8, 8, 3), 128, np.uint8), "JPEG", subsampling=0)
    decoded = read_image(data.replace(b"\1\x11\0\2\x11\1", b"\1\x31\0\2\x11\1"), 32, 32)
    assert "rare chroma subsampling" in (decoded.note or "")


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_an_image_cut_off_anywhere_is_rejected(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    data = encoded(noise, format)
    for length in (1, 10, 100, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(
            ImageError, match=r"^(damaged JPEG|cannot be decoded|no image format): "
        ):
            read_image(data[:length], 32, 32)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n", "no image format"),  # never interpreted
        (b"<html>not found</html>", "no image format"),
        (b"\xff\xd8", "damaged JPEG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "format not read: HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "format not read: HEIC"),
        (b"\xff\x0a" + bytes(20), "format not read: JPEG XL"),
        (bytes(1000), "no image format"),
    ],
)
def test_what_is_no_image_is_rejected_by_kind(data: bytes, kind: str) -> None:
    with pytest.raises(ImageError, match=f"^{kind}[:;] "):
        read_image(data, 32, 32)


def test_a_decompression_bomb_is_rejected_before_it_is_decoded() -> None:
    for side in (8193, 30000, 2**31 - 1):  # just above the limit, far above, absurd
        assert side * side > MAX_PIXELS
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = (
            b"\x89PNG\r\n\x1a\n"
            + png_chunk(b"IHDR", header)
            + png_chunk(b"IDAT", zlib.compress(b""))
        )
        with pytest.raises(ImageError, match="too many pixels"):
            read_image(data, 32, 32)
    jpeg = bytearray(encoded(halves(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 20000, 20000)
    with pytest.raises(ImageError, match="too many pixels: 20000x20000"):
        read_image(bytes(jpeg), 32, 32)


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "P", "RGBA", "LA", "1", "I;16"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L", "P", "1"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"),
    "PPM": ("RGB", "L", "1", "I;16"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG2000": ("RGB", "RGBA", "L", "I;16"),
}


@settings(max_examples=120)
@given(
    form=st.sampled_from(sorted(MODES)),
    data=st.data(),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    stored=st.tuples(st.integers(32, 512), st.integers(32, 512)),
)
def test_any_size_and_mode_of_each_format_is_stored_at_any_size(
    form: str, data: st.DataObject, size: tuple[int, int], stored: tuple[int, int]
) -> None:
    mode = data.draw(st.sampled_from(MODES[form]))
    level = data.draw(st.integers(0, 255))
    flat = np.full(size, level, np.uint8)
    if mode == "I;16":
        content = encoded(flat.astype(np.uint16) * 256, form)
    else:
        content = encoded(np.stack([flat] * 3, -1), form, mode)
    decoded = read_image(content, *stored)
    assert decoded.pixels.shape == (*stored, 3)
    assert decoded.pixels.dtype == np.uint8
    assert (decoded.height, decoded.width) == size
    if mode not in ("1", "P"):  # which keep other levels
        assert np.abs(decoded.pixels.astype(int) - level).max() <= 3
