"""Overlay and mask pictures, pixel by pixel."""

import cv2
import numpy as np
import pytest

from jobs.pictures import BLEND, BOX_COLOUR, draw_overlay, encode_png, heat, mask_picture

GREY = np.full((120, 160, 3), 128, np.uint8)


def is_box(picture: np.ndarray) -> np.ndarray:
    return (picture == np.array(BOX_COLOUR)).all(axis=-1)


def test_the_border_lies_on_the_boxs_outermost_pixels() -> None:
    picture = draw_overlay(GREY, np.zeros((8, 8), np.float32), [30, 60, 100, 90], "x 1%")
    ys, xs = np.nonzero(is_box(picture)[60:])  # the label is above
    assert (xs.min(), xs.max(), ys.max() + 60) == (30, 100, 90)
    assert is_box(picture)[60, 30:101].all()
    assert is_box(picture)[60:91, 30].all()
    assert not is_box(picture)[62:89, 32:99].any()


def test_a_box_of_the_whole_image_is_drawn_inside_it() -> None:
    picture = is_box(draw_overlay(GREY, np.zeros((8, 8), np.float32), [0, 0, 159, 119], "x 1%"))
    for border in (picture[0], picture[119], picture[:, 0], picture[:, 159]):
        assert border.all()


def test_outside_box_and_label_the_picture_is_the_blend_with_the_maps_colours() -> None:
    value = 0.5
    picture = draw_overlay(GREY, np.full((8, 8), value, np.float32), [0, 0, 159, 119], "x 1%")
    colour = heat(np.full((1, 1), value))[0, 0].astype(float)
    assert np.abs(picture[100, 80] - (BLEND * colour + (1 - BLEND) * 128)).max() <= 1


@pytest.mark.parametrize("text", ["disc 7%", "a long name, of several words, " * 3 + "99%"])
@pytest.mark.parametrize("size", [(600, 400), (1500, 2000), (90, 120), (400, 40), (40, 400)])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.9, 0.9, 1, 1), (0, 0.9, 0.05, 1)])
def test_box_and_label_leave_most_of_the_picture_to_be_seen(
    text: str, size: tuple[int, int], box: tuple[float, ...]
) -> None:
    height, width = size
    x0, x1 = (round(share * (width - 1)) for share in box[::2])
    y0, y1 = (round(share * (height - 1)) for share in box[1::2])
    pixels = np.full((height, width, 3), 128, np.uint8)
    flat = np.zeros((8, 8), np.float32)
    picture = draw_overlay(pixels, flat, [x0, y0, x1, y1], text)
    assert picture.shape == pixels.shape
    colour = heat(np.zeros((1, 1)))[0, 0] * BLEND + 128 * (1 - BLEND)
    drawn = np.abs(picture - colour).max(axis=-1) > 1
    assert drawn.mean() < 0.4


def test_pictures_too_small_for_letters_have_a_box_and_no_label() -> None:
    for height, width in ((1, 1), (3, 5), (16, 16), (20, 900)):
        pixels = np.zeros((height, width, 3), np.uint8)
        box = [0, 0, width - 1, height - 1]
        picture = draw_overlay(pixels, np.zeros((8, 8), np.float32), box, "striped disc 55%")
        inner = picture[1:-1, 1:-1]
        assert is_box(picture)[0].all()
        assert not is_box(inner).any()


def test_a_mask_is_255_times_the_probability_interpolated_to_the_images_size() -> None:
    values = np.random.default_rng(0).random((16, 16)).astype(np.float32)
    assert (mask_picture(values, 16, 16) == np.rint(values * 255)).all()
    constant = mask_picture(np.full((16, 16), 0.2, np.float32), 70, 31)
    assert constant.shape == (70, 31)
    assert (constant == 51).all()
    ramp = np.tile(np.array([0, 1], np.float32), (2, 1))
    # centres of the two pixels are at 1/4 and 3/4 of the width; in between the ramp is linear
    assert mask_picture(ramp, 2, 4)[0].tolist() == [0, 64, 191, 255]


def test_png_gives_the_pixels_back() -> None:
    rng = np.random.default_rng(0)
    for shape in ((5, 7, 3), (5, 7)):
        picture = rng.integers(0, 256, shape).astype(np.uint8)
        decoded = cv2.imdecode(np.frombuffer(encode_png(picture), np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(decoded, picture[..., ::-1] if len(shape) == 3 else picture)
