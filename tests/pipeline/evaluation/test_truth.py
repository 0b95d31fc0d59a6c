"""Ground truth from each kind of file, each fault of each, and the real ILSVRC val set."""

import contextlib
import gzip
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.evaluation.truth import GroundTruth, ground_truth_of, read_classes, read_ground_truth
from pipeline.shards.format import read_manifest
from pipeline.shards.ledger import read_ledger
from tests.pipeline.evaluation.files import assert_refused, content, write, write_all
from tests.pipeline.sources.miniature import xml

ILSVRC = Path(__file__).parents[4] / "shared" / "data" / "ilsvrc-val-boxes"

LABELS = "val/a.JPEG,1\nval/b.JPEG,0\nval/c.JPEG,7\n"
METADATA = {
    "image_ids.txt": "val/b.JPEG\nval/a.JPEG\nval/c.JPEG\n",
    "class_labels.txt": LABELS,
    "image_sizes.txt": "val/a.JPEG,50,40\nval/b.JPEG,30,20\nval/c.JPEG,9,8\n",
    "localization.txt": "val/a.JPEG,1,2,49,39\nval/b.JPEG,0,0,30,20\nval/a.JPEG,5,5,5,5\n",
}
SOLUTION = (
    "ImageId,PredictionString\n"
    "ILSVRC2012_val_00048981,n03995372 85 1 499 272 \n"
    "ILSVRC2012_val_00000002,n01440764 0 1 2 3 n01440764 4 5 6 7 \n"
)
WNID, SIZE = "n01440764", (20, 10)  # width and height
A_BOX = xml(WNID, (1, 1, 2, 2), size=SIZE)


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    return write_all(tmp_path / "meta", METADATA)


def without(name: str) -> dict[str, str]:
    return {other: text for other, text in METADATA.items() if other != name}


def boxes_of(truth: GroundTruth) -> dict[str, list[list[int]]]:
    return {
        name: truth.boxes[truth.starts[i] : truth.starts[i + 1]].tolist()
        for i, name in enumerate(truth.ids)
    }


def sizes_of(truth: GroundTruth) -> list[list[int]]:
    assert truth.sizes is not None
    return truth.sizes.tolist()


def assert_equal(a: GroundTruth, b: GroundTruth) -> None:
    assert a.ids == b.ids
    for name in ("labels", "sizes", "boxes", "starts"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype == np.int64


# wsolevaluation's metadata


def test_metadata_is_laid_out_by_image_in_the_order_of_image_ids(meta: Path) -> None:
    truth = read_ground_truth(meta)
    assert truth.ids == ("val/b.JPEG", "val/a.JPEG", "val/c.JPEG")
    assert truth.labels.tolist() == [0, 1, 7]
    assert sizes_of(truth) == [[20, 30], [40, 50], [8, 9]]  # height first
    assert boxes_of(truth) == {
        "val/b.JPEG": [[0, 0, 30, 20]],  # x1 == width passes
        "val/a.JPEG": [[1, 2, 49, 39], [5, 5, 5, 5]],
        "val/c.JPEG": [],
    }
    assert truth.classes is None


def test_packed_files_windows_lines_and_blank_lines_read_the_same(
    meta: Path, tmp_path: Path
) -> None:
    for name, text in METADATA.items():
        odd = "\ufeff" + text.replace("\n", " \r\n\r\n")
        write(tmp_path / "packed" / f"{name}.gz", gzip.compress(odd.encode()))
    assert_equal(read_ground_truth(meta), read_ground_truth(tmp_path / "packed"))


def test_without_image_ids_the_order_is_that_of_the_labels(tmp_path: Path) -> None:
    truth = read_ground_truth(write_all(tmp_path / "meta", without("image_ids.txt")))
    assert truth.ids == ("val/a.JPEG", "val/b.JPEG", "val/c.JPEG")
    assert truth.labels.tolist() == [1, 0, 7]
    assert truth.starts.tolist() == [0, 2, 3, 3]


def test_without_sizes_they_are_unknown_unless_given(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "meta", without("image_sizes.txt"))
    assert read_ground_truth(folder).sizes is None
    sizes = write(tmp_path / "sizes.txt", "d,1,1\nc,9,8\nb,30,20\na,50,40\n")  # stems, one more
    assert sizes_of(read_ground_truth(folder, image_sizes=sizes)) == [[20, 30], [40, 50], [8, 9]]


@pytest.mark.parametrize(
    ("name", "text", "fact"),
    [
        ("class_labels.txt", "val/a.JPEG,1\nval/b.JPEG\n", " line 2 .*`id,label`"),
        ("class_labels.txt", "val/a.JPEG,1\nval/b.JPEG,-1\n", " line 2 .*`id,label`"),
        ("class_labels.txt", "val/a.JPEG,1\nval/b.JPEG,0\n", " lacks 1 of 3 .*val/c.JPEG"),
        ("class_labels.txt", LABELS * 2, " line 4 .*'val/a.JPEG' again, after .* line 1;"),
        ("class_labels.txt", LABELS + "x,1\n", " line 4 .*'x'"),
        ("image_ids.txt", "val/a.JPEG\n\nval/a.JPEG\n", " line 3 .*again, after .* line 1;"),
        ("image_sizes.txt", "val/a.JPEG,50,40\n", " lacks the size of 'val/b.JPEG'"),
        ("image_sizes.txt", "val/a.JPEG,50,0\n", " line 1 .*height of 0"),
        ("image_sizes.txt", "val/a.JPEG,5,5\nval/a.JPEG,5,5\n", " line 2 .*again"),
        ("localization.txt", "val/a.JPEG,1,2,3\n", " line 1 .*`id,x0,y0,x1,y1`"),
        ("localization.txt", "val/a.JPEG,1,2,3,4.5\n", " line 1 .*whole numbers"),
        ("localization.txt", "val/a.JPEG,1,2,3,1_0\n", " line 1 .*whole numbers"),
        ("localization.txt", "val/a.JPEG,1,2,3," + "9" * 5000, " line 1 .*whole numbers"),
        ("localization.txt", "\nval/a.JPEG,1,2,51,4\n", " line 2 .*1 2 51 4: .*50 x 40 pixels"),
        ("localization.txt", "val/a.JPEG,1,2,3,41\n", " line 1 .*outside its image"),
        ("localization.txt", "val/a.JPEG,50,2,50,4\n", " line 1 .*outside its image"),
        ("localization.txt", "val/a.JPEG,-1,2,3,4\n", " line 1 .*outside its image"),
        ("localization.txt", "val/a.JPEG,4,2,3,4\n", " line 1 .*minimum is above its maximum"),
        ("localization.txt", "val/x.JPEG,1,2,3,4\n", " line 1 .*'val/x.JPEG'"),
        ("localization.txt", " \n", " is empty"),
        ("localization.txt", "val/a.JPEG,0,0,1,1\nval/b.JPEG,1,0,1,1\n", " .*from 0 to 1 only"),
        ("localization.txt", "val/a.JPEG,9,5,3,4\n", " line 1 .*fit as x y width height"),
        ("localization.txt", "val/a.JPEG,0,0,40,50\n", " line 1 .*fit as y0 x0 y1 x1"),
        ("localization.txt", "train/a.JPEG,1,2,3,4\n", " line 1 names image 'train/a.JPEG'"),
    ],
)
def test_faulty_metadata_is_refused_by_file_and_line(
    meta: Path, name: str, text: str, fact: str
) -> None:
    assert_refused(write(meta / name, text), fact, read_ground_truth, meta)


def test_a_label_beyond_the_classes_is_refused(meta: Path, tmp_path: Path) -> None:
    classes = write(tmp_path / "classes.txt", "".join(f"n{i:08d}\n" for i in range(7)))
    read = partial(read_ground_truth, meta, classes=classes)
    assert_refused(meta / "class_labels.txt", " line 3 has label 7, .* 7 classes", read)
    lines = [f"n{i:08d} name {i}\n" for i in range(8)]
    write(classes, "".join(lines))
    truth = read()
    assert truth.classes is not None
    assert truth.class_names is not None
    assert (truth.classes[7], truth.class_names[7]) == ("n00000007", "name 7")
    write(classes, "".join(reversed(lines)))  # are numbers of its lines, or of the sorted wnids?
    assert_refused(meta / "class_labels.txt", f" line 1 .* {classes} line 2 is out of order", read)


def test_what_is_no_ground_truth_is_refused(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "folder", {})
    read = partial(read_ground_truth, folder)
    assert_refused(folder, " has neither class_labels.txt nor XML", read)
    write(folder / "class_labels.txt", "a,1\n")
    assert_refused(folder, " .*no localization.txt", read)
    write(folder / "class_labels.txt.gz", gzip.compress(b"a,2\n"))
    assert_refused(folder, r" holds class_labels\.txt and class_labels\.txt\.gz", read)
    path = tmp_path / "boxes.tgz"
    assert_refused(path, " does not exist", read_ground_truth, path)
    write(path, "")
    assert_refused(path, " is neither a folder nor a .csv file", read_ground_truth, path)


def test_damaged_gzip_is_refused(meta: Path) -> None:
    packed = gzip.compress(LABELS.encode())
    (meta / "class_labels.txt").unlink()
    for data in (packed[:-9], packed[:20] + b"\xff" * 20, b"not gzip", b""):
        path = write(meta / "class_labels.txt.gz", data)
        assert_refused(path, " (cannot be read|is empty)", read_ground_truth, meta)


@pytest.mark.parametrize(("label", "fits"), [(65, True), (489, False), (490, False)])
def test_the_development_kits_numbers_of_classes_are_refused(
    tmp_path: Path, label: int, fits: bool
) -> None:
    name = "val/ILSVRC2012_val_00000001.JPEG"
    texts = {"class_labels.txt": f"{name},{label}\n", "localization.txt": f"{name},1,2,3,4\n"}
    read = partial(read_ground_truth, write_all(tmp_path / "meta", texts))
    if fits:
        assert read().labels.tolist() == [65]
    else:
        fact = f" line 1 has label {label}, .*ILSVRC2012_ID.* 65"
        assert_refused(tmp_path / "meta" / "class_labels.txt", fact, read)


# Kaggle's solution


def test_a_kaggle_solution_is_read_in_file_name_order(tmp_path: Path) -> None:
    truth = read_ground_truth(write(tmp_path / "LOC_val_solution.csv", SOLUTION))
    assert truth.ids == ("ILSVRC2012_val_00000002", "ILSVRC2012_val_00048981")
    assert truth.classes == (WNID, "n03995372")
    assert truth.labels.tolist() == [0, 1]
    assert truth.boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [85, 1, 499, 272]]
    assert truth.starts.tolist() == [0, 2, 3]
    assert truth.sizes is None


def test_a_kaggle_solution_takes_classes_and_sizes_from_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "LOC_val_solution.csv", SOLUTION.replace("\n", "\r\n"))
    classes = "n03995372 p\nn01440764 tench, Tinca tinca\nn02000000 q\n"
    sizes = "val/ILSVRC2012_val_00048981.JPEG,500,375\nval/ILSVRC2012_val_00000002.JPEG,10,20\n"
    truth = read_ground_truth(
        path,
        image_sizes=write(tmp_path / "sizes.txt", sizes),
        classes=write(tmp_path / "map.txt", classes),
    )
    assert truth.labels.tolist() == [0, 2]
    assert truth.class_names == ("tench, Tinca tinca", "q", "p")
    assert sizes_of(truth) == [[20, 10], [375, 500]]


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ("a,n01440764 1 2 3", " line 2: .*'n01440764 1 2 3'"),
        ("a", " line 2 .*groups of five"),
        ("a,b,n01440764 1 2 3 4", " line 2 .*groups of five"),
        ("a, ", " line 2: .*''"),
        ("a,n01440764 1 2 3 4 n01440765 1 2 3 4", " line 2: .*one wnid"),
        ("a,n01440764 1 2 3 nan", r" line 2: .*\(1 2 3 nan\)"),
        ("a,n01440764 5 2 3 4", " line 2 box 1 .*minimum is above"),
        ("a,n01440764 1 2 3 4 n01440764 -5 2 3 4", " line 2 box 2 .*outside"),
        ("a,n01440764 1 2 3 4\n\na,n01440764 1 2 3 4", " line 4 .*again, after .* line 2;"),
        ('a,"n01440764 1 2 3 4', " line 2 .*quotes"),
        ("a,n09999999 1 2 3 4", " line 2 .*'n09999999'"),
        ("", " has no rows"),
        (",", " has no rows"),
        ('""', " has no rows"),
    ],
)
def test_a_faulty_solution_is_refused_by_line(tmp_path: Path, row: str, fact: str) -> None:
    path = write(tmp_path / "solution.csv", f"ImageId,PredictionString\n{row}\n")
    classes = write(tmp_path / "classes.txt", "n01440764\n")
    assert_refused(path, fact, read_ground_truth, path, classes=classes)


# XML


def test_xml_files_are_keyed_on_their_own_names_at_any_depth(tmp_path: Path) -> None:
    files = {
        "train/n02/b.xml": xml("n02000000", (0, 0, 5, 5), size=SIZE),
        "val/a.XML": xml(WNID, (1, 2, 3, 4), (5, 5, 20, 10), size=SIZE),
        "val/._a.xml": "made by an archiver",
    }
    truth = read_ground_truth(write_all(tmp_path / "xml", files))
    assert truth.ids == ("a", "b")
    assert truth.classes == (WNID, "n02000000")
    assert truth.labels.tolist() == [0, 1]
    assert sizes_of(truth) == [[10, 20], [10, 20]]
    assert boxes_of(truth) == {"a": [[1, 2, 3, 4], [5, 5, 20, 10]], "b": [[0, 0, 5, 5]]}


def test_the_size_tag_is_the_scale_of_the_boxes(tmp_path: Path) -> None:
    files = {
        "a.xml": xml(WNID, (2, 4, 9, 9), size=SIZE),
        "b.xml": xml(WNID, (2, 4, 9, 9), size=None),
    }
    folder = write_all(tmp_path / "xml", files)
    assert_refused(folder / "b.xml", ": it has no size", read_ground_truth, folder)
    sizes = write(tmp_path / "sizes.txt", "a,40,30\nb,40,30\n")  # twice as wide, thrice as high
    truth = read_ground_truth(folder, image_sizes=sizes)
    assert sizes_of(truth) == [[30, 40], [30, 40]]
    # Pixels 2..9 of 20 are the edges 2 and 10, so 4 and 20 of 40: pixels 4..19.
    assert boxes_of(truth) == {"a": [[4, 12, 19, 29]], "b": [[2, 4, 9, 9]]}


def test_sizes_that_are_height_and_width_are_refused(tmp_path: Path) -> None:
    files = {name: xml(WNID, (2, 4, 9, 9), size=SIZE) for name in ("a.xml", "b.xml")}
    folder = write_all(tmp_path / "xml", files)
    sizes = write(tmp_path / "sizes.txt", "a,10,20\nb,10,20\n")
    assert_refused(sizes, " .*width.*height", read_ground_truth, folder, image_sizes=sizes)


def test_xml_boxes_that_are_shares_are_refused(tmp_path: Path) -> None:
    shares = xml(WNID, (11, 22, 33, 44), size=SIZE)
    for number in (11, 22, 33, 44):
        shares = shares.replace(f">{number}<", f">0.{number}<")
    folder = write_all(tmp_path / "xml", {"a.xml": shares})
    assert_refused(folder / "a.xml", ": .*shares", read_ground_truth, folder)


ENTITIES = (
    '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;">{}]>'
    "<annotation><object><name>&y;</name></object></annotation>"
)
OTHER_OBJECT = "<object><name>n2</name></object></annotation>"


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("<annotation><object>", ": .*does not parse"),
        ("", ": .*does not parse"),
        (ENTITIES.format(""), ": .*document type"),
        (ENTITIES.format('<!ENTITY z SYSTEM "file:///etc/passwd">'), ": .*document type"),
        (xml(WNID, size=SIZE), ": .*no class"),
        (xml(" ", (1, 1, 2, 2), size=SIZE), ": .*no class"),
        (A_BOX.replace("</annotation>", OTHER_OBJECT), ": .*or several"),
        (xml(WNID, (1, 1, 2, 2), (3, 1, 2, 2), size=SIZE), " box 2 .*minimum is above"),
        (xml(WNID, (1, 1, 21, 2), size=SIZE), " box 1 .*20 x 10 pixels"),
        (A_BOX.replace(">1<", ">one<"), ": .*whole numbers"),
        (xml("n09999999", (1, 1, 2, 2), size=SIZE), " names class 'n09999999'"),
    ],
)
def test_a_faulty_xml_file_is_refused_by_name(tmp_path: Path, text: str, fact: str) -> None:
    folder = write_all(tmp_path / "xml", {"a.xml": A_BOX, "b.xml": text})
    classes = write(tmp_path / "classes.txt", f"{WNID}\n")
    assert_refused(folder / "b.xml", fact, read_ground_truth, folder, classes=classes)


def test_links_to_folders_are_followed_and_no_image_counts_twice(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.xml", A_BOX)
    folder = write_all(tmp_path / "xml", {"val/a.xml": A_BOX})
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    (folder / "val" / "back").symlink_to(folder)
    assert read_ground_truth(folder).ids == ("a", "b")


def test_two_xml_files_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "xml", {"train/a.xml": A_BOX, "val/a.xml": A_BOX})
    fact = f" and {folder / 'val' / 'a.xml'} "
    assert_refused(folder / "train" / "a.xml", fact, read_ground_truth, folder)


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
        ("n00000002\nn00000001\n", ("n00000001", "n00000002")),
        ("n00000002 b, c\n\nn00000001 a\n", ("a", "b, c")),
        ("n00000002\tb\nn00000001\ta d\n", ("a d", "b")),
    ],
)
def test_class_lists_of_every_kind_are_sorted_by_wnid(
    tmp_path: Path, text: str, names: tuple[str, ...]
) -> None:
    path = write(tmp_path / "classes.txt", text)
    classes = read_classes(path)
    assert classes[:2] == (("n00000001", "n00000002"), names)
    numbers = [i for i, line in enumerate(text.split("\n"), 1) if line]
    assert classes.unsorted == f"{path} line {numbers[1]}"


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("n00000001\nn02 x\n", " line 2 .*'n02'"),
        ("cat\n", " line 1 .*'cat'"),
        ("n00000002 b\n\nn00000002 c\n", " line 3 names n00000002 a second time"),
        ("\n", " is empty"),
    ],
)
def test_a_faulty_class_list_is_refused_by_line(tmp_path: Path, text: str, fact: str) -> None:
    path = write(tmp_path / "classes.txt", text)
    assert_refused(path, fact, read_classes, path)


# Whatever comes

CONTENT = content(["a", "b", "0", "1", "9", "n00000001", "<annotation>", "val/a.JPEG"])


@given(data=CONTENT, name=st.sampled_from(sorted(METADATA)))
def test_any_bytes_as_metadata_are_read_or_refused(tmp_path: Path, data: bytes, name: str) -> None:
    folder = write_all(tmp_path / "fuzz", METADATA)
    write(folder / name, data)
    with contextlib.suppress(UserError):
        read_ground_truth(folder)


@given(data=CONTENT)
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    csv = write(tmp_path / "any.csv", data)
    folder = write(tmp_path / "fuzz" / "any.xml", data).parent
    for read, path in ((read_ground_truth, csv), (read_classes, csv), (read_ground_truth, folder)):
        with contextlib.suppress(UserError):
            read(path)


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
