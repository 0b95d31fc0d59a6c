import numpy as np

from pipeline.evaluation.constant_boxes import (
    GRID,
    centred_boxes,
    fit_centred_box,
    whole_image_boxes,
)
from pipeline.evaluation.protocols import best_iou


def test_constant_boxes_by_hand() -> None:
    sizes = np.array([[375, 500], [1, 1]])
    assert whole_image_boxes(sizes).tolist() == [[0, 0, 499, 374], [0, 0, 0, 0]]
    # 10 high, 20 wide, shares 0.5 and 0.35: 5 high from (10 - 5) // 2, 7 wide from (20 - 7) // 2
    assert centred_boxes(np.array([[10, 20]]), (0.5, 0.35)).tolist() == [[6, 2, 12, 6]]
    assert centred_boxes(np.array([[3, 3]]), (0.01, 0.01)).tolist() == [[1, 1, 1, 1]]


def test_the_fitted_box_is_the_best_of_a_plain_search() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(30, 80, (40, 2))
    truths = []
    for height, width in sizes.tolist():
        boxes = []
        for _ in range(rng.integers(0, 3)):
            x0, y0 = rng.integers(0, width // 3), rng.integers(0, height // 3)
            boxes.append(
                [x0, y0, rng.integers(width // 2, width), rng.integers(height // 2, height)]
            )
        truths.append(boxes)

    flat = np.concatenate([np.array(boxes).reshape(-1, 4) for boxes in truths])
    starts = np.cumsum([0, *map(len, truths)])

    def hits(height_share: float, width_share: float) -> int:
        boxes = centred_boxes(sizes, (height_share, width_share))
        return int((best_iou(boxes, flat, starts) >= 0.5).sum())

    scores = {(float(h), float(w)): hits(h, w) for h in GRID for w in GRID}
    best = max(scores.values())
    fitted = fit_centred_box(sizes, truths)
    assert fitted == min(pair for pair, score in scores.items() if score == best)
    assert best > hits(1.0, 1.0)


def test_there_is_no_fitted_box_without_boxes() -> None:
    assert fit_centred_box(np.array([[10, 10], [20, 20]]), [[], []]) is None
