import contextlib
import gzip
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.evaluation.truth import (
    GroundTruth,
    ground_truth_of,
    read_classes,
    read_ground_truth,
    write_metadata,
)
from pipeline.shards.format import read_manifest
from pipeline.shards.ledger import read_ledger

ILSVRC = Path(__file__).parents[4] / "shared" / "data" / "ilsvrc-val-boxes"

METADATA = {
    "image_ids.txt": "val/b.JPEG\nval/a.JPEG\nval/c.JPEG\n",
    "class_labels.txt": "val/a.JPEG,1\nval/b.JPEG,0\nval/c.JPEG,7\n",
    "image_sizes.txt": "val/a.JPEG,50,40\nval/b.JPEG,30,20\nval/c.JPEG,9,8\n",
    "localization.txt": "val/a.JPEG,1,2,49,39\nval/b.JPEG,0,0,30,20\nval/a.JPEG,5,5,5,5\n",
}
CSV = (
    "ImageId,PredictionString\n"
    "ILSVRC2012_val_00048981,n03995372 85 1 499 272 \n"
    "ILSVRC2012_val_00000002,n01440764 0 1 2 3 n01440764 4 5 6 7 \n"
)
OBJECT = (
    "<object><name>{wnid}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
    "<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
)
SIZE = "<size><width>{w}</width><height>{h}</height><depth>3</depth></size>"


def write_files(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def annotation(
    *boxes: tuple[int, int, int, int], wnid: str = "n01440764", size: tuple[int, int] | None
) -> str:
    objects = "".join(
        OBJECT.format(wnid=wnid, x0=x0, y0=y0, x1=x1, y1=y1) for x0, y0, x1, y1 in boxes
    )
    head = SIZE.format(h=size[0], w=size[1]) if size else ""
    return f"<annotation><filename>%s</filename>{head}{objects}</annotation>"


def boxes_of(truth: GroundTruth) -> dict[str, list[list[int]]]:
    return {
        name: truth.boxes[truth.starts[i] : truth.starts[i + 1]].tolist()
        for i, name in enumerate(truth.ids)
    }


def assert_equal(a: GroundTruth, b: GroundTruth) -> None:
    assert a.ids == b.ids
    for name in ("labels", "sizes", "boxes", "starts"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype == np.int64


def refusal(call: Callable[[], object]) -> str:
    """The one line that the call is refused with."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# wsolevaluation's metadata


def test_metadata_is_laid_out_by_image_in_the_order_of_image_ids(tmp_path: Path) -> None:
    truth = read_ground_truth(write_files(tmp_path / "meta", METADATA))
    assert truth.ids == ("val/b.JPEG", "val/a.JPEG", "val/c.JPEG")
    assert truth.labels.tolist() == [0, 1, 7]
    assert truth.sizes is not None
    assert truth.sizes.tolist() == [[20, 30], [40, 50], [8, 9]]  # height first
    assert boxes_of(truth) == {
        "val/b.JPEG": [[0, 0, 30, 20]],  # x1 == width passes
        "val/a.JPEG": [[1, 2, 49, 39], [5, 5, 5, 5]],
        "val/c.JPEG": [],
    }
    assert truth.classes is None


def test_packed_files_windows_lines_and_blank_lines_read_the_same(tmp_path: Path) -> None:
    plain = read_ground_truth(write_files(tmp_path / "plain", METADATA))
    packed = tmp_path / "packed"
    packed.mkdir()
    for name, text in METADATA.items():
        odd = "\ufeff" + text.replace("\n", " \r\n\r\n")
        (packed / f"{name}.gz").write_bytes(gzip.compress(odd.encode()))
    assert_equal(plain, read_ground_truth(packed))


def test_without_image_ids_the_order_is_that_of_the_labels(tmp_path: Path) -> None:
    files = {name: text for name, text in METADATA.items() if name != "image_ids.txt"}
    truth = read_ground_truth(write_files(tmp_path / "meta", files))
    assert truth.ids == ("val/a.JPEG", "val/b.JPEG", "val/c.JPEG")
    assert truth.labels.tolist() == [1, 0, 7]
    assert truth.starts.tolist() == [0, 2, 3, 3]


def test_without_sizes_they_are_unknown_unless_given(tmp_path: Path) -> None:
    files = {name: text for name, text in METADATA.items() if name != "image_sizes.txt"}
    folder = write_files(tmp_path / "meta", files)
    assert read_ground_truth(folder).sizes is None
    sizes = tmp_path / "sizes.txt"
    sizes.write_text("d,1,1\nc,9,8\nb,30,20\na,50,40\n")  # by stem, and one more
    truth = read_ground_truth(folder, image_sizes=sizes)
    assert truth.sizes is not None
    assert truth.sizes.tolist() == [[20, 30], [40, 50], [8, 9]]


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("class_labels.txt", "val/a.JPEG,1\nval/b.JPEG\n", ["line 2", "id,label"]),
        ("class_labels.txt", "val/a.JPEG,1\nval/b.JPEG,-1\n", ["line 2", "id,label"]),
        ("class_labels.txt", "val/a.JPEG,1\nval/b.JPEG,0\n", ["lacks 1 of 3", "val/c.JPEG"]),
        ("class_labels.txt", METADATA["class_labels.txt"] * 2, ["line 4", "val/a.JPEG", "again"]),
        ("class_labels.txt", METADATA["class_labels.txt"] + "x,1\n", ["line 4", "'x'"]),
        ("image_ids.txt", "val/a.JPEG\n\nval/a.JPEG\n", ["line 3", "again, after 1"]),
        ("image_sizes.txt", "val/a.JPEG,50,40\n", ["lacks the size of 'val/b.JPEG'"]),
        ("image_sizes.txt", "val/a.JPEG,50,0\n", ["line 1", "0"]),
        ("image_sizes.txt", "val/a.JPEG,5,5\nval/a.JPEG,5,5\n", ["line 2", "again"]),
        ("localization.txt", "val/a.JPEG,1,2,3\n", ["line 1", "id,x0,y0,x1,y1"]),
        ("localization.txt", "val/a.JPEG,1,2,3,4.5\n", ["line 1", "whole numbers"]),
        ("localization.txt", "val/a.JPEG,1,2,3,1_0\n", ["line 1", "whole numbers"]),
        ("localization.txt", "val/a.JPEG,1,2,3," + "9" * 5000, ["line 1", "whole numbers"]),
        ("localization.txt", "\nval/a.JPEG,1,2,51,4\n", ["line 2", "1 2 51 4", "50 x 40 pixels"]),
        ("localization.txt", "val/a.JPEG,1,2,3,41\n", ["line 1", "outside its image"]),
        ("localization.txt", "val/a.JPEG,50,2,50,4\n", ["line 1", "outside its image"]),
        ("localization.txt", "val/a.JPEG,-1,2,3,4\n", ["line 1", "outside its image"]),
        ("localization.txt", "val/a.JPEG,4,2,3,4\n", ["line 1", "minimum is above its maximum"]),
        ("localization.txt", "val/x.JPEG,1,2,3,4\n", ["line 1", "val/x.JPEG"]),
        ("localization.txt", "", ["localization.txt is empty"]),
    ],
)
def test_faulty_metadata_is_refused_by_file_and_line(
    tmp_path: Path, name: str, text: str, parts: list[str]
) -> None:
    folder = write_files(tmp_path / "meta", {**METADATA, name: text})
    message = refusal(lambda: read_ground_truth(folder))
    assert str(folder / name) in message
    assert all(part in message for part in parts), message
    assert len(message) < 400 + len(str(folder))  # a line, whatever the file holds


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "meta", METADATA)
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"n{i:08d}\n" for i in range(7)))
    message = refusal(lambda: read_ground_truth(folder, classes=classes))
    assert "class_labels.txt line 3 has label 7, and there are 7 classes" in message
    classes.write_text("".join(f"n{i:08d} name {i}\n" for i in reversed(range(8))))
    truth = read_ground_truth(folder, classes=classes)
    assert truth.classes is not None
    assert truth.class_names is not None
    assert (truth.classes[7], truth.class_names[7]) == ("n00000007", "name 7")


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "neither class_labels.txt nor XML"),
        ({"class_labels.txt": "a,1\n"}, "no localization.txt"),
    ],
)
def test_a_folder_without_ground_truth_is_refused(
    tmp_path: Path, files: dict[str, str], part: str
) -> None:
    folder = write_files(tmp_path / "folder", files)
    assert part in refusal(lambda: read_ground_truth(folder))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(lambda: read_ground_truth(tmp_path / "none.csv"))
    (tmp_path / "boxes.tgz").write_bytes(b"")
    message = refusal(lambda: read_ground_truth(tmp_path / "boxes.tgz"))
    assert "neither a folder nor a .csv file" in message


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "meta", METADATA)
    packed = gzip.compress(METADATA["class_labels.txt"].encode())
    (folder / "class_labels.txt").unlink()
    for data in (packed[:-9], packed[:20] + b"\xff" * 20, b"not gzip", b""):
        (folder / "class_labels.txt.gz").write_bytes(data)
        assert "class_labels.txt.gz" in refusal(lambda: read_ground_truth(folder))


def test_metadata_written_and_read_again_is_equal(tmp_path: Path) -> None:
    truth = read_ground_truth(write_files(tmp_path / "meta", METADATA))
    write_metadata(tmp_path / "again", truth)
    assert_equal(truth, read_ground_truth(tmp_path / "again"))
    written = {path.name: path.read_text() for path in (tmp_path / "again").iterdir()}
    assert written["image_sizes.txt"] == "val/b.JPEG,30,20\nval/a.JPEG,50,40\nval/c.JPEG,9,8\n"
    assert sorted(written) == sorted(METADATA)  # no temporary file is left


def test_what_metadata_cannot_tell_is_not_written(tmp_path: Path) -> None:
    truth = read_ground_truth(write_files(tmp_path / "meta", METADATA))
    for name in ("a,b", "a\nb", " a"):
        odd = replace(truth, ids=(name, "c", "d"))
        assert repr(name) in refusal(partial(write_metadata, tmp_path / "out", odd))
    assert "sizes of the images are unknown" in refusal(
        lambda: write_metadata(tmp_path / "out", replace(truth, sizes=None))
    )
    assert not (tmp_path / "out").exists()


# Kaggle's solution


def test_a_kaggle_solution_is_read_in_file_name_order(tmp_path: Path) -> None:
    path = tmp_path / "LOC_val_solution.csv"
    path.write_text(CSV)
    truth = read_ground_truth(path)
    assert truth.ids == ("ILSVRC2012_val_00000002", "ILSVRC2012_val_00048981")
    assert truth.classes == ("n01440764", "n03995372")
    assert truth.labels.tolist() == [0, 1]
    assert truth.boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [85, 1, 499, 272]]
    assert truth.starts.tolist() == [0, 2, 3]
    assert truth.sizes is None


def test_a_kaggle_solution_takes_classes_and_sizes_from_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "LOC_val_solution.csv"
    path.write_text(CSV.replace("\n", "\r\n"))
    (tmp_path / "map.txt").write_text("n03995372 p\nn01440764 tench, Tinca tinca\nn02000000 q\n")
    (tmp_path / "sizes.txt").write_text(
        "val/ILSVRC2012_val_00048981.JPEG,500,375\nval/ILSVRC2012_val_00000002.JPEG,10,20\n"
    )
    truth = read_ground_truth(
        path, image_sizes=tmp_path / "sizes.txt", classes=tmp_path / "map.txt"
    )
    assert truth.labels.tolist() == [0, 2]
    assert truth.class_names == ("tench, Tinca tinca", "q", "p")
    assert truth.sizes is not None
    assert truth.sizes.tolist() == [[20, 10], [375, 500]]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("a,n01440764 1 2 3", ["line 2", "not a row of one wnid"]),
        ("a", ["line 2", "groups of five"]),
        ("a,b,n01440764 1 2 3 4", ["line 2", "groups of five"]),
        ("a, ", ["line 2", "not a row of one wnid"]),
        ("a,n01440764 1 2 3 4 n01440765 1 2 3 4", ["line 2", "not a row of one wnid"]),
        ("a,n01440764 1 2 3 nan", ["line 2", "1 2 3 nan"]),
        ("a,n01440764 5 2 3 4", ["line 2", "minimum is above"]),
        ("a,n01440764 -5 2 3 4", ["line 2", "outside"]),
        ("a,n01440764 1 2 3 4\n\na,n01440764 1 2 3 4", ["line 4", "again, after 2"]),
        ('a,"n01440764 1 2 3 4', ["line 2", "quotes"]),
    ],
)
def test_a_faulty_solution_is_refused_by_line(tmp_path: Path, row: str, parts: list[str]) -> None:
    path = tmp_path / "solution.csv"
    path.write_text(f"ImageId,PredictionString\n{row}\n")
    message = refusal(lambda: read_ground_truth(path))
    assert all(part in message for part in [str(path), *parts]), message


def test_a_class_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "solution.csv").write_text(CSV)
    (tmp_path / "classes.txt").write_text("n01440764\n")
    message = refusal(
        lambda: read_ground_truth(tmp_path / "solution.csv", classes=tmp_path / "classes.txt")
    )
    assert "solution.csv line 2 names class 'n03995372'" in message


@pytest.mark.parametrize("text", ["ImageId,PredictionString\n", ",\n", '""\n'])
def test_a_csv_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "solution.csv").write_text(text)
    assert "no rows" in refusal(lambda: read_ground_truth(tmp_path / "solution.csv"))


# XML


def test_xml_files_are_keyed_on_their_own_names_at_any_depth(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path / "xml",
        {
            "train/n02/b.xml": annotation((0, 0, 5, 5), wnid="n02000000", size=(10, 20)),
            "val/a.xml": annotation((1, 2, 3, 4), (5, 5, 20, 10), size=(10, 20)),
            "val/._a.xml": "made by an archiver",
        },
    )
    truth = read_ground_truth(folder)
    assert truth.ids == ("a", "b")
    assert truth.classes == ("n01440764", "n02000000")
    assert truth.labels.tolist() == [0, 1]
    assert truth.sizes is not None
    assert truth.sizes.tolist() == [[10, 20], [10, 20]]
    assert boxes_of(truth) == {"a": [[1, 2, 3, 4], [5, 5, 20, 10]], "b": [[0, 0, 5, 5]]}


def test_the_size_tag_is_the_scale_of_the_boxes(tmp_path: Path) -> None:
    files = {
        "a.xml": annotation((2, 4, 9, 9), size=(10, 20)),
        "b.xml": annotation((2, 4, 9, 9), size=None),
    }
    folder = write_files(tmp_path / "xml", files)
    assert f"{folder / 'b.xml'} tells no size" in refusal(lambda: read_ground_truth(folder))
    sizes = tmp_path / "sizes.txt"
    sizes.write_text("a,40,30\nb,40,30\n")  # twice as wide, three times as high
    truth = read_ground_truth(folder, image_sizes=sizes)
    assert truth.sizes is not None
    assert truth.sizes.tolist() == [[30, 40], [30, 40]]
    # Pixels 2..9 of 20 are the edges 2 and 10, so 4 and 20 of 40: pixels 4..19.
    assert boxes_of(truth) == {"a": [[4, 12, 19, 29]], "b": [[2, 4, 9, 9]]}


ENTITIES = (
    '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;">{}]>'
    "<annotation><object><name>&y;</name></object></annotation>"
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<annotation><object>", ["does not parse", "remove it"]),
        ("", ["does not parse"]),
        (ENTITIES.format(""), ["does not parse", "document type"]),
        (ENTITIES.format('<!ENTITY z SYSTEM "file:///etc/passwd">'), ["document type"]),
        (annotation(size=(10, 20)), ["names no class"]),
        (annotation((1, 1, 2, 2), wnid=" ", size=(10, 20)), ["names no class"]),
        (
            annotation((1, 1, 2, 2), size=(10, 20)).replace(
                "</annotation>", OBJECT.format(wnid="n2", x0=0, y0=0, x1=1, y1=1) + "</annotation>"
            ),
            ["or several"],
        ),
        (annotation((1, 1, 2, 2), (3, 1, 2, 2), size=(10, 20)), ["box 2", "minimum is above"]),
        (annotation((1, 1, 21, 2), size=(10, 20)), ["box 1", "20 x 10 pixels"]),
        (annotation((1, 1, 2, 2), size=(10, 20)).replace(">1<", ">one<"), ["whole numbers"]),
    ],
)
def test_a_faulty_xml_file_is_refused_by_name(tmp_path: Path, text: str, parts: list[str]) -> None:
    folder = write_files(
        tmp_path / "xml", {"a.xml": annotation((1, 1, 2, 2), size=(10, 20)), "b.xml": text}
    )
    message = refusal(lambda: read_ground_truth(folder))
    assert all(part in message for part in [str(folder / "b.xml"), *parts]), message


def test_links_to_folders_are_followed_and_no_image_counts_twice(tmp_path: Path) -> None:
    text = annotation((1, 1, 2, 2), size=(10, 20))
    write_files(tmp_path / "elsewhere", {"b.xml": text})
    folder = write_files(tmp_path / "xml", {"val/a.xml": text})
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    (folder / "val" / "back").symlink_to(folder)
    assert read_ground_truth(folder).ids == ("a", "b")


def test_two_xml_files_of_one_name_are_refused(tmp_path: Path) -> None:
    text = annotation((1, 1, 2, 2), size=(10, 20))
    folder = write_files(tmp_path / "xml", {"train/a.xml": text, "val/a.xml": text})
    message = refusal(lambda: read_ground_truth(folder))
    assert str(folder / "train" / "a.xml") in message
    assert str(folder / "val" / "a.xml") in message


def test_a_class_of_xml_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    text = annotation((1, 1, 2, 2), wnid="n09999999", size=(10, 20))
    folder = write_files(tmp_path / "xml", {"a.xml": text})
    (tmp_path / "classes.txt").write_text("n01440764\n")
    message = refusal(lambda: read_ground_truth(folder, classes=tmp_path / "classes.txt"))
    assert "a.xml names class 'n09999999'" in message


# Shards


def test_the_ledger_gives_the_same_ground_truth_as_the_xml_files(small_set: Path) -> None:
    manifest = read_manifest(small_set)
    ledger = read_ledger(small_set, "val")
    truth = ground_truth_of(ledger, manifest.classes, manifest.class_names)
    images = small_set.parent / "images"
    read = read_ground_truth(images, classes=images / "LOC_synset_mapping.txt")
    rows = [read.ids.index(name) for name in truth.ids]
    assert len(rows) == 24
    assert read.classes == truth.classes
    assert read.sizes is not None
    np.testing.assert_array_equal(truth.labels, read.labels[rows])
    np.testing.assert_array_equal(truth.sizes, read.sizes[rows])
    by_id = boxes_of(read)
    assert boxes_of(truth) == {name: by_id[name] for name in truth.ids}
    assert len(truth.boxes) >= 24
    assert truth.sizes is not None
    assert truth.sizes.dtype == truth.labels.dtype == np.int64
    assert truth.boxes.dtype == truth.starts.dtype == np.int64


def test_images_of_one_id_go_by_their_keys(small_set: Path) -> None:
    ledger = read_ledger(small_set, "val")
    same = ledger.set_column(
        ledger.column_names.index("id"), "id", pa.array(["x"] * ledger.num_rows)
    )
    assert ground_truth_of(same, (), ()).ids == tuple(ledger["key"].to_pylist())


# Class lists


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n02 x\n", None),
        ("n00000002\nn00000001\n", ("n00000001", "n00000002")),
        ("n00000002 b, c\nn00000001 a\n", ("a", "b, c")),
        ("n00000002\tb\nn00000001\ta d\n", ("a d", "b")),
        ("n00000002 b\nn00000002 c\n", None),
        ("cat\n", None),
    ],
)
def test_class_lists_of_every_kind_are_sorted_by_wnid(
    tmp_path: Path, text: str, names: tuple[str, ...] | None
) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text)
    if names is None:
        assert f"{path} line" in refusal(lambda: read_classes(path))
    else:
        assert read_classes(path) == (("n00000001", "n00000002"), names)


# Whatever comes

LINES = st.lists(
    st.text(st.sampled_from("ab,019-. \t\"'\r\x00n{}é"), max_size=30), min_size=1, max_size=5
).map("\n".join)
CONTENT = st.one_of(st.binary(max_size=200), LINES.map(str.encode))


@given(data=CONTENT, name=st.sampled_from(sorted(METADATA)))
def test_any_bytes_as_metadata_are_read_or_refused(tmp_path: Path, data: bytes, name: str) -> None:
    folder = write_files(tmp_path / "fuzz", METADATA)
    (folder / name).write_bytes(data)
    with contextlib.suppress(UserError):
        read_ground_truth(folder)


@given(data=CONTENT)
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    csv, xml = tmp_path / "any.csv", write_files(tmp_path / "fuzz", {}) / "any.xml"
    calls: list[Callable[[Path], object]] = [
        read_ground_truth,
        read_classes,
    ]
    csv.write_bytes(data)
    xml.write_bytes(data)
    for call, path in [*((call, csv) for call in calls), (read_ground_truth, xml.parent)]:
        with contextlib.suppress(UserError):
            call(path)


# The real ILSVRC val set


@pytest.fixture(scope="module")
def ilsvrc() -> GroundTruth:
    if not ILSVRC.is_dir():
        pytest.skip("ilsvrc-val-boxes is not beside the checkout, in ../shared/data")
    return read_ground_truth(ILSVRC)


def test_the_ilsvrc_val_set_is_whole(ilsvrc: GroundTruth) -> None:
    assert len(ilsvrc.ids) == 50_000
    assert ilsvrc.boxes.shape == (80_477, 4)
    assert (np.diff(ilsvrc.starts) > 1).sum() == 11_715
    assert np.diff(ilsvrc.starts).min() == 1
    assert (np.bincount(ilsvrc.labels) == 50).all()
    assert ilsvrc.labels[0] == 65  # by sorted wnids; 490 would be the devkit's number
    row = ilsvrc.ids.index("val/ILSVRC2012_val_00048981.JPEG")
    assert boxes_of(ilsvrc)[ilsvrc.ids[row]] == [[85, 1, 499, 272]]


def test_ilsvrc_corners_are_counted_from_zero(ilsvrc: GroundTruth) -> None:
    assert ilsvrc.sizes is not None
    limits = ilsvrc.sizes[np.repeat(np.arange(50_000), np.diff(ilsvrc.starts))][:, ::-1]
    assert (ilsvrc.boxes[:, :2] == 0).any(axis=1).sum() > 5_000
    assert (ilsvrc.boxes[:, 2:] < limits).all()  # never x1 == width, often width - 1
    assert (ilsvrc.boxes[:, 2:] == limits - 1).any(axis=1).sum() > 5_000


@pytest.mark.parametrize(
    ("protocol", "percent"), [("devkit", 40.70), ("exclusive", 40.34), ("int224", 41.11)]
)
def test_the_whole_image_on_ilsvrc_scores_as_published(
    ilsvrc: GroundTruth, protocol: str, percent: float
) -> None:
    assert ilsvrc.sizes is not None
    owners = np.repeat(np.arange(50_000), np.diff(ilsvrc.starts))
    sizes, boxes = ilsvrc.sizes[owners][:, ::-1], ilsvrc.boxes
    if protocol == "int224":
        boxes = boxes * 224 // np.tile(sizes, 2)
        sizes = np.full_like(sizes, 224)
    one = 0 if protocol == "exclusive" else 1
    area = (boxes[:, 2:] - boxes[:, :2] + one).prod(axis=1)
    # The whole image is width x height pixels under each: [0, 0, width - 1, height - 1] where
    # maxima are inclusive, [0, 0, width, height] where they are not.
    right = np.zeros(50_000, bool)
    np.logical_or.at(right, owners, 2 * area >= sizes.prod(axis=1))
    assert round(100 * right.mean(), 2) == percent


def test_the_ilsvrc_val_set_survives_writing(ilsvrc: GroundTruth, tmp_path: Path) -> None:
    write_metadata(tmp_path / "meta", ilsvrc)
    assert_equal(ilsvrc, read_ground_truth(tmp_path / "meta"))
    for original in ILSVRC.glob("*.txt.gz"):
        written = (tmp_path / "meta" / original.stem).read_text()
        assert written.strip() == gzip.decompress(original.read_bytes()).decode().strip()
