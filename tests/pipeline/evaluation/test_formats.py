"""Boxes, classes and score maps of other programs: each format, and each fault of each."""

import contextlib
import io
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.evaluation.formats import (
    Guesses,
    read_guesses,
    read_score_map,
    read_top_classes,
    score_map_path,
)
from pipeline.evaluation.truth import GroundTruth
from tests.pipeline.evaluation.files import assert_refused, content, write

WNIDS = ("n00000001", "n00000002", "n00000003")
TRUTH = GroundTruth(
    ids=("val/b.JPEG", "val/a.JPEG", "val/c.JPEG"),
    labels=np.array([0, 1, 2]),
    sizes=np.array([[20, 30], [40, 50], [8, 9]]),
    boxes=np.zeros((0, 4), np.int64),
    starts=np.zeros(4, np.int64),
    classes=WNIDS,
    class_names=WNIDS,
)
NUMBERS_ONLY = replace(TRUTH, classes=None, class_names=None)
SHARED_NAMES = replace(TRUTH, ids=("x/1.jpg", "y/1.jpg", "y/2.jpg"))
NO_GUESS = [-1, -1, -1, -1]
# In the rows of TRUTH: one guess, two, none.
GUESSES = Guesses(
    labels=np.array([[2, -1, -1, -1, -1], [0, 1, -1, -1, -1], [-1] * 5]),
    boxes=np.array(
        [
            [[0, 1, 30, 20], *[NO_GUESS] * 4],
            [[1, 2, 3, 4], [5, 6, 7, 8], *[NO_GUESS] * 3],
            [NO_GUESS] * 5,
        ]
    ),
)
CSV = "ImageId,PredictionString\nb,n00000003 0 1 30 20\na,n00000001 1 2 3 4 n00000002 5 6 7 8\nc,\n"
PARQUET: dict[str, Any] = {
    "id": ["val/b.JPEG", "a", "c"],
    "labels": [[2], [0, 1], []],
    "boxes": [[[0, 1, 30, 20]], [[1, 2, 3, 4], [5, 6, 7, 8]], []],
}


def assert_equal(read: Guesses, expected: Guesses) -> None:
    np.testing.assert_array_equal(read.labels, expected.labels)
    np.testing.assert_array_equal(read.boxes, expected.boxes)
    assert read.labels.dtype == np.int64
    assert read.boxes.dtype == expected.boxes.dtype


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# Guesses, each format


def test_a_kaggle_file_is_read_by_file_name_and_wnid(tmp_path: Path) -> None:
    path = write(tmp_path / "guesses.csv", CSV)
    assert_equal(read_guesses(path, TRUTH), GUESSES)
    _, b, a, c = CSV.splitlines()  # next: no header, another order
    write(path, f"\ufeff{a} \r\n\r\n{c}\r\nval/b.JPEG{b[1:]}   \r\n")
    assert_equal(read_guesses(path, TRUTH), GUESSES)


def test_a_parquet_file_is_read_by_id(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "guesses.parquet", PARQUET)
    assert_equal(read_guesses(path, TRUTH), GUESSES)
    assert_equal(read_guesses(path, NUMBERS_ONLY), GUESSES)


def test_parquet_lists_of_other_kinds_and_nulls_read_the_same(tmp_path: Path) -> None:
    boxes = [*PARQUET["boxes"][:2], None]
    columns = {
        "boxes": pa.array(boxes, pa.large_list(pa.list_(pa.float32(), 4))),
        "id": pa.array(PARQUET["id"]).dictionary_encode(),
        "labels": pa.array([[2], [0, 1], None], pa.list_(pa.int16())),
    }
    path = write_parquet(tmp_path / "guesses.parquet", columns)
    assert_equal(read_guesses(path, TRUTH), GUESSES)


def test_a_parquet_file_without_labels_names_no_class(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "guesses.parquet", {k: PARQUET[k] for k in ("id", "boxes")})
    expected = Guesses(labels=np.full((3, 5), -1), boxes=GUESSES.boxes)
    assert_equal(read_guesses(path, TRUTH), expected)


# Guesses, each fault


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ("a,n00000001 1 2 3", " line 3 .*groups of five"),
        ("a", " line 3 .*groups of five"),
        ("a,n00000001 1 2 3 four", " line 3 .*'four'"),
        ("a,n00000001 1 2 3 nan", " line 3 .*'nan'"),
        ("a,n00000001 1 2 3 1_0", " line 3 .*'1_0'"),
        ("a,n00000001 1 2 3 ٣", " line 3 .*'٣'"),
        ("a,n00000001 1 2 3 1e999", " line 3 .*beyond all images"),
        ("a,n00000001 1 2 51 4", " line 3 .*1 2 51 4: .*50 x 40 pixels"),
        ("a,n00000001 1 2 50.5 4", " line 3 .*1 2 50.5 4: .*50 x 40 pixels"),
        ("a,n00000001 -1 2 5 4", " line 3 .*outside its image"),
        ("a,n00000001 3 2 1 4", " line 3 .*minimum is above its maximum"),
        ("a,n09999999 1 2 3 4", " line 3 .*'n09999999', .* 3 known"),
        ("a,1 1 2 3 4", " line 3 .*class '1'"),
        ("a," + "n00000001 1 2 3 4 " * 6, " line 3 .*6 guesses"),
        ("d,n00000001 1 2 3 4", " line 3 .*'d', .*'val/b.JPEG'"),
        ("b,n00000001 1 2 3 4", " line 3 .*again, after .* line 2;"),
        ("a,n00000001 9 9 9 4", " line 3 .*minimum is above its maximum"),
        ("train/a.JPEG,n00000001 1 2 3 4", " line 3 names image 'train/a.JPEG'"),
        ("", " lacks 1 of 3 images: val/a.JPEG"),
    ],
)
def test_a_faulty_kaggle_file_is_refused_by_line(tmp_path: Path, row: str, fact: str) -> None:
    text = f"ImageId,PredictionString\nb,n00000003 0 1 30 20\n{row}\nc,\n"
    path = write(tmp_path / "guesses.csv", text)
    assert_refused(path, fact, read_guesses, path, TRUTH)


SIX = {"labels": [[2], [0] * 6, []], "boxes": [[[0, 1, 2, 3]], [[0, 0, 1, 1]] * 6, []]}
SHARES = {"boxes": [[[0, 0.1, 1.0000001, 1]], [[0.5, 0.5, 1, 1], [0.25, 0, 0.5, 0.75]], []]}
WIDTHS = {"boxes": [[[20, 10, 11, 10]], [[25, 25, 25, 15], [1, 2, 3, 4]], []]}
EXCHANGED = {"boxes": [[[1, 0, 20, 30]], [[30, 1, 40, 50], [1, 2, 3, 4]], []]}
EMPTY = {
    "id": pa.array([], pa.string()),
    "boxes": pa.array([], pa.list_(pa.list_(pa.int64()))),
    "labels": pa.array([], pa.list_(pa.int64())),
}


def boxes(*first: Any) -> dict[str, Any]:
    return {"boxes": [[list(first)], [[1, 2, 3, 4]] * 2, []]}


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"id": ["b", "a", "a"]}, " row 3 .*again"),
        ({"id": ["b", "a", "x"]}, " row 3 .*'x'"),
        ({"id": ["b", "a", None]}, " row 3 has no id"),
        ({"labels": [[2], [0], []]}, " row 2 .*one label a box"),
        ({"labels": [[2], [0, 3], []]}, " row 2 .*label 3; .*0 to 2"),
        ({"labels": [[-2], [0, 1], []]}, " row 1 .*label -2"),
        ({"labels": [[2], [0, None], []]}, " row 2 .*label null"),
        ({"labels": [["x"], ["y", "z"], []]}, " cannot be read .*labels"),
        ({"labels": [[0.5], [0, 1], []]}, " cannot be read"),
        ({"boxes": [[[0, 1, 30, 20]], [[1, 2, 3, 4], [5, 6, 7]], []]}, " row 2 .*four numbers"),
        ({"boxes": [[[0, 1, 30, 20]], [[1, 2, 3, 4], None], []]}, " row 2 .*four numbers"),
        (boxes(0, 1, 30, None), " row 1 .*missing, NaN"),
        (boxes(0, 1, 31, 20), " row 1 .*outside"),
        (boxes(0, 1, 9, 0), " row 1 .*above"),
        (boxes(0.0, 1, 9, np.nan), " row 1 .*NaN"),
        (boxes(0.0, 1, 9, np.inf), " row 1 .*beyond"),
        (SIX, " row 2 has 6 guesses"),
        (SHARES, " has corners from 0 to 1 only"),
        (WIDTHS, " row 1 .*fit as x y width height"),
        (EXCHANGED, " row 1 .*fit as y0 x0 y1 x1"),
        (EMPTY, " has no rows"),
    ],
)
def test_a_faulty_parquet_file_is_refused_by_row(
    tmp_path: Path, change: dict[str, Any], fact: str
) -> None:
    path = write_parquet(tmp_path / "guesses.parquet", {**PARQUET, **change})
    assert_refused(path, fact, read_guesses, path, TRUTH)


def test_files_that_are_no_guesses_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "guesses.parquet", {"id": PARQUET["id"]})
    assert_refused(path, " cannot be read .*boxes", read_guesses, path, TRUTH)
    for name, fact in (
        ("no.parquet", "does not exist"),
        ("no.csv", "does not exist"),
        ("x.json", "'.json'"),
    ):
        path = tmp_path / name
        assert_refused(path, f" .*{fact}", read_guesses, path, TRUTH)
    path = write(tmp_path / "guesses.csv", "1,n00000001 1 2 3 4\n")
    assert_refused(path, " line 1 .*'1'.*only one file", read_guesses, path, SHARED_NAMES)
    assert_refused(path, " line 1 .*only their numbers", read_guesses, path, NUMBERS_ONLY)


@pytest.mark.parametrize(
    ("folder", "matches"),
    [
        *((folder, True) for folder in ("", "/data/test/val/", "VAL/n01/", "validation/")),
        *((folder, False) for folder in ("train/", "test/x/", "val/training/")),
    ],
)
def test_an_image_of_another_split_is_another_image(
    tmp_path: Path, folder: str, matches: bool
) -> None:
    """The truth's ids are val/a.JPEG ...; without folders a name is of whatever split it is."""
    text = "".join(f"{folder}{name}.JPEG,n00000001 1 2 3 4\n" for name in "abc")
    path = write(tmp_path / "guesses.csv", text)
    if matches:
        assert (read_guesses(path, TRUTH).labels[:, 0] == 0).all()
    else:
        assert_refused(path, f" line 1 names image '{folder}a.JPEG'", read_guesses, path, TRUTH)


def test_numbers_of_classes_from_an_unsorted_list_are_refused(tmp_path: Path) -> None:
    truth = replace(TRUTH, unsorted="classes.txt line 2")
    fact = ".* by number, and classes.txt line 2 is out of order"
    path = write_parquet(tmp_path / "guesses.parquet", PARQUET)
    assert_refused(path, f" row 1 guess 1 {fact}", read_guesses, path, truth)
    path = write(tmp_path / "classes.csv", "a,n00000001\nb,2\nc,0\n")
    assert_refused(path, f" line 2 class 1 {fact}", read_top_classes, path, truth)
    assert_equal(read_guesses(write(tmp_path / "guesses.csv", CSV), truth), GUESSES)


# A classifier's best classes

TOP = [[2, 0, -1, -1, -1], [1, -1, -1, -1, -1], [2, 0, -1, -1, -1]]


@pytest.mark.parametrize(
    "text",
    [
        "id,class1,class2\nb,n00000003,n00000001\na,1\nc,2,0\n",
        "image_id,class1\nc,2,n00000001\nb,2,0\na,n00000002,,\n",
        "val/b.JPEG,2,0\r\nval/a.JPEG,1\r\nval/c.JPEG,2,0\r\n",
    ],
)
def test_top_classes_are_wnids_or_indices_with_or_without_a_header(
    tmp_path: Path, text: str
) -> None:
    top = read_top_classes(write(tmp_path / "classes.csv", text), TRUTH)
    assert top.tolist() == TOP
    assert top.dtype == np.int64


@pytest.mark.parametrize(
    "classes", [[[2, 0], [1], [2, 0]], [[WNIDS[2], WNIDS[0]], [WNIDS[1]], [WNIDS[2], WNIDS[0]]]]
)
def test_top_classes_come_from_parquet_alike(tmp_path: Path, classes: list[list[Any]]) -> None:
    path = write_parquet(tmp_path / "c.parquet", {"id": PARQUET["id"], "classes": classes})
    assert read_top_classes(path, TRUTH).tolist() == TOP


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ("a", " line 2 has 0 classes"),
        ("a,0,1,2,0,1,2", " line 2 has 6 classes"),
        ("a,3", " line 2 .*'3'; .*0 to 2"),
        ("a,-1", " line 2 .*'-1'"),
        ("a,0,,1", " line 2 .*''"),
        ("a,0.0", " line 2 .*'0.0'"),
        ("a,n09999999", " line 2 .*'n09999999'; .*0 to 2"),
        ("x,1", " line 2 .*'x'"),
        ("b,1", " line 2 .*again"),
        ("", " lacks 1 of 3 images: val/a.JPEG"),
    ],
)
def test_faulty_top_classes_are_refused_by_line(tmp_path: Path, row: str, fact: str) -> None:
    path = write(tmp_path / "classes.csv", f"b,0\n{row}\nc,1\n")
    assert_refused(path, fact, read_top_classes, path, TRUTH)


def test_top_classes_without_known_classes_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "classes.csv", "b,999\na,1\nc,1\n")
    assert read_top_classes(path, NUMBERS_ONLY)[:, 0].tolist() == [999, 1, 1]
    write(path, "b,1\na,n00000001\nc,1\n")
    assert_refused(path, " line 2 .*only their numbers", read_top_classes, path, NUMBERS_ONLY)


def test_top_classes_that_are_missing_are_refused(tmp_path: Path) -> None:
    columns = {"id": PARQUET["id"], "classes": [[0], [1, None], [2]]}
    path = write_parquet(tmp_path / "c.parquet", columns)
    assert_refused(path, " row 2 class 2 is ''", read_top_classes, path, TRUTH)
    path = tmp_path / "c.txt"
    assert_refused(path, " has suffix '.txt'", read_top_classes, path, TRUTH)


# Score maps


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\0b"])
def test_an_id_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    assert_refused(repr(name), "", score_map_path, tmp_path, name)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("f2", np.float32), (">f4", np.float32), ("f8", np.float64), (">f8", np.float64)],
)
def test_floats_of_every_width_and_order_are_read(
    tmp_path: Path, dtype: str, expected: type
) -> None:
    values = np.array([[0, 0.25], [0.5, 1]])
    np.save(tmp_path / "a.npy", np.asfortranarray(values.astype(dtype)))
    read = read_score_map(tmp_path / "a.npy", (2, 2))
    np.testing.assert_array_equal(read, values)
    assert read.dtype == expected
    assert read.dtype.isnative


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        (np.full((2, 3), np.nan), "NaNs"),
        (np.array([[0, 0.5, np.nan], [0, 1, 1]]), "NaNs"),
        (np.full((2, 3), 1.001), "1.001"),
        (np.array([[-1e-3, 0, 0], [0, 1, 1]]), "-0.001"),
        (np.full((2, 3), np.inf), "inf"),
        (np.zeros((3, 2)), "shape (3, 2); expected (2, 3)"),
        (np.zeros((1, 2, 3)), "shape (1, 2, 3)"),
        (np.zeros((0, 3)), "shape (0, 3)"),
        (np.zeros((2, 3), np.uint8), "uint8"),
        (np.zeros((2, 3), bool), "bool"),
        (np.zeros((2, 3), np.complex64), "complex64"),
        (np.array([["a"] * 3] * 2), "<U1"),
    ],
)
def test_a_faulty_score_map_is_refused_by_name(
    tmp_path: Path, values: np.ndarray, fact: str
) -> None:
    path = tmp_path / "a.npy"
    np.save(path, values)
    assert_refused(path, f" .*{re.escape(fact)}", read_score_map, path, (2, 3))


def test_rounding_may_leave_0_and_1(tmp_path: Path) -> None:
    values = np.array([[-1e-7, 0.5, 1 + 1e-7]])
    np.save(tmp_path / "a.npy", values)
    assert read_score_map(tmp_path / "a.npy", None).tolist() == [[0, 0.5, 1]]


def npy_header(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


HEADER = npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n")
HUGE = npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 10000000), }\n")


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (Path("pickle-was-run"),)


def test_a_damaged_or_pickled_score_map_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npy"
    objects, packed = io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([[Trap()]], object), allow_pickle=True)
    np.savez(packed, np.zeros((2, 3)))
    contents = [b"", b"text", HEADER, HEADER[:-5], HEADER + bytes(23), HUGE]
    contents += [objects.getvalue(), pickle.dumps(Trap()), packed.getvalue()]
    for data in contents:
        write(path, data)
        assert_refused(path, " cannot be read", read_score_map, path, (2, 3))
    assert not (tmp_path / "pickle-was-run").exists()
    path.unlink()
    assert_refused(path, " is missing", read_score_map, path, None)
    write(path, HEADER + bytes(24))  # the same header is good with all its numbers
    assert read_score_map(path, (2, 3)).sum() == 0


# Whatever comes


@settings(max_examples=30)
@given(data=content(["a", "b", "c", "n00000001", "1", "0", "-1", "1e9", "nan"]))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    calls: dict[str, list[Callable[[Path], object]]] = {
        ".csv": [lambda x: read_guesses(x, TRUTH), lambda x: read_top_classes(x, TRUTH)],
        ".parquet": [lambda x: read_guesses(x, TRUTH), lambda x: read_top_classes(x, TRUTH)],
        ".npy": [lambda x: read_score_map(x, None)],
    }
    for suffix, readers in calls.items():
        path = write(tmp_path / f"x{suffix}", data)
        for read in readers:
            with contextlib.suppress(UserError):
                read(path)


@settings(max_examples=30)
@given(changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1))
def test_any_change_to_a_parquet_file_is_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    path = write_parquet(tmp_path / "guesses.parquet", PARQUET)
    changed = bytearray(path.read_bytes())
    for position, value in changes:
        changed[position % len(changed)] = value
    write(path, bytes(changed))
    with contextlib.suppress(UserError):
        read_guesses(path, TRUTH)


def test_names_that_are_no_utf_8_are_refused(tmp_path: Path) -> None:
    names = pa.array([b"val/\xd6.JPEG", b"a", b"c"]).view(pa.string())
    path = write_parquet(tmp_path / "guesses.parquet", {**PARQUET, "id": names})
    assert_refused(path, " cannot be read .*UTF8", read_guesses, path, TRUTH)
