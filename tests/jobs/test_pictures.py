import io

import numpy as np
from PIL import Image

from jobs.pictures import BORDER, CAPTION, GAP, SHADOW, TITLE, Cell, draw_grid, png, with_borders

GREY = np.full((2, 3, 3), 90, np.uint8)
LEFT_AND_RIGHT = np.array([[0, 0, 1], [0, 0, 1]])


def cell(side: int, number: int) -> Cell:
    rng = np.random.default_rng(number)
    return Cell(
        image=rng.integers(0, 255, (side, side, 3), dtype=np.uint8),
        segments=np.arange(side * side).reshape(side, side) // (2 * side),
        name=f"class {number}, whose name is much longer than the picture above it is wide",
        note=f"row {number}",
    )


def test_borders_lie_where_labels_change_and_nowhere_else() -> None:
    bordered = with_borders(GREY, LEFT_AND_RIGHT, scale=3)
    assert bordered.shape == (6, 9, 3)
    assert (bordered[:, 6] == BORDER).all()
    assert (bordered[:, 5] == SHADOW).all()
    others = np.delete(bordered, [5, 6], axis=1)
    assert (others == 90).all()
    downwards = with_borders(GREY.transpose(1, 0, 2), LEFT_AND_RIGHT.T, scale=3)
    assert np.array_equal(downwards, bordered.transpose(1, 0, 2))


def test_unenlarged_images_have_lines_of_one_pixel() -> None:
    bordered = with_borders(GREY, LEFT_AND_RIGHT, scale=1)
    assert (bordered[:, 2] == BORDER).all()
    assert (bordered[:, :2] == 90).all()


def test_one_superpixel_has_no_border() -> None:
    assert (with_borders(GREY, np.zeros((2, 3), int), scale=2) == 90).all()


def test_the_grid_holds_every_image_enlarged_and_unchanged_on_its_left_half() -> None:
    cells = [cell(56, number) for number in range(6)]
    grid = draw_grid(cells, "a title" * 100)
    step = 2 * 224 + 4 + GAP
    for number, there in enumerate(cells):
        x, y = GAP + number % 4 * step, TITLE + GAP + number // 4 * (224 + CAPTION + GAP)
        plain = grid[y : y + 224, x : x + 224]
        assert np.array_equal(plain[::4, ::4], there.image)
        bordered = grid[y : y + 224, x + 228 : x + 228 + 224]
        assert np.array_equal(bordered, with_borders(there.image, there.segments, 4))
    assert grid.shape == (TITLE + GAP + 2 * (224 + CAPTION + GAP), 4 * step + GAP, 3)
    file = Image.open(io.BytesIO(png(grid)))
    assert np.array_equal(np.asarray(file), grid)


def test_long_texts_are_cut_so_that_they_stay_under_their_image() -> None:
    grid = draw_grid([cell(56, 0), cell(56, 1)], "t")
    gap = slice(GAP + 2 * 224 + 4 + 1, GAP + 2 * 224 + 4 + GAP)
    assert (grid[TITLE + GAP :, gap] == 255).all()
