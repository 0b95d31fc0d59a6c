"""Pictures, pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from jobs.pictures import (
    BLEND,
    BORDER,
    BOX_COLOUR,
    CAPTION,
    GAP,
    PAIR_GAP,
    SHADOW,
    TITLE,
    Cell,
    draw_grid,
    draw_overlay,
    encode_heat_png,
    encode_jpeg,
    encode_png,
    enlarge,
    heat,
    mask_picture,
    tile,
    with_borders,
)

GREY = np.full((120, 160, 3), 128, np.uint8)
SMALL = np.full((2, 3, 3), 90, np.uint8)
LEFT_AND_RIGHT = np.array([[0, 0, 1], [0, 0, 1]])
FLAT = np.zeros((8, 8), np.float32)


def cell(side: int, number: int) -> Cell:
    rng = np.random.default_rng(number)
    return Cell(
        image=rng.integers(0, 255, (side, side, 3), dtype=np.uint8),
        segments=np.arange(side * side).reshape(side, side) // (2 * side),
        name=f"class {number}, whose name is much longer than the picture above it is wide",
        note=f"row {number}",
    )


def is_box(picture: np.ndarray) -> np.ndarray:
    return (picture == np.array(BOX_COLOUR)).all(axis=-1)


def test_borders_lie_where_labels_change_and_nowhere_else() -> None:
    bordered = with_borders(SMALL, LEFT_AND_RIGHT, scale=3)
    assert bordered.shape == (6, 9, 3)
    assert (bordered[:, 6] == BORDER).all()
    assert (bordered[:, 5] == SHADOW).all()
    assert (np.delete(bordered, [5, 6], axis=1) == 90).all()
    downwards = with_borders(SMALL.transpose(1, 0, 2), LEFT_AND_RIGHT.T, scale=3)
    assert np.array_equal(downwards, bordered.transpose(1, 0, 2))
    unenlarged = with_borders(SMALL, LEFT_AND_RIGHT, scale=1)
    assert (unenlarged[:, 2] == BORDER).all()
    assert (unenlarged[:, :2] == 90).all()
    assert (with_borders(SMALL, np.zeros((2, 3), int), scale=2) == 90).all()


def test_tiles_stand_in_rows_with_white_between_and_where_a_row_is_short() -> None:
    sheet = tile([[SMALL, SMALL], [SMALL]], gap=1)
    assert sheet.shape == (7, 9, 3)
    inside = np.zeros((7, 9), bool)
    inside[1:3, 1:4] = inside[1:3, 5:8] = inside[4:6, 1:4] = True
    assert (sheet[inside] == 90).all()
    assert (sheet[~inside] == 255).all()


def test_the_grid_has_every_image_enlarged_beside_itself_with_borders() -> None:
    cells = [cell(56, number) for number in range(6)]
    grid = draw_grid(cells, "a title" * 100)
    width, height = 2 * 224 + PAIR_GAP, 224 + CAPTION
    for number, drawn in enumerate(cells):
        x, y = GAP + number % 4 * (width + GAP), TITLE + GAP + number // 4 * (height + GAP)
        assert np.array_equal(grid[y : y + 224, x : x + 224], enlarge(drawn.image, 4))
        bordered = grid[y : y + 224, x + 228 : x + 228 + 224]
        assert np.array_equal(bordered, with_borders(drawn.image, drawn.segments, 4))
    assert grid.shape == (TITLE + GAP + 2 * (height + GAP), 4 * (width + GAP) + GAP, 3)


def test_the_border_lies_on_the_boxs_outermost_pixels() -> None:
    picture = draw_overlay(GREY, FLAT, [30, 60, 100, 90], "x 1%")
    ys, xs = np.nonzero(is_box(picture)[60:])  # the label is above
    assert (xs.min(), xs.max(), ys.max() + 60) == (30, 100, 90)
    assert is_box(picture)[60, 30:101].all()
    assert is_box(picture)[60:91, 30].all()
    assert not is_box(picture)[62:89, 32:99].any()


def test_outside_box_and_label_the_picture_is_the_blend_with_the_maps_colours() -> None:
    value = 0.5
    picture = draw_overlay(GREY, np.full((8, 8), value, np.float32), [0, 0, 159, 119], "x 1%")
    colour = heat(np.full((1, 1), value))[0, 0].astype(float)
    assert np.abs(picture[100, 80] - (BLEND * colour + (1 - BLEND) * 128)).max() <= 1


@pytest.mark.parametrize("text", ["disc 7%", "a long name, of several words, " * 3 + "99%"])
@pytest.mark.parametrize("size", [(600, 400), (700, 900), (90, 120), (400, 40), (40, 400)])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.9, 0.9, 1, 1), (0, 0.9, 0.05, 1)])
def test_box_and_label_cover_less_than_half_of_the_picture(
    text: str, size: tuple[int, int], box: tuple[float, ...]
) -> None:
    height, width = size
    x0, x1 = (round(share * (width - 1)) for share in box[::2])
    y0, y1 = (round(share * (height - 1)) for share in box[1::2])
    pixels = np.full((height, width, 3), 128, np.uint8)
    picture = draw_overlay(pixels, FLAT, [x0, y0, x1, y1], text)
    assert picture.shape == pixels.shape
    colour = heat(np.zeros((1, 1)))[0, 0] * BLEND + 128 * (1 - BLEND)
    drawn = np.abs(picture - colour).max(axis=-1) > 1
    assert drawn.mean() < 0.4


def test_pictures_too_small_for_letters_have_a_box_and_no_label() -> None:
    for height, width in ((1, 1), (3, 5), (16, 16), (20, 900)):
        pixels = np.zeros((height, width, 3), np.uint8)
        picture = draw_overlay(pixels, FLAT, [0, 0, width - 1, height - 1], "striped disc 55%")
        assert is_box(picture)[0].all()
        assert not is_box(picture[1:-1, 1:-1]).any()


def test_a_mask_is_255_times_the_probability_interpolated_to_the_images_size() -> None:
    values = np.random.default_rng(0).random((16, 16)).astype(np.float32)
    assert (mask_picture(values, 16, 16) == np.rint(values * 255)).all()
    constant = mask_picture(np.full((16, 16), 0.2, np.float32), 70, 31)
    assert constant.shape == (70, 31)
    assert (constant == 51).all()
    ramp = np.tile(np.array([0, 1], np.float32), (2, 1))
    # centres of the two pixels are at 1/4 and 3/4 of the width; in between the ramp is linear
    assert mask_picture(ramp, 2, 4)[0].tolist() == [0, 64, 191, 255]


def test_files_give_the_pixels_back() -> None:
    rng = np.random.default_rng(0)
    for shape in ((5, 7, 3), (5, 7)):
        picture = rng.integers(0, 256, shape).astype(np.uint8)
        with Image.open(io.BytesIO(encode_png(picture))) as file:
            assert np.array_equal(np.asarray(file), picture)
    values = rng.random((9, 9))
    with Image.open(io.BytesIO(encode_heat_png(values))) as file:
        assert np.array_equal(np.asarray(file.convert("RGB")), heat(values))
    with Image.open(io.BytesIO(encode_jpeg(GREY))) as file:
        assert np.abs(np.asarray(file).astype(int) - GREY).max() <= 1


def test_a_picture_too_wide_for_a_png_is_an_error_and_no_empty_file() -> None:
    with pytest.raises(ValueError, match="1000001x1 pixels"):
        encode_png(np.zeros((1, 1_000_001), np.uint8))
