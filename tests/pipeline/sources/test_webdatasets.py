import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.sources.files import SourceFiles
from pipeline.sources.find import Source
from tests.pipeline.sources.miniature import read_source, tar, write


def read_tars(root: Path, files: dict[str, bytes]) -> Source:
    source = read_source(write(root, files))
    assert source.layout == "webdataset"
    return source


def column(source: Source, split: str, name: str) -> list[Any]:
    return source.images[split][name].to_pylist()


def test_images_and_classes_are_read_from_cls_and_json_in_place(tmp_path: Path) -> None:
    shard = tar(
        {
            "a.jpg": b"JPEG a",
            "a.cls": b"1\n",
            "b.cls": b"0",
            "b.png": b"PNG b",
            "sub/c.json": json.dumps({"label": 11}).encode(),
            "sub/c.webp": b"WEBP c",
            "sub/c.seg.png": b"of no interest",
        }
    )
    val = tar({"v.jpeg": b"JPEG v", "v.txt": b"a caption", "v.cls": b"11"})
    source = read_tars(tmp_path, {"train-000000.tar": shard, "imagenet-val-0.tar": val})
    assert list(source.images) == ["train", "val"]
    assert column(source, "train", "id") == ["a", "b", "sub/c"]
    assert column(source, "train", "label") == [1, 0, 11]
    assert column(source, "val", "label") == [11]
    # Numbers are kept, also of classes without an image: 12 classes, 00 to 11, in their order.
    assert source.classes == tuple(f"{i:02}" for i in range(12))
    with SourceFiles(str(tmp_path)) as files:
        rows = source.images["train"].to_pylist()
        read = [files.read(row["path"], row["offset"], row["size"]) for row in rows]
    assert read == [b"JPEG a", b"PNG b", b"WEBP c"]


def test_numbers_are_lines_of_the_mapping_where_there_is_one(tmp_path: Path) -> None:
    shard = tar({"a.jpg": b"a", "a.cls": b"0", "b.jpg": b"b", "b.cls": b"1"})
    mapping = b"n2 second by name\nn1 first by name\n"
    source = read_tars(tmp_path, {"train/0.tar": shard, "LOC_synset_mapping.txt": mapping})
    assert source.classes == ("n1", "n2")
    assert source.class_names == ("first by name", "second by name")
    assert column(source, "train", "wnid") == ["n2", "n1"]
    assert column(source, "train", "label") == [1, 0]


def test_names_as_classes_are_sorted_and_equal_keys_of_two_shards_told_apart(
    tmp_path: Path,
) -> None:
    shards = {
        f"train-{i}.tar": tar({"0.jpg": b"x", "0.json": b'{"label": "%s"}' % name})
        for i, name in enumerate((b"zebra", b"ant"))
    }
    source = read_tars(tmp_path, shards)
    assert source.classes == ("ant", "zebra")
    assert column(source, "train", "id") == ["train-0/0", "train-1/0"]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"cls": b"1"}, "image missing: the sample has cls"),
        ({"jpg": b"x"}, "label unknown: the sample has jpg"),
        ({"jpg": b"x", "cls": b"\1\0\0\0"}, "label unknown: its cls is no text"),
        ({"jpg": b"x", "cls": b"\xff\xfe1"}, "label unknown: its cls is no text"),
        ({"jpg": b"x", "json": b'{"label": "\\udce9"}'}, "label unknown: it is not UTF-8"),
        ({"jpg": b"x", "json": b"{"}, "label unknown: its json does not parse"),
        ({"jpg": b"x", "json": b"[" * 100_000}, "label unknown: its json does not parse"),
        ({"jpg": b"x", "json": b"[1]"}, "label unknown: its json does not parse"),
        ({"jpg": b"x", "json": b'{"label": null}'}, "label unknown: its json has no text or"),
        ({"jpg": b"x", "json": b'{"label": 1.5}'}, "label unknown: its json has no text or"),
        ({"jpg": b"x", "json": b'{"label": true}'}, "label unknown: its json has no text or"),
    ],
)
def test_a_sample_that_cannot_be_used_is_listed_with_its_problem(
    members: dict[str, bytes], problem: str, tmp_path: Path
) -> None:
    good = {"a.jpg": b"good", "a.cls": b"1"}
    bad = {f"b.{extension}": data for extension, data in members.items()}
    source = read_tars(tmp_path, {"train-0.tar": tar(good | bad)})
    first, second = source.images["train"].to_pylist()
    assert (first["label"], first["problem"]) == (1, None)
    assert second["problem"].startswith(problem)
    assert second["label"] is None


def labelled(*texts: str) -> bytes:
    """Return a tar with an image for each label."""
    return tar(
        {
            f"{i:02}.{extension}": data
            for i, text in enumerate(texts)
            for extension, data in (("jpg", b"x"), ("cls", text.encode()))
        }
    )


@pytest.mark.parametrize(
    ("texts", "classes", "message"),
    [
        (["2"], b"a\nb\n", "class number 2 .* 2 classes are known, counted from 0"),
        (["0", "999999"], b"", "class number 999999 among 2 .* list all classes in classes.txt"),
        (["255"], b"", "class number 255 among 1 that occur; without a list 100 are allowed"),
        (["0", "cat"], b"", r"class numbers \('0'\) beside names \('cat'\)"),
        (["0", "1.5"], b"", r"class numbers \('0'\) beside names \('1.5'\)"),
        (["0", "1"], b"a\n\nb\n", r"classes\.txt line 2 is blank"),
    ],
)
def test_class_numbers_that_cannot_be_right_are_refused(
    texts: list[str], classes: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_tars(tmp_path, {"train-0.tar": labelled(*texts), "classes.txt": classes})


def test_a_negative_label_is_its_image_s_problem_and_moves_no_class(tmp_path: Path) -> None:
    texts = [str(i) for i in range(12)]
    source = read_tars(tmp_path, {"0.tar": labelled(*texts, "-1", "NaN", "3.0")})
    assert len(source.classes) == 12
    assert column(source, "train", "label") == [*range(12), None, None, 3]
    assert column(source, "train", "problem")[12] == "label unknown: -1 is no class"


def test_equal_names_in_the_list_of_classes_stay_two_classes(tmp_path: Path) -> None:
    files = {"0.tar": labelled("0", "1", "2"), "classes.txt": b"crane\nant\ncrane\n\n"}
    source = read_tars(tmp_path, files)
    assert source.classes == ("ant", "crane (0)", "crane (2)")
    assert column(source, "train", "label") == [1, 0, 2]


def test_names_that_look_alike_are_one_class(tmp_path: Path) -> None:
    names = ("cafe\u0301", "caf\u00e9", "bar")
    source = read_tars(tmp_path, {"0.tar": labelled(*names)})
    assert source.classes == ("bar", "caf\u00e9")
    assert column(source, "train", "label") == [1, 1, 0]
    folders = {f"{x}/1.jpg": b"" for x in (*names, "bar ")}
    assert read_source(write(tmp_path / "folders", folders)).classes == source.classes


@pytest.mark.parametrize("mapping", [b"n1\tant\nn2\tbee\n", b"n1 ant\nn2\n"])
def test_a_line_of_the_mapping_counts_whatever_follows_its_wnid(
    mapping: bytes, tmp_path: Path
) -> None:
    files = {"0.tar": labelled("0", "1"), "LOC_synset_mapping.txt": mapping}
    assert read_tars(tmp_path, files).classes == ("n1", "n2")
    files["LOC_synset_mapping.txt"] = b"n1 ant\nn1 ant\nn2 bee\n"
    with pytest.raises(UserError, match=r"LOC_synset_mapping\.txt line 2 names n1 a second time"):
        read_tars(tmp_path, files)


def test_repeated_keys_are_told_apart_or_rejected(tmp_path: Path) -> None:
    def members(*extensions: str) -> bytes:
        return b"".join(
            tar({f"0.{x}": str(i // 2).encode()})[:1024] for i, x in enumerate(extensions)
        ) + bytes(1024)

    source = read_tars(tmp_path, {"0.tar": members("jpg", "cls", "jpg", "cls")})
    assert column(source, "train", "label") == [0, 1]
    assert column(source, "train", "offset") == [512, 2560]
    source = read_tars(tmp_path, {"0.tar": members("jpg", "jpg", "cls", "cls")})
    assert column(source, "train", "label") == [None, None]
    assert [x.split(":")[0] for x in column(source, "train", "problem")] == ["key repeated"] * 2


def test_one_archive_is_a_source(tmp_path: Path) -> None:
    write(tmp_path, {"val-0.tar": labelled("1", "0"), "classes.txt": b"b\na\n", "other.tar": b"x"})
    source = read_source(tmp_path / "val-0.tar")
    assert (source.layout, source.classes) == ("webdataset", ("a", "b"))
    assert column(source, "val", "label") == [0, 1]


def test_a_shard_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train-0\.tar ends at byte 700 "):
        read_tars(tmp_path, {"train-0.tar": tar({"a.jpg": b"x" * 1000, "a.cls": b"1"})[:700]})


texts = st.binary(max_size=20) | st.sampled_from([b"0", b"1", b"-1", b"9" * 5000, b'{"label": 1}'])


@settings(max_examples=150, deadline=None)
@given(
    members=st.lists(st.tuples(st.sampled_from(["cls", "json"]), texts), max_size=5),
    classes=texts | st.just(b""),
    mapping=texts | st.just(b""),
)
def test_any_labels_are_a_listing_or_one_clear_error(
    members: list[tuple[str, bytes]],
    classes: bytes,
    mapping: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    shard: dict[str, bytes] = {}
    for i, (extension, data) in enumerate(members):
        shard |= {f"{i}.jpg": b"x", f"{i}.{extension}": data}
    files = {
        "0.tar": tar(shard | {"last.jpg": b"x"}),
        "classes.txt": classes,
        "LOC_synset_mapping.txt": mapping,
    }
    try:
        source = read_tars(tmp_path_factory.mktemp("tars"), files)
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert source.images["train"].num_rows == len(members) + 1
