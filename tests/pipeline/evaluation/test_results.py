"""Evaluations that are written and read back."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.evaluation.results import (
    MAPS_NAME,
    METRICS_NAME,
    Row,
    RowFigures,
    clear_maps,
    maps_bytes,
    read_evaluation,
    write_evaluation,
    write_maps,
)


def row_figures(map: str, rule: str | None, gt_known: float) -> RowFigures:
    return RowFigures(
        row=Row(map=map, rule=rule, classes=None),
        title=map.upper(),
        paper={"metric1": 0.5, "metric2": None},
        figures={"gt_known": gt_known, "n": 2},
        interval={"gt_known": [0.0, 1.0], "auc": None},
        curves={"iou": [0.05, 0.1]},
        subsets={"small_boxes": {"gt_known": None}},
    )


ROWS = [row_figures("whole image", None, 0.5), row_figures("aln", "mean", 1.0)]
PREDICTIONS = pa.table(
    {
        "image": [0, 1, 0, 1],
        "map": ["whole image", "whole image", "aln", "aln"],
        "rule": pa.array([None, None, "mean", "mean"], pa.string()),
        "iou": [0.1, None, 0.2, 0.3],
    }
)
IMAGES = pa.table({"image": [0, 1], "id": ["a", "b"]})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    levels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    write_maps(tmp_path, 0, maps_bytes("aln", np.array([0]), levels[:1]))
    write_maps(tmp_path, 1, maps_bytes("aln", np.array([1]), levels[1:]))
    write_evaluation(tmp_path, {"split": "val"}, ROWS, PREDICTIONS, IMAGES)
    evaluation = read_evaluation(tmp_path)
    assert evaluation.metrics == {"format": 2, "split": "val"}
    assert list(evaluation.rows) == ROWS
    assert evaluation.images().equals(IMAGES)
    assert evaluation.predictions("aln", "mean")["iou"].to_pylist() == [0.2, 0.3]
    assert evaluation.predictions("whole image", None)["iou"].to_pylist() == [0.1, None]
    assert not len(evaluation.predictions("aln", None))
    maps = evaluation.maps([1, 7])
    assert list(maps) == [1]
    np.testing.assert_array_equal(maps[1], levels[1])


def test_a_later_evaluation_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    level = np.zeros((1, 2, 2), np.uint8)
    write_maps(tmp_path, 0, maps_bytes("aln", np.array([0]), level))
    write_evaluation(tmp_path, {}, ROWS, PREDICTIONS, IMAGES)
    write_maps(tmp_path, 5, maps_bytes("aln", np.array([5]), level))  # one that was interrupted
    assert list(read_evaluation(tmp_path).maps(range(9))) == [0]
    clear_maps(tmp_path)
    write_evaluation(tmp_path, {}, ROWS[:1], PREDICTIONS, IMAGES)
    evaluation = read_evaluation(tmp_path)
    assert list(evaluation.rows) == ROWS[:1]
    assert evaluation.maps(range(9)) == {}
    assert not (tmp_path / MAPS_NAME).exists()


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, f"has no {METRICS_NAME}"),
        ("{", "cannot be read"),
        ('{"format": 1}', "format 1"),
        ("[]", "format None"),
        ('{"format": 2}', "rows"),
        ('{"format": 2, "rows": [{"map": "aln"}]}', "rule"),
    ],
)
def test_what_is_no_evaluation_is_one_line(tmp_path: Path, content: str | None, fact: str) -> None:
    if content is not None:
        (tmp_path / METRICS_NAME).write_text(content)
    with pytest.raises(UserError, match=fact):
        read_evaluation(tmp_path)


@pytest.mark.parametrize("name", ["predictions.parquet", "images.parquet"])
@pytest.mark.parametrize("data", [None, b"", b"of another evaluation"])
def test_a_file_of_another_evaluation_is_named(
    name: str, data: bytes | None, tmp_path: Path
) -> None:
    write_evaluation(tmp_path, {}, ROWS, PREDICTIONS, IMAGES)
    (tmp_path / name).unlink()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is not what was written"):
        read_evaluation(tmp_path)
