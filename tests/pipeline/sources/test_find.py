import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.sources.files import SourceFiles
from pipeline.sources.find import Source
from pipeline.sources.listing import SCHEMA
from tests.pipeline.sources.miniature import read_source, tar, write, xml


def touch(root: Path, *paths: str) -> None:
    write(root, dict.fromkeys(paths, b""))


def ilsvrc(root: Path) -> Path:
    ids = ["1/n00000001_9", "1/n00000001_10", "2/n00000002_7"]
    touch(root, *(f"train/n0000000{x}.JPEG" for x in ids))
    touch(root, *(f"val/ILSVRC2012_val_0000000{x}.JPEG" for x in (2, 1)))
    val, train = xml("n00000002", (1, 2, 3, 4), (5, 6, 7, 8)), xml("n00000001", (10, 20, 30, 40))
    boxes = {"ILSVRC2012_val_00000001": val, "n00000001_9": train}
    return write(root, {f"boxes/deep/{x}.xml": text.encode() for x, text in boxes.items()})


def rows(source: Source, split: str) -> list[dict[str, Any]]:
    assert source.images[split].schema == SCHEMA
    return source.images[split].to_pylist()


def test_ilsvrc_takes_val_labels_and_boxes_from_xml_wherever_it_lies(tmp_path: Path) -> None:
    source = read_source(ilsvrc(tmp_path))
    assert source.layout == "ilsvrc"
    assert source.classes == ("n00000001", "n00000002")
    assert [(x["id"], x["label"], x["boxes"]) for x in rows(source, "train")] == [
        ("n00000001_10", 0, []),
        ("n00000001_9", 0, [[10, 20, 30, 40]]),
        ("n00000002_7", 1, []),
    ]
    first, second = rows(source, "val")
    assert (first["wnid"], first["label"], first["problem"]) == ("n00000002", 1, None)
    assert first["boxes"] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (first["box_width"], first["box_height"]) == (500, 375)
    assert (second["wnid"], second["label"]) == (None, None)
    assert second["problem"].startswith("label unknown:")


def test_ilsvrc_val_in_class_folders_is_labelled_by_them(tmp_path: Path) -> None:
    touch(tmp_path, "train/n00000001/n00000001_1.JPEG", "val/n00000001/v1.JPEG", "val/n9/v0.JPEG")
    source = read_source(tmp_path)
    assert [(x["id"], x["wnid"], x["label"], x["problem"]) for x in rows(source, "val")] == [
        ("v0", "n9", None, "label unknown: no train image has class n9"),
        ("v1", "n00000001", 0, None),
    ]


def test_class_names_are_read_from_either_file_and_default_to_the_wnid(tmp_path: Path) -> None:
    ilsvrc(tmp_path)
    assert read_source(tmp_path).class_names == ("n00000001", "n00000002")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n00000001 tench, Tinca tinca\n")
    assert read_source(tmp_path).class_names == ("tench, Tinca tinca", "n00000002")
    (tmp_path / "words.txt").write_text("n00000002\ta dog\n")
    assert read_source(tmp_path).class_names == ("tench, Tinca tinca", "a dog")


def test_tiny_imagenet_lists_boxes_and_every_odd_image(tmp_path: Path) -> None:
    touch(tmp_path, "wnids.txt", "val/images/val_0.JPEG", "val/images/val_2.JPEG")
    touch(tmp_path, *(f"train/n1/images/n1_{i}.JPEG" for i in range(3)))
    (tmp_path / "train/n1/n1_boxes.txt").write_text(
        "n1_0.JPEG\t0\t10\t63\t58\nn1_2.JPEG\t1\tx\t3\t4\n"
    )
    (tmp_path / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn1\t0\t32\t44\t62\nval_1.JPEG\tn1\t0\t0\t1\t1\n"
    )
    source = read_source(tmp_path)
    assert source.layout == "tiny-imagenet"
    boxed, plain, broken = rows(source, "train")
    assert (boxed["boxes"], boxed["path"]) == ([[0, 10, 63, 58]], "train/n1/images/n1_0.JPEG")
    assert (plain["boxes"], plain["note"], plain["problem"]) == ([], None, None)
    assert (broken["boxes"], broken["problem"]) == ([], None)
    assert broken["note"] == "box 0 dropped: not four whole numbers (1 x 3 4)"
    assert [(x["id"], (x["problem"] or "fine").split(":")[0]) for x in rows(source, "val")] == [
        ("val_0", "fine"),
        ("val_1", "file missing"),
        ("val_2", "label unknown"),
    ]
    (tmp_path / "val/val_annotations.txt").write_text("val_0.JPEG\tn1\nval_0.JPEG\tn2\n")
    with pytest.raises(UserError, match=r"val_annotations\.txt has two lines of val_0\.JPEG"):
        read_source(tmp_path)


@pytest.mark.parametrize("root", ["", "CUB_200_2011/"])
def test_cub_lists_boxes_classes_and_every_odd_image(root: str, tmp_path: Path) -> None:
    lists = {
        "images.txt": "1 001.Crow/A_1.jpg\n2 001.Crow/A_2.jpg\n3 002.Jay/B.jpg\n4 002.Jay/C.jpg\n",
        "image_class_labels.txt": "1 1\n2 1\n3 2\n4 9\n",
        "classes.txt": "1 001.Crow\n2 002.Jay_Blue\n",
        "train_test_split.txt": "1 1\n2 0\n3 1\n4 1\n",
        "bounding_boxes.txt": "1 60.0 27.0 325.0 304.0\n2 0.5 1.2 10.0 9.0\n3 1 x 3 4\n",
    }
    write(tmp_path, {root + name: text.encode() for name, text in lists.items()})
    present = ("001.Crow/A_1.jpg", "001.Crow/A_2.jpg", "002.Jay/C.jpg", "002.Jay/D.jpg")
    touch(tmp_path, *(f"{root}images/{name}" for name in present))
    source = read_source(tmp_path)
    assert source.layout == "cub"
    assert source.classes == ("001.Crow", "002.Jay_Blue")
    assert source.class_names == ("Crow", "Jay Blue")
    (val,) = rows(source, "val")
    # From x, y, width, height: pixels 0.5 to 10.5 and 1.2 to 10.2 are touched.
    assert (val["id"], val["label"], val["boxes"]) == ("001.Crow/A_2.jpg", 0, [[0, 1, 10, 10]])
    train = {row["id"]: row for row in rows(source, "train")}
    assert train["001.Crow/A_1.jpg"]["boxes"] == [[60, 27, 384, 330]]
    assert train["001.Crow/A_1.jpg"]["path"] == f"{root}images/001.Crow/A_1.jpg"
    assert train["002.Jay/B.jpg"]["note"] == "box dropped: not four numbers (1 x 3 4)"
    assert {name: (row["problem"] or "fine").split(":")[0] for name, row in train.items()} == {
        "001.Crow/A_1.jpg": "fine",
        "002.Jay/B.jpg": "file missing",
        "002.Jay/C.jpg": "label unknown",
        "002.Jay/D.jpg": "label unknown",
    }


def test_class_folders_become_a_train_split(tmp_path: Path) -> None:
    touch(tmp_path, "dog/1.png", "cat/1.jpg", "cat/0.WEBP", "cat/notes.txt", "empty/readme.md")
    source = read_source(tmp_path)
    assert source.layout == "folders"
    assert source.classes == ("cat", "dog")
    assert list(source.images) == ["train"]
    assert [x["id"] for x in rows(source, "train")] == ["cat/0.WEBP", "cat/1.jpg", "dog/1.png"]


@pytest.mark.parametrize("stray", [(), ("train/preview.jpg",)])
def test_class_folders_below_train_and_val_keep_their_split(
    stray: tuple[str, ...], tmp_path: Path
) -> None:
    touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/dog/2.jpg", *stray)
    source = read_source(tmp_path)
    assert (source.layout, source.classes) == ("folders", ("cat", "dog"))
    assert [x["path"] for x in rows(source, "train")] == ["train/cat/1.jpg", "train/dog/1.jpg"]
    assert [x["path"] for x in rows(source, "val")] == ["val/dog/2.jpg"]


def test_a_name_that_is_not_utf8_is_listed_with_its_problem(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.jpg")
    (tmp_path / "cat" / os.fsdecode(b"b\xff.jpg")).write_bytes(b"")
    good, bad = rows(read_source(tmp_path), "train")
    assert good["problem"] is None
    assert (bad["problem"], bad["label"]) == ("file name is not UTF-8: rename it", None)
    assert bad["path"] == "cat/b\\udcff.jpg"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (Path.rmdir, "does not exist"),
        (Path.exists, "empty folder"),
        (lambda path: touch(path, "notes.txt", "a/b/c.txt"), "no known layout"),
    ],
)
def test_a_source_that_cannot_be_used_is_named_with_the_remedy(
    tmp_path: Path, prepare: object, message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    prepare(source)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        read_source(source)


TINY = {
    "train/n1/images/n1_0.JPEG": b"",
    "wnids.txt": b"n1",
    "words.txt": b"n1\tone",
    "val/val_annotations.txt": b"v_0.JPEG\tn1\t0\t32\t44\t62\n",
}


@pytest.mark.parametrize(
    ("val", "problem"),
    [
        ("val/n1/images/v_0.JPEG", None),
        ("val/n1/v_0.JPEG", None),
        ("val/v_0.JPEG", None),
        ("val/n2/v_0.JPEG", "label unknown: its folder and val_annotations.txt differ"),
    ],
)
def test_tiny_imagenet_may_be_sorted_into_class_folders(
    val: str, problem: str | None, tmp_path: Path
) -> None:
    source = read_source(write(tmp_path, TINY | {val: b""}))
    assert source.layout == "tiny-imagenet"
    (row,) = rows(source, "val")
    assert (row["path"], row["boxes"], row["problem"]) == (val, [[0, 32, 44, 62]], problem)
    assert [x["files"] for x in source.unread.values()] == [1]  # wnids.txt


def test_tiny_imagenet_without_its_lists_is_known_by_its_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/n00000001/images/1.JPEG", "val/n00000001/v.JPEG", "val/n00000001/w.JPEG")
    source = read_source(tmp_path)
    assert (source.layout, source.images["val"]["label"].to_pylist()) == ("tiny-imagenet", [0, 0])


@pytest.mark.parametrize(
    ("paths", "facts"),
    [
        (["train/cat.0.jpg", "test1/1.jpg"], ["2 x image", "test1/1.jpg, train/cat.0.jpg"]),
        (["animals/cat/1.jpg"], ["1 x image", "animals/cat/1.jpg"]),
        (["data/val_images.tar.gz"], ["1 x packed archive: to be unpacked first (data/val_images"]),
    ],
)
def test_the_error_of_an_unknown_layout_names_what_lies_there(
    paths: list[str], facts: list[str], tmp_path: Path
) -> None:
    touch(tmp_path, *paths)
    with pytest.raises(UserError) as error:
        read_source(tmp_path)
    assert all(fact in str(error.value) for fact in facts)


def test_where_two_layouts_fit_the_user_chooses(tmp_path: Path) -> None:
    shard = tar({"a.jpg": b"x", "a.cls": b"0"})
    write(tmp_path, {"cat/1.jpg": b"", "pets.tar": shard})
    with pytest.raises(UserError, match=r"\(pets\.tar\) and class folders.*webdataset or folders"):
        read_source(tmp_path)
    assert read_source(tmp_path, "folders").classes == ("cat",)
    assert read_source(tmp_path, "webdataset").classes == ("0",)
    with pytest.raises(UserError, match="no images in the tiny-imagenet layout: "):
        read_source(tmp_path, "tiny-imagenet")
    (tmp_path / "pets.tar").write_bytes(b"damaged")
    assert read_source(tmp_path).layout == "folders"
    with pytest.raises(UserError, match="tiny-imagenet layout, but in that of folders: 1 x "):
        read_source(tmp_path, "tiny-imagenet")


def test_a_folder_named_as_a_split_is_no_class_but_one_named_train_may_be(tmp_path: Path) -> None:
    touch(tmp_path, "plane/1.jpg", "train/1.jpg", "test1/1.jpg", "val/1.txt")
    assert read_source(tmp_path).classes == ("plane", "train")


def test_an_unknown_layout_is_refused_with_those_known(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg")
    with pytest.raises(UserError, match=r"'coco' is unknown; allowed: auto, ilsvrc"):
        read_source(tmp_path, "coco")


CUB = dict.fromkeys(("images/a/1.jpg", "bounding_boxes.txt", "train_test_split.txt"), b"") | {
    "classes.txt": b"1 a\n",
    "image_class_labels.txt": b"1 1\n2 1\n",
}
MAPPING = "LOC_synset_mapping.txt"


@pytest.mark.parametrize(
    ("files", "links", "message"),
    [
        ({"a/1.jpg": b""}, {"b": "a"}, "/a and .*/b are the same folder by a link"),
        (CUB | {"images.txt": b"1 a/1.jpg\n2 a/1.jpg\n"}, {}, r"images\.txt names a/1\.jpg twice"),
        (
            {
                "train/n00000001/1.JPEG": b"",
                MAPPING: b"n00000001 cat\n",
                f"old/{MAPPING}": b"n00000001 dog\n",
            },
            {},
            f"{MAPPING} and old/{MAPPING} name other classes",
        ),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(
    files: dict[str, bytes], links: dict[str, str], message: str, tmp_path: Path
) -> None:
    write(tmp_path, files)
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    with pytest.raises(UserError, match=message):
        read_source(tmp_path)


def test_a_box_of_another_class_than_the_folder_is_noted(tmp_path: Path) -> None:
    ilsvrc(tmp_path)
    (tmp_path / "n00000002_7.xml").write_text(xml("n00000001", (1, 2, 3, 4)))
    noted = rows(read_source(tmp_path), "train")[2]
    assert noted["note"] == "annotation of another class: n00000001"


def test_an_annotation_that_cannot_be_read_is_its_image_s_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SourceFiles.read

    def denied(files: SourceFiles, path: str, *span: int) -> bytes:
        if path.endswith("n00000001_9.xml"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(files, path, *span)

    monkeypatch.setattr(SourceFiles, "read", denied)
    noted = rows(read_source(ilsvrc(tmp_path)), "train")[1]
    assert noted["note"] == "annotation unreadable: Permission denied"


@pytest.mark.parametrize("folder", ["Training", "dev", "EVAL", "testing"])
def test_other_words_for_a_split_are_known(folder: str, tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.jpg", f"{folder}/cat/2.jpg")
    source = read_source(tmp_path)
    split = {"d": ["train", "val"], "E": ["train", "val"]}.get(folder[0], ["train"])
    assert [*source.images] == split
    assert bool(source.unread) == (split == ["train"])
