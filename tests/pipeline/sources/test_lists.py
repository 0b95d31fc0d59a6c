import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards.ledger import read_record
from pipeline.shards.plan import PreprocessConfig, make_plan
from pipeline.shards.shard import make_shard
from pipeline.sources.files import SourceFiles
from pipeline.sources.find import find_layout, list_images
from tests import remote
from tests.pipeline.sources.miniature import read_source, write


def listed(root: Path, text: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a CSV list by id, each with its split."""
    source = read_source(write(root, {"list.csv": text.encode()}) / "list.csv")
    assert source.layout == "list"
    tables = source.images.items()
    return {row["id"]: row | {"split": x} for x, table in tables for row in table.to_pylist()}


def parquet(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


CSV = """path,label,split,x0,y0,x1,y1,width,height
a/1.jpg,dog,train,10,20,109,219,1000,1000
a/1.jpg,dog,train,0,0,999,999,1000,1000
b/2.jpg,cat,val,,,,,,
./b/3.jpg,dog,train,,,,,,
"""
COLUMNS = {
    "Path": ["b/3.jpg", "b/2.jpg", "a/1.jpg", "a/1.jpg"],
    "label": ["dog", "cat", "dog", "dog"],
    "split": ["train", "val", "train", "train"],
    **{"x0": [None, None, 10, 0], "y0": [None, None, 20, 0]},
    **{"x1": [None, None, 109, 999], "y1": [None, None, 219.0, 999]},
    **{side: [None, None, 1000, 1000] for side in ("width", "height")},
    "score": [0.1, 0.2, 0.3, 0.4],  # of no interest
}


@pytest.mark.parametrize(("name", "data"), [("l.csv", CSV.encode()), ("l.parquet", None)])
def test_a_list_gives_labels_splits_and_boxes(
    name: str, data: bytes | None, tmp_path: Path
) -> None:
    source = read_source(write(tmp_path, {name: data or parquet(COLUMNS)}) / name)
    assert (source.layout, source.classes) == ("list", ("dog",))  # those of the train images
    first, second = source.images["train"].to_pylist()
    assert (first["id"], first["path"], first["label"]) == ("a/1.jpg", "a/1.jpg", 0)
    assert first["boxes"] == [[10, 20, 109, 219], [0, 0, 999, 999]]
    assert (first["box_width"], first["box_height"]) == (1000, 1000)
    assert (second["id"], second["boxes"], second["box_width"]) == ("b/3.jpg", [], None)
    (val,) = source.images["val"].to_pylist()
    assert val["problem"] == "label unknown: no train image has class cat"
    unread = [(x["files"], x["examples"]) for x in source.unread.values()]
    assert unread == ([] if data else [(1, ["score"])])


def test_boxes_of_the_original_are_scaled_to_the_stored_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (100, 50)).save(buffer, "JPEG")
    bad = ("gone.jpg", "a", "a/1.jpg/x.jpg", "x" * 300, "pipe")
    lines = "".join(f"{x},cat,,,,,,\n" for x in (f"{tmp_path}/elsewhere.jpg", *bad))
    text = CSV.replace(",split", "").replace(",train", "").replace(",val", "") + lines
    images = {
        x: buffer.getvalue() for x in ("l/a/1.jpg", "l/b/2.jpg", "l/b/3.jpg", "elsewhere.jpg")
    }
    write(tmp_path, images | {"l/l.csv": text.encode()})
    os.mkfifo(tmp_path / "l/pipe")
    config = PreprocessConfig(
        source=str(tmp_path / "l/l.csv"), output=str(tmp_path / "out"), superpixels=16
    )
    plan = make_plan(config)
    (task,) = plan.tasks
    make_shard(task, plan.images(task), plan.source, plan.output, config)
    rows = {x["id"]: x for x in read_record(task.record(plan.output)).to_pylist()}
    assert rows["a/1.jpg"]["boxes"] == [[1, 1, 10, 10], [0, 0, 99, 49]]
    assert all(rows[x]["reason"].startswith("unreadable file: ") for x in bad)
    used = [id for id, row in rows.items() if row["status"] == "ok"]
    assert sorted(used) == sorted(["a/1.jpg", "b/2.jpg", "b/3.jpg", f"{tmp_path}/elsewhere.jpg"])


def test_every_bad_line_is_listed_with_its_reason(tmp_path: Path) -> None:
    lines = [
        "path,label,split,problem",
        "ok.jpg,cat,train,none",
        ",cat,train",
        "b.jpg,,train",
        "c.jpg,cat,trian",
        "d.jpg,cat,train,,more",
        "http://host/e.jpg,cat,train",
        "s3://[host/e.jpg,cat,train",
        "f.jpg,cat,",
        "g.jpg",
        f"{tmp_path}/h.jpg,cat,train",
    ]
    rows = listed(tmp_path, "\n".join(lines))
    assert {id: (row["problem"] or "fine").split(":")[0] for id, row in rows.items()} == {
        "ok.jpg": "fine",
        "(line 3)": "path missing",
        "b.jpg": "label unknown",
        "c.jpg": "split unknown",
        "d.jpg": "line damaged",
        "http://host/e.jpg": "path not readable",
        "s3://[host/e.jpg": "path not readable",
        "f.jpg": "split unknown",
        "g.jpg": "label unknown",
        "h.jpg": "fine",
    }


@pytest.mark.parametrize(
    ("corners", "note"),
    [
        ("1,2,x,4,,", "line 2: box 0 dropped: not four whole numbers (1 2 x 4)"),
        ("1,2,,4,,", "line 2: box 0 dropped: not four whole numbers (1 2  4)"),
        (
            "0.1,0.2,0.5,1,,",
            "line 2: box 0 dropped: shares of the image, not pixels (0.1 0.2 0.5 1)",
        ),
        ("1,2,3,4,0,9", "line 2: boxes dropped: 0 x 9 is no size"),
        ("1,2,3,4,,9", "line 2: boxes dropped:  x 9 is no size"),
    ],
)
def test_a_bad_box_is_dropped_with_a_note(corners: str, note: str, tmp_path: Path) -> None:
    header = "path,label,x0,y0,x1,y1,width,height"
    (row,) = listed(tmp_path, f"{header}\na.jpg,cat,{corners}").values()
    assert (row["boxes"], row["problem"], row["note"]) == ([], None, note)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,cat\n", r"list\.csv lacks path, label among its columns \(a\.jpg, cat\)"),
        ("path;label\n", r"lacks path, label among its columns \(path;label\)"),
        ("path,label,x0,y0,x1\n", r"lacks y1 among"),
        ("path,label,width\n", r"lacks height among"),
        ("path,label,Label\n", r"has label twice among"),
        ("", "lacks path, label"),
        ("path,label\n", "holds no images"),
        ('path,label\na.jpg,"cat', r"list\.csv line 2 is not CSV"),
        (
            "path,label\na.jpg,cat\nb.jpg,cat\n./a.jpg,dog\n",
            "line 2 and line 4 give 'a.jpg' the label",
        ),
        ("path,label,split\na,b,val\na,b,train\n", "give 'a' the split val and train"),
        (
            "path,label,x0,y0,x1,y1,width,height\na,b,1,2,3,4,9,9\na,b,1,2,3,4,,\n",
            r"line 2 and line 3 give 'a' the size \(9, 9\) and None",
        ),
        ("path,label\na.jpg,3\nb.jpg,cat\n", r"class numbers \('3'\) beside names \('cat'\)"),
    ],
)
def test_a_list_that_cannot_be_right_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        listed(tmp_path, text)


def test_a_column_of_another_type_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    whole = parquet(COLUMNS)
    nested = parquet(COLUMNS | {"x0": [[1, 2]] * 4})
    for data in (nested, parquet({"path": [["a"]], "label": ["b"]}), whole[:-9], whole[9:], b""):
        with pytest.raises(UserError, match=r"l\.parquet cannot be read .*; expected a Parquet"):
            read_source(write(tmp_path, {"l.parquet": data}) / "l.parquet")


def test_a_list_and_its_images_may_lie_on_object_storage(s3_endpoint: str, tmp_path: Path) -> None:
    far, near = remote.uri(s3_endpoint, "list"), tmp_path / "l"
    text = f"path,label\n{storage.join(far, 'b.jpg')},cat\na/1.jpg,cat\n"
    write(near, {"a/1.jpg": b"one", "b.jpg": b"two", "list.csv": text.encode()})
    remote.upload(near, s3_endpoint, "list")
    for source in (storage.join(far, "list.csv"), str(near / "list.csv")):
        with SourceFiles(source) as files:
            table = list_images(files, find_layout(files)).images["train"]
            fetched = files.fetch((path, None, None) for path in table["path"].to_pylist())
            assert [fetch() for fetch in fetched] == [b"one", b"two"]
    with (
        SourceFiles(storage.join(far, "no.csv")) as files,
        pytest.raises(UserError, match=r"no\.csv.* cannot be read \(No such file"),
    ):
        list_images(files, find_layout(files))


def test_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    labels = [*map(str, range(11)), "-1"]
    rows = listed(tmp_path, "path,label\n" + "".join(f"{x}.jpg,{x}\n" for x in labels))
    assert [rows[f"{x}.jpg"]["label"] for x in labels] == [*range(11), None]


cells = st.text() | st.sampled_from(["", "a.jpg", "cat", "1", "-1", "1e999", "nan"])
columns = st.lists(st.sampled_from([*CSV.split("\n")[0].split(","), "x"]), max_size=9)


@settings(max_examples=150, deadline=None)
@given(names=columns, rows=st.lists(st.lists(cells, max_size=9), max_size=5), damage=st.binary())
def test_any_text_is_a_listing_or_one_clear_error(
    names: list[str], rows: list[list[str]], damage: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = [",".join(x) for x in [["path", "label", *names], *rows]]
    data = "\n".join(lines).encode("utf-8", "replace") + damage
    root = write(tmp_path_factory.mktemp("list"), {"l.csv": data})
    try:
        source = read_source(root / "l.csv")
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        for table in source.images.values():
            assert all(
                (x["label"] is None) == (x["problem"] is not None) for x in table.to_pylist()
            )
