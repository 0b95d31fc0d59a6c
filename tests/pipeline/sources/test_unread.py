import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.sources.files import SourceFiles, path_hash
from pipeline.sources.find import Source, find_layout, list_images
from pipeline.sources.layouts import CUB_FILES
from tests import remote
from tests.pipeline.sources.miniature import FORMS, read_source, tar, write, xml
from tests.pipeline.sources.test_ilsvrc import drawn_miniature

CLASSES = {"train/cat/1.jpg": b"", "train/dog/1.jpg": b""}
OUTSIDE = "image: outside the layout's folders"
FOLDERS = ["train", "val", "Valid", "test1", "cat", "n00000001", "images", ".git", "CUB_200_2011"]
NAMES = [
    *(
        "a.jpg",
        "b.JPEG",
        "c.jfif",
        "d.xml",
        "e.txt",
        "f",
        ".DS_Store",
        "g.tar.gz",
        "h.tar",
        "ü.png",
    ),
    *("wnids.txt", "words.txt", "val_annotations.txt", "LOC_val_solution.csv", "classes.txt"),
    *("n00000001_1.JPEG", "ILSVRC2012_val_00000001.JPEG", os.fsdecode(b"\xff.jpg")),
]
BASES = {  # what makes a source of each layout
    "folders": {"train/cat/0.jpg": b""},
    "ilsvrc": {"train/n00000001/0.JPEG": b""},
    "tiny-imagenet": {"train/n00000001/images/0.JPEG": b""},
    "webdataset": {"0.tar": tar({"a.jpg": b"x", "a.cls": b"0"})},
    "cub": {"CUB_200_2011/images/cat/0.jpg": b""}
    | {f"CUB_200_2011/{name}": b"1 cat\n" for name in CUB_FILES},
}
ANNOTATIONS = b"a.jpg\tn00000001\t0\t0\t1\t1\nmissing.jpg\tn00000001\t0\t0\t1\t1\n"
paths = st.tuples(
    st.lists(st.sampled_from(FOLDERS), max_size=3).map("/".join), st.sampled_from(NAMES)
)
links = st.tuples(paths, st.sampled_from([".", "..", "nowhere", "itself"]))


def counts(source: Source) -> dict[str, int]:
    return {reason: x["files"] for reason, x in source.unread.items()}


def entries(root: Path) -> int:
    """The entries of a tree that are no folders; a folder or archive that is hidden is one."""
    count = 0
    for folder, folders, names in os.walk(root):
        linked = [name for name in folders if name[0] == "." or (Path(folder) / name).is_symlink()]
        folders[:] = [name for name in folders if name not in linked]
        count += len(linked) + len(names)
    return count


@settings(max_examples=80)
@given(
    files=st.sets(paths, min_size=1, max_size=12),
    linked=st.lists(links, max_size=2),
    layout=st.sampled_from(list(BASES)),
    forced=st.booleans(),
)
def test_every_file_is_listed_or_read_or_counted(
    files: set[tuple[str, str]],
    linked: list[tuple[tuple[str, str], str]],
    layout: str,
    forced: bool,
    tmp_path: Path,
) -> None:
    root = tmp_path / "source"
    shutil.rmtree(root, ignore_errors=True)
    contents = {"val_annotations.txt": ANNOTATIONS, "h.tar": tar({"a.jpg": b"x", "a.cls": b"0"})}
    strays = {f"./{folder}/{name}": contents.get(name, b"") for folder, name in files}
    write(root, strays | BASES[layout])
    for (folder, name), target in linked:
        if not os.path.lexists(root / folder / name):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / name).symlink_to(name if target == "itself" else target)
    with SourceFiles(str(root)) as opened:
        try:
            source = list_images(opened, layout if forced else find_layout(opened))
        except UserError:  # one line, and no omission
            return
    rows = [row for table in source.images.values() for row in table.to_pylist()]
    listed = {
        row["path"]
        for row in rows
        if row["path"][-4:] != ".tar" and not (row["problem"] or "").startswith("file missing")
    }
    used = {*opened.used}
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    read = {path for path in names if path_hash(path) in used}
    assert not read & listed
    unread = sum(x["files"] for x in source.unread.values())
    assert len(listed) + len(read) + unread == entries(root)


@pytest.mark.parametrize(
    ("paths", "layout", "unread"),
    [
        (["train/cat/2/deep/1.jpg", "test/1.jpg"], "folders", {OUTSIDE: 2}),
        (["train/1.jpg", "validation/cat/1.jpg", "valid/cat/2.jpg"], "folders", {OUTSIDE: 2}),
        (["val/cat/1.jpg", "val/stray.jpg"], "folders", {OUTSIDE: 1}),
        (["pets.tar", "pets.zip"], "folders", {"archive": 1, "suffix .zip": 1}),
        (["train/cat/1.xml", "a.tar.gz"], "folders", {"packed archive": 1, "suffix .xml": 1}),
        (["train/cat/._1.jpg", ".git/a", ".git/b"], "folders", {"hidden": 2}),
        (["train/cat/1.jfif", "train/cat/1.JPE", "train/cat/1.avif"], "folders", {}),
        (["Training/owl/1.jpg", "Train/owl/1.jpg"], "folders", {OUTSIDE: 3}),  # one train folder
    ],
)
def test_what_is_not_read_is_counted_by_reason(
    paths: list[str], layout: str, unread: dict[str, int], tmp_path: Path
) -> None:
    source = read_source(write(tmp_path, CLASSES | dict.fromkeys(paths, b"")))
    assert source.layout == layout
    counted = counts(source)
    assert [*counted.values()] == [*unread.values()]
    assert all(x.startswith(y) for x, y in zip(counted, unread, strict=True))


def test_one_example_is_kept_of_each_folder(tmp_path: Path) -> None:
    strays = [f"train/cat/{x}/{y}.jpg" for x in range(9) for y in range(3)]
    source = read_source(write(tmp_path, CLASSES | dict.fromkeys(strays, b"")))
    examples = [f"train/cat/{x}/0.jpg" for x in range(5)]
    assert source.unread == {OUTSIDE: {"files": 27, "examples": examples}}


def test_links_pipes_and_unreadable_folders_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path, CLASSES | {"lost+found/1.jpg": b""})
    for link, target in (
        ("train/loop", "loop"),
        ("train/bird", "no"),
        ("up", "."),
        ("val", "train"),
    ):
        (root / link).symlink_to(target)
    (root / "train/cat/gone.jpg").symlink_to("no")  # an image, to be rejected
    os.mkfifo(root / "train/cat/pipe.jpg")
    scandir = os.scandir

    def denied(path: str) -> Any:
        if path.endswith("lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    source = read_source(root)
    assert source.images["train"]["id"].to_pylist() == ["cat/1.jpg", "cat/gone.jpg", "dog/1.jpg"]
    assert source.images["val"].num_rows == 3  # by the link
    assert {reason: x["examples"] for reason, x in source.unread.items()} == {
        "link: it leads to a folder above": ["up"],
        "unreadable: Permission denied": ["lost+found/"],
        "unreadable: Too many levels of symbolic links": ["train/loop"],
        "link: it leads to nothing": ["train/bird"],
        "pipe, socket or device: it has no end": ["train/cat/pipe.jpg"],
    }
    (root / "zebra").symlink_to("train")  # after the folder that it leads to
    assert read_source(root).unread["link: to a folder with another path"]["examples"] == ["zebra/"]


@pytest.mark.parametrize("form", FORMS)
def test_published_ilsvrc_is_read_whole(form: str, tmp_path: Path) -> None:
    source = read_source(write(tmp_path, FORMS[form](drawn_miniature())))
    assert counts(source) == ({OUTSIDE: 1} if form == "kaggle" else {})  # a test image


def test_object_storage_is_counted_as_the_disk_is(s3_endpoint: str, tmp_path: Path) -> None:
    strays = dict.fromkeys(("valid/1.jpg", "a.txt", "train/cat/.hidden"), b"")
    root = write(tmp_path / "unread", CLASSES | strays)
    uri = remote.upload(root, s3_endpoint, "unread")
    with SourceFiles(uri) as files:
        assert list_images(files, "folders").unread == read_source(root).unread


MEMBERS = "in archives: no image or label that is read"


def test_members_of_archives_are_counted_as_files_are(tmp_path: Path) -> None:
    names = ["a.jpg", "._a.jpg", "a.cls", "a.txt", "b.png", "b.jpg", "b.cls", "README", "2.0.jpg"]
    tars = {"0.tar": tar(dict.fromkeys(names, b"1")), "1.tar": tar({"c.jpg": b"x", "c.cls": b"1"})}
    source = read_source(write(tmp_path, tars))
    assert source.images["train"]["id"].to_pylist() == ["a", "b", "2", "c"]
    assert source.unread == {
        "hidden: named with a dot first": {"files": 1, "examples": ["0.tar/._a.jpg"]},
        f"suffix (none) {MEMBERS}": {"files": 1, "examples": ["0.tar/README"]},
        f"suffix .txt {MEMBERS}": {"files": 1, "examples": ["0.tar/a.txt"]},
        f"suffix .png {MEMBERS}": {"files": 1, "examples": ["0.tar/b.png"]},
        f"suffix .jpg {MEMBERS}": {"files": 1, "examples": ["0.tar/2.0.jpg"]},
    }


def test_what_lies_beside_the_images_of_a_train_tar_is_counted(tmp_path: Path) -> None:
    outer = {"n00000001.tar": tar({"1.JPEG": b"x", "a.txt": b""}), "b.JPEG": b"x"}
    source = read_source(write(tmp_path, {"ILSVRC2012_img_train.tar": tar(outer)}))
    assert source.images["train"]["id"].to_pylist() == ["1"]
    assert counts(source) == {f"suffix .jpeg {MEMBERS}": 1, f"suffix .txt {MEMBERS}": 1}


@pytest.mark.parametrize(
    ("name", "content", "boxes"),
    [
        ("n00000001/1.XML", xml("n00000001", (1, 2, 3, 4)), [[1, 2, 3, 4]]),
        ("n00000001/2.xml", xml("n00000001", (1, 2, 3, 4)), []),
        ("LOC_train_solution.csv", "ImageId,PredictionString\n1,n00000001 1 2 3 4", [[1, 2, 3, 4]]),
        ("LOC_train_solution.csv", "ImageId;PredictionString\n1;n00000001 1 2 3 4", []),
    ],
)
def test_boxes_that_no_image_has_are_files_that_are_not_read(
    name: str, content: str, boxes: list[list[int]], tmp_path: Path
) -> None:
    files = {"train/n00000001/1.JPEG": b"", name: content.encode()}
    source = read_source(write(tmp_path, files))
    assert source.images["train"]["boxes"].to_pylist() == [boxes]
    assert [x["examples"] for x in source.unread.values()] == ([] if boxes else [[name]])
