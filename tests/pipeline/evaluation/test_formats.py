import contextlib
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.evaluation.formats import (
    Guesses,
    read_guesses,
    read_score_map,
    read_top_classes,
    score_map_path,
    write_guesses,
    write_score_map,
)
from pipeline.evaluation.truth import GroundTruth

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


def refusal(call: Callable[[], object]) -> str:
    """The one line that the call is refused with."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    path = tmp_path / "guesses.csv"
    path.write_text(CSV)
    assert_equal(read_guesses(path, TRUTH), GUESSES)
    _, b, a, c = CSV.splitlines()
    path.write_text(f"\ufeff{a} \r\n\r\n{c}\r\nval/b.JPEG{b[1:]}   \r\n")  # no header, other order
    assert_equal(read_guesses(path, TRUTH), GUESSES)


def test_a_parquet_file_is_read_by_id(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "guesses.parquet", PARQUET)
    assert_equal(read_guesses(path, TRUTH), GUESSES)
    assert_equal(read_guesses(path, NUMBERS_ONLY), GUESSES)


def test_parquet_lists_of_other_kinds_and_nulls_read_the_same(tmp_path: Path) -> None:
    boxes = pa.array(
        [PARQUET["boxes"][0], PARQUET["boxes"][1], None],
        pa.large_list(pa.list_(pa.float32(), 4)),
    )
    labels = pa.array([[2], [0, 1], None], pa.list_(pa.int16()))
    ids = pa.array(PARQUET["id"]).dictionary_encode()
    path = write_parquet(
        tmp_path / "guesses.parquet", {"boxes": boxes, "id": ids, "labels": labels}
    )
    assert_equal(read_guesses(path, TRUTH), GUESSES)


def test_a_parquet_file_without_labels_names_no_class(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "guesses.parquet", {k: PARQUET[k] for k in ("id", "boxes")})
    expected = Guesses(labels=np.full((3, 5), -1), boxes=GUESSES.boxes)
    assert_equal(read_guesses(path, TRUTH), expected)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("fractions", [False, True])
def test_guesses_written_and_read_again_are_equal(
    tmp_path: Path, suffix: str, fractions: bool
) -> None:
    rng = np.random.default_rng(3)
    n = 40
    ids = tuple(f"val/{i}.JPEG" for i in rng.permutation(n))
    truth = replace(TRUTH, ids=ids, labels=np.zeros(n, np.int64), sizes=np.full((n, 2), 100))
    found = np.arange(5) < rng.integers(0, 6, (n, 1))
    corners = np.sort(rng.integers(0, 100, (n, 5, 2, 2)), axis=2).reshape(n, 5, 4)
    exact: np.ndarray = corners / 7 if fractions else corners
    guesses = Guesses(
        labels=np.where(found, rng.integers(0, 3, (n, 5)), -1),
        boxes=np.where(found[..., None], exact, exact.dtype.type(-1)),
    )
    path = tmp_path / f"guesses{suffix}"
    write_guesses(path, truth, guesses)
    assert_equal(read_guesses(path, truth), guesses)
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_written_files_look_as_their_formats_do(tmp_path: Path) -> None:
    for suffix in (".csv", ".parquet"):
        write_guesses(tmp_path / f"g{suffix}", TRUTH, GUESSES)
    assert (tmp_path / "g.csv").read_text() == CSV
    written = pq.read_table(tmp_path / "g.parquet")
    assert written.to_pydict() == {**PARQUET, "id": list(TRUTH.ids)}


def test_kaggle_ids_keep_their_folders_where_file_names_repeat(tmp_path: Path) -> None:
    truth = replace(TRUTH, ids=("x/1.jpg", "y/1.jpg", "y/2.jpg"))
    path = tmp_path / "guesses.csv"
    write_guesses(path, truth, GUESSES)
    assert [line.split(",")[0] for line in path.read_text().splitlines()[1:]] == list(truth.ids)
    assert_equal(read_guesses(path, truth), GUESSES)


def test_ids_with_commas_quotes_and_line_breaks_survive_csv(tmp_path: Path) -> None:
    truth = replace(TRUTH, ids=('a,"b"', "two\nlines", "it's"))
    write_guesses(tmp_path / "guesses.csv", truth, GUESSES)
    assert_equal(read_guesses(tmp_path / "guesses.csv", truth), GUESSES)


# Guesses, each fault


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("a,n00000001 1 2 3", ["line 3", "groups of five"]),
        ("a,n00000001 1 2 3 four", ["line 3", "'four'"]),
        ("a,n00000001 1 2 3 nan", ["line 3", "'nan'"]),
        ("a,n00000001 1 2 3 1_0", ["line 3", "'1_0'"]),
        ("a,n00000001 1 2 3 ٣", ["line 3", "'٣'"]),
        ("a,n00000001 1 2 3 1e999", ["line 3", "beyond all images"]),
        ("a,n00000001 1 2 51 4", ["line 3", "1 2 51 4", "50 x 40 pixels"]),
        ("a,n00000001 1 2 50.5 4", ["line 3", "1 2 50.5 4", "50 x 40 pixels"]),
        ("a,n00000001 -1 2 5 4", ["line 3", "outside its image"]),
        ("a,n00000001 3 2 1 4", ["line 3", "minimum is above its maximum"]),
        ("a,n09999999 1 2 3 4", ["line 3", "n09999999", "none of the 3"]),
        ("a,1 1 2 3 4", ["line 3", "class '1'"]),
        ("a," + "n00000001 1 2 3 4 " * 6, ["line 3", "6 guesses"]),
        ("d,n00000001 1 2 3 4", ["line 3", "'d'", "val/b.JPEG"]),
        ("b,n00000001 1 2 3 4", ["line 3", "again, after 2"]),
        ("", ["lacks 1 of 3 images: val/a.JPEG"]),
    ],
)
def test_a_faulty_kaggle_file_is_refused_by_line(
    tmp_path: Path, row: str, parts: list[str]
) -> None:
    path = tmp_path / "guesses.csv"
    path.write_text(f"ImageId,PredictionString\nb,n00000003 0 1 30 20\n{row}\nc,\n")
    message = refusal(lambda: read_guesses(path, TRUTH))
    assert all(part in message for part in [str(path), *parts]), message


def test_a_file_name_that_two_images_share_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "guesses.csv"
    path.write_text("1,n00000001 1 2 3 4\n")
    truth = replace(TRUTH, ids=("x/1.jpg", "y/1.jpg", "y/2.jpg"))
    assert "line 1 names image '1'" in refusal(lambda: read_guesses(path, truth))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"id": ["b", "a", "a"]}, ["row 3", "again"]),
        ({"id": ["b", "a", "x"]}, ["row 3", "'x'"]),
        ({"id": ["b", "a", None]}, ["row 3", "no id"]),
        ({"labels": [[2], [0], []]}, ["row 2", "one label a box"]),
        ({"labels": [[2], [0, 3], []]}, ["row 2", "label 3", "0 to 2"]),
        ({"labels": [[-2], [0, 1], []]}, ["row 1", "label -2"]),
        ({"labels": [[2], [0, None], []]}, ["row 2", "label"]),
        ({"labels": [["x"], ["y", "z"], []]}, ["cannot be read", "labels"]),
        ({"labels": [[0.5], [0, 1], []]}, ["cannot be read"]),
        ({"boxes": [[[0, 1, 30, 20]], [[1, 2, 3, 4], [5, 6, 7]], []]}, ["row 2", "four numbers"]),
        ({"boxes": [[[0, 1, 30, 20]], [[1, 2, 3, 4], None], []]}, ["row 2", "four numbers"]),
        ({"boxes": [[[0, 1, 30, None]], [[1, 2, 3, 4]] * 2, []]}, ["row 1", "missing, NaN"]),
        ({"boxes": [[[0, 1, 31, 20]], [[1, 2, 3, 4]] * 2, []]}, ["row 1", "outside"]),
        ({"boxes": [[[0, 1, 9, 0]], [[1, 2, 3, 4]] * 2, []]}, ["row 1", "above"]),
        ({"boxes": [[[0.0, 1, 9, np.nan]], [[1, 2, 3, 4]] * 2, []]}, ["row 1", "NaN"]),
        ({"boxes": [[[0.0, 1, 9, np.inf]], [[1, 2, 3, 4]] * 2, []]}, ["row 1", "beyond"]),
        (
            {"labels": [[2], [0] * 6, []], "boxes": [[[0, 1, 2, 3]], [[0, 0, 1, 1]] * 6, []]},
            ["row 2", "6 guesses"],
        ),
        ({"id": [], "labels": [], "boxes": []}, ["no rows"]),
    ],
)
def test_a_faulty_parquet_file_is_refused_by_row(
    tmp_path: Path, change: dict[str, Any], parts: list[str]
) -> None:
    columns = {**PARQUET, **change}
    if not columns["id"]:
        columns = {
            "id": pa.array([], pa.string()),
            "labels": pa.array([], pa.list_(pa.int64())),
            "boxes": pa.array([], pa.list_(pa.list_(pa.int64()))),
        }
    path = write_parquet(tmp_path / "guesses.parquet", columns)
    message = refusal(lambda: read_guesses(path, TRUTH))
    assert all(part in message for part in [str(path), *parts]), message


def test_missing_columns_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "guesses.parquet", {"id": PARQUET["id"]})
    assert "boxes" in refusal(lambda: read_guesses(path, TRUTH))
    assert "does not exist" in refusal(lambda: read_guesses(tmp_path / "no.parquet", TRUTH))
    assert "does not exist" in refusal(lambda: read_guesses(tmp_path / "no.csv", TRUTH))
    assert "'.json'" in refusal(lambda: read_guesses(tmp_path / "x.json", TRUTH))
    assert "'.json'" in refusal(lambda: write_guesses(tmp_path / "x.json", TRUTH, GUESSES))


def test_wnids_without_known_classes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.csv"
    path.write_text(CSV)
    assert "only their numbers" in refusal(lambda: read_guesses(path, NUMBERS_ONLY))
    assert "only their numbers" in refusal(lambda: write_guesses(path, NUMBERS_ONLY, GUESSES))


def test_what_text_cannot_tell_is_not_written(tmp_path: Path) -> None:
    no_class = Guesses(labels=np.full((3, 5), -1), boxes=GUESSES.boxes)
    blank = replace(TRUTH, classes=("n00000001", "polar bear", "n00000003"))
    path = tmp_path / "guesses.csv"
    assert "without a class" in refusal(lambda: write_guesses(path, TRUTH, no_class))
    assert "'polar bear'" in refusal(lambda: write_guesses(path, blank, GUESSES))
    assert not path.exists()


# A classifier's best classes


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
    path = tmp_path / "classes.csv"
    path.write_text(text)
    top = read_top_classes(path, TRUTH)
    assert top.tolist() == [[2, 0, -1, -1, -1], [1, -1, -1, -1, -1], [2, 0, -1, -1, -1]]
    assert top.dtype == np.int64


@pytest.mark.parametrize(
    "classes", [[[2, 0], [1], [2, 0]], [[WNIDS[2], WNIDS[0]], [WNIDS[1]], [WNIDS[2], WNIDS[0]]]]
)
def test_top_classes_come_from_parquet_alike(tmp_path: Path, classes: list[list[Any]]) -> None:
    path = write_parquet(tmp_path / "c.parquet", {"id": PARQUET["id"], "classes": classes})
    assert read_top_classes(path, TRUTH).tolist() == [
        [2, 0, -1, -1, -1],
        [1, -1, -1, -1, -1],
        [2, 0, -1, -1, -1],
    ]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("a", ["line 2", "0 classes"]),
        ("a,0,1,2,0,1,2", ["line 2", "6 classes"]),
        ("a,3", ["line 2", "'3'", "0 to 2"]),
        ("a,-1", ["line 2", "'-1'"]),
        ("a,0,,1", ["line 2", "''"]),
        ("a,0.0", ["line 2", "'0.0'"]),
        ("a,n09999999", ["line 2", "n09999999", "none of the 3"]),
        ("x,1", ["line 2", "'x'"]),
        ("b,1", ["line 2", "again"]),
        ("", ["lacks 1 of 3 images: val/a.JPEG"]),
    ],
)
def test_faulty_top_classes_are_refused_by_line(tmp_path: Path, row: str, parts: list[str]) -> None:
    path = tmp_path / "classes.csv"
    path.write_text(f"b,0\n{row}\nc,1\n")
    message = refusal(lambda: read_top_classes(path, TRUTH))
    assert all(part in message for part in [str(path), *parts]), message


def test_top_classes_by_wnid_without_known_classes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_text("b,n00000001\na,1\nc,1\n")
    assert "only their numbers" in refusal(lambda: read_top_classes(path, NUMBERS_ONLY))
    path.write_text("b,999\na,1\nc,1\n")
    assert read_top_classes(path, NUMBERS_ONLY)[:, 0].tolist() == [999, 1, 1]
    parquet = write_parquet(
        tmp_path / "c.parquet", {"id": PARQUET["id"], "classes": [[0], [1, None], [2]]}
    )
    assert f"{parquet} row 2" in refusal(lambda: read_top_classes(parquet, TRUTH))
    assert "'.txt'" in refusal(lambda: read_top_classes(tmp_path / "c.txt", TRUTH))


# Score maps


def test_a_score_map_lies_under_its_id_with_folders_and_suffix(tmp_path: Path) -> None:
    path = score_map_path(tmp_path, "val/ILSVRC2012_val_00000001.JPEG")
    assert path == tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG.npy"


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\0b"])
def test_an_id_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "maps"
    assert repr(name) in refusal(lambda: write_score_map(root, name, np.zeros((2, 2))))
    assert not root.exists()


def test_a_map_of_224_pixels_is_kept_to_the_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((224, 224), np.float32)
    write_score_map(tmp_path, "val/a.JPEG", values)
    path = score_map_path(tmp_path, "val/a.JPEG")
    read = read_score_map(path, (224, 224))
    np.testing.assert_array_equal(read, values)
    assert read.dtype == np.load(path).dtype == np.float32
    assert [x.name for x in path.parent.iterdir()] == ["a.JPEG.npy"]


@pytest.mark.parametrize("shape", [(64, 64), (7, 14), (224, 100), (1, 1)])
def test_smaller_maps_are_resized_bilinearly(tmp_path: Path, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).random(shape)
    write_score_map(tmp_path, "a", values)
    expected = torch.nn.functional.interpolate(
        torch.tensor(values)[None, None], (224, 224), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    written = read_score_map(score_map_path(tmp_path, "a"), (224, 224))
    np.testing.assert_allclose(written, expected, atol=1e-5)


def test_a_written_map_stays_within_0_and_1(tmp_path: Path) -> None:
    for value in (0.0, 1.0, 1 / 3):
        write_score_map(tmp_path, "a", np.full((3, 5), value))
        written = read_score_map(score_map_path(tmp_path, "a"), None)
        np.testing.assert_allclose(written, value, atol=1e-6)


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
    ("values", "part"),
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
    tmp_path: Path, values: np.ndarray, part: str
) -> None:
    path = tmp_path / "a.npy"
    np.save(path, values)
    message = refusal(lambda: read_score_map(path, (2, 3)))
    assert str(path) in message
    assert part in message


def npy_header(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


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
    whole = npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n")
    huge = npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 10000000), }\n")
    contents = [b"", b"text", whole, whole[:-5], whole + bytes(23), huge]
    contents += [objects.getvalue(), pickle.dumps(Trap()), packed.getvalue()]
    for data in contents:
        path.write_bytes(data)
        message = refusal(lambda: read_score_map(path, (2, 3)))
        assert f"{path} cannot be read" in message
    assert not (tmp_path / "pickle-was-run").exists()
    path.write_bytes(whole + bytes(24))  # the same header is good with all its numbers
    assert read_score_map(path, (2, 3)).sum() == 0


def test_a_missing_score_map_is_refused_by_name(tmp_path: Path) -> None:
    assert "a.npy is missing" in refusal(lambda: read_score_map(tmp_path / "a.npy", None))


@pytest.mark.parametrize("value", [np.nan, -0.1, 1.1])
def test_a_faulty_map_is_not_written(tmp_path: Path, value: float) -> None:
    message = refusal(lambda: write_score_map(tmp_path, "val/a.JPEG", np.full((4, 4), value)))
    assert "val/a.JPEG" in message
    assert list(tmp_path.iterdir()) == []


# Whatever comes

WORDS = st.lists(
    st.sampled_from(
        ["a", "b", "c", "n00000001", "1", "0", "-1", "1e9", "nan", ",", '"', " ", "\n", "\r", "\t"]
    ),
    max_size=25,
).map("".join)
CONTENT = st.one_of(st.binary(max_size=200), WORDS.map(str.encode))


@given(data=CONTENT)
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    for suffix in (".csv", ".parquet", ".npy"):
        (tmp_path / f"x{suffix}").write_bytes(data)
    calls: list[Callable[[], object]] = [
        lambda: read_guesses(tmp_path / "x.csv", TRUTH),
        lambda: read_guesses(tmp_path / "x.parquet", TRUTH),
        lambda: read_top_classes(tmp_path / "x.csv", TRUTH),
        lambda: read_top_classes(tmp_path / "x.parquet", TRUTH),
        lambda: read_score_map(tmp_path / "x.npy", None),
    ]
    for call in calls:
        with contextlib.suppress(UserError):
            call()


@given(data=st.data())
def test_any_change_to_a_score_map_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n") + bytes(24)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.npy").write_bytes(content)
    with contextlib.suppress(UserError):
        values = read_score_map(tmp_path / "x.npy", None)
        assert values.ndim == 2
        assert values.min() >= 0
        assert values.max() <= 1
