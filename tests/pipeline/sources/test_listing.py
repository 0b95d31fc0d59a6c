import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources import listing
from pipeline.sources.listing import (
    BATCH,
    SCHEMA,
    ListingBuilder,
    digest,
    stored_array,
    taken,
    with_labels,
)


def table(count: int = 5) -> pa.Table:
    rows = ListingBuilder()
    for i in range(count):
        rows.add(
            id=f"image-{i}",
            path="archive.tar",
            offset=512 * i,
            size=100,
            wnid=None if i % 5 == 4 else f"n{i % 3}",
            boxes=[(i, 2, 3, 4)] * (i % 3),
            box_size=(50, 40) if i % 2 else None,
            note="odd" if i == 1 else None,
            problem="file missing: gone" if i == 3 else None,
        )
    return rows.table("id")


def test_labels_are_positions_in_the_classes_and_never_stand_beside_a_problem() -> None:
    labelled = with_labels(table(), ["n0", "n2"])
    assert labelled.schema == SCHEMA
    assert labelled["label"].to_pylist() == [0, None, 1, None, None]
    assert labelled["problem"].to_pylist() == [
        None,
        "label unknown: no train image has class n1",
        None,
        "file missing: gone",
        "label unknown: no folder, annotation or list names its class",
    ]


def test_the_digest_depends_on_every_value_and_on_nothing_else() -> None:
    whole = with_labels(table(3 * BATCH), ["n0", "n1", "n2"])
    pieces = pa.concat_tables([whole.slice(0, 7), whole.slice(7, 5000), whole.slice(5007)])
    assert digest(pieces) == digest(whole)
    assert digest(whole.slice(1).take(list(range(10)))) == digest(whole.slice(1, 10))
    digests = {digest(whole)}
    small = with_labels(table(), ["n0", "n1", "n2"])
    digests.add(digest(small))
    changes: list[object] = ["x", "x", None, 0, None, 2, [], 1, 1, "", ""]
    for name, value in zip(SCHEMA.names, changes, strict=True):
        values = small.to_pylist()
        values[1][name] = value
        digests.add(digest(pa.Table.from_pylist(values, SCHEMA)))
    assert len(digests) == 2 + len(changes)


def test_a_boundary_between_two_values_is_part_of_the_digest() -> None:
    def of(*ids: str) -> str:
        return digest(pa.table({"id": pa.array(ids)}))

    assert len({of("ab", "c"), of("a", "bc"), of("abc"), of("abc", "")}) == 4


def test_a_million_rows_take_about_a_hundred_bytes_each() -> None:
    labelled = with_labels(table(10 * BATCH), ["n0", "n1", "n2"])
    assert labelled.nbytes / labelled.num_rows < 130
    assert len(pickle.dumps(labelled.take(list(range(0, 10 * BATCH, 41))))) < 130 * 1001


names = st.none() | st.sampled_from(["", "a", "b", "é", "ﬁ", "\U0001f600", "b/c", "B"])


@given(rows=st.lists(st.tuples(names, names), max_size=60), data=st.data())
def test_rows_in_many_files_are_those_in_one(
    rows: list[tuple[str | None, str | None]], data: st.DataObject
) -> None:
    def built() -> pa.Table:
        builder = ListingBuilder()
        for number, (wnid, id) in enumerate(rows):
            boxes = [(number, 2, 3, 4)] * (number % 3)
            builder.add(id=id or "", path=str(number), wnid=wnid, boxes=boxes)
        return with_labels(builder.table("wnid", "id"), ["a", "b"])

    whole = built()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "BATCH", 4)
        patch.setattr(listing, "CHUNK", 8)
        pieces = built()
        assert digest(pieces) == digest(whole)
    assert pieces.equals(whole)
    assert pieces["id"].num_chunks >= len(rows) // 16
    numbers = st.lists(st.integers(0, max(len(rows) - 1, 0)), max_size=9 if rows else 0)
    chosen = np.array(data.draw(numbers), np.uint32)
    assert taken(pieces, chosen).equals(whole.take(chosen))


def test_mapped_files_have_no_names_and_go_with_their_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows, numbers = table(), stored_array(1000, np.int64)
    assert list(tmp_path.iterdir()) == []
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(str(tmp_path)) >= 2
    del rows, numbers
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
