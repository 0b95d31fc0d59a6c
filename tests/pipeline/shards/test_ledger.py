from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.shards.format import Shard, sha256_file
from pipeline.shards.ledger import (
    OK,
    REJECTED,
    SCHEMA,
    ShardFacts,
    committed_facts,
    merge_records,
    read_ledger,
    write_record,
)

NO_SHARD = ShardFacts(shard=None, index_bytes=0, pixels=0, sums=(0, 0, 0), squares=(0, 0, 0))


def accepted(row: int, split: str, label: int, count: int) -> dict[str, Any]:
    return {
        "row": row,
        "split": split,
        "key": f"{split}-{row:08d}",
        "label": label,
        "status": OK,
        "superpixels": count,
        "boxes": [[1, 2, 3, row]],
    }


def rejected(row: int, split: str, reason: str) -> dict[str, Any]:
    return {"row": row, "split": split, "status": REJECTED, "reason": reason}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    records = {
        "0": [accepted(0, "train", 1, 90), rejected(1, "train", "damaged JPEG: a")],
        "1": [
            rejected(2, "train", "damaged JPEG: b"),
            accepted(3, "train", 1, 100) | {"note": "odd"},
        ],
        "2": [rejected(4, "val", "empty file: 0 bytes"), accepted(5, "val", 0, 70)],
    }
    for name, rows in records.items():
        write_record(tmp_path / f"{name}.parquet", rows, NO_SHARD)
    paths = [tmp_path / f"{name}.parquet" for name in records]
    totals, sha256 = merge_records(paths, tmp_path, ["train", "val"], 3)
    assert sha256 == sha256_file(tmp_path / "ledger.parquet")
    assert totals["train"].rejected == 2
    assert totals["train"].reasons == {"damaged JPEG": 2}
    assert totals["train"].class_counts.tolist() == [0, 2, 0]
    assert (totals["train"].superpixels, totals["train"].max_superpixels) == (190, 100)
    assert (totals["train"].noted, totals["val"].noted) == (1, 0)
    assert totals["val"].reasons == {"empty file": 1}
    assert totals["val"].class_counts.tolist() == [1, 0, 0]
    return tmp_path


def test_the_merged_ledger_has_every_row_in_order_and_one_schema(merged: Path) -> None:
    table = pq.read_table(merged / "ledger.parquet")
    assert table.schema.equals(SCHEMA)
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4, 5]


def test_readers_get_the_accepted_rows_of_a_split_unless_they_ask_for_all(merged: Path) -> None:
    table = read_ledger(merged, "train", ["row", "boxes"])
    assert table.column_names == ["row", "boxes"]
    assert table.to_pylist() == [
        {"row": 0, "boxes": [[1, 2, 3, 0]]},
        {"row": 3, "boxes": [[1, 2, 3, 3]]},
    ]
    assert read_ledger(merged, "val", status=None)["row"].to_pylist() == [4, 5]
    assert read_ledger(merged, "val", ["reason"], status=REJECTED).to_pylist() == [
        {"reason": "empty file: 0 bytes"}
    ]


def test_a_missing_ledger_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"preprocess again"):
        read_ledger(tmp_path, "train")


def test_a_record_without_its_facts_or_damaged_does_not_count_as_committed(tmp_path: Path) -> None:
    record = tmp_path / "a.parquet"
    sizes = {"a.parquet": 1}
    assert committed_facts(record, {}) is None
    write_record(record, [accepted(0, "train", 0, 1)], NO_SHARD)
    assert committed_facts(record, sizes) == NO_SHARD
    record.write_bytes(record.read_bytes()[:-20])
    assert committed_facts(record, sizes) is None


def test_a_shard_or_index_missing_or_of_another_length_is_not_finished(tmp_path: Path) -> None:
    shard = Shard(name="a.tar", images=1, bytes=10240, sha256="0")
    facts = ShardFacts(shard=shard, index_bytes=30, pixels=1, sums=(1, 1, 1), squares=(1, 1, 1))
    record = tmp_path / "a.parquet"
    write_record(record, [accepted(0, "train", 0, 1)], facts)
    whole = {"a.parquet": 1, "a.tar": 10240, "a.idx": 30}
    assert committed_facts(record, whole) == facts
    for name in ("a.tar", "a.idx"):
        assert committed_facts(record, whole | {name: 29}) is None
        assert committed_facts(record, {k: v for k, v in whole.items() if k != name}) is None
