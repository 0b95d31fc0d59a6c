"""The ledger: a row per source image that says what became of it, in parquet.

Each shard's rows lie beside it in a part, which is written last: a shard without one is not
finished. The finished set has one `ledger.parquet` with the rows of all parts in order.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.shards import Shard, read_index, write_atomically
from pipeline.storage import DataError

LEDGER_NAME = "ledger.parquet"
OK, REJECTED = "ok", "rejected"
FACTS = b"shard_facts"

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # position of the image over all splits, train first
        ("split", pa.string()),
        ("key", pa.string()),
        ("id", pa.string()),
        ("path", pa.string()),  # relative to the source
        ("wnid", pa.string()),
        ("label", pa.int32()),
        ("status", pa.string()),  # OK or REJECTED
        ("reason", pa.string()),  # of a rejection, as `kind: detail`
        ("note", pa.string()),  # what was odd about an image or its boxes
        ("shard", pa.string()),
        ("position", pa.int32()),  # of the sample in its shard
        ("width", pa.int32()),  # of the file, in pixels
        ("height", pa.int32()),
        ("superpixels", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.int32()))),  # inclusive [x0, y0, x1, y1] in file pixels
    ]
)


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """What a part says of its shard as a whole. shard: None where every image was rejected.

    sums, squares: over all stored pixels, per channel of 0..255; pixels: how many there are.
    """

    shard: Shard | None
    pixels: int
    sums: tuple[int, int, int]
    squares: tuple[int, int, int]


@dataclass(kw_only=True)
class Totals:
    """What the ledger's rows of one split add up to."""

    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # by kind, the part before the colon
    class_counts: np.ndarray  # int64 [classes], of accepted images
    superpixels: int = 0
    max_superpixels: int = 0


def write_part(path: Path, rows: Sequence[dict[str, Any]], facts: ShardFacts) -> None:
    """Write one shard's rows atomically, which commits the shard."""
    table = pa.Table.from_pylist(list(rows), SCHEMA)
    content = json.dumps(asdict(facts), sort_keys=True).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({FACTS: content}), sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_facts(part: Path) -> ShardFacts:
    """The facts in a part's metadata. Raises DataError where it is missing or damaged."""
    try:
        content = json.loads(pq.read_schema(part).metadata[FACTS])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{part} cannot be read ({error}); run jobs.preprocess again.") from error
    shard = Shard(**content["shard"]) if content["shard"] else None
    return ShardFacts(
        shard=shard,
        pixels=content["pixels"],
        sums=tuple(content["sums"]),
        squares=tuple(content["squares"]),
    )


def is_committed(part: Path) -> bool:
    """Whether the part is there and its shard and index are as it says (sizes, not every byte)."""
    try:
        facts = read_facts(part)
        if facts.shard is None:
            return True
        path = part.with_name(facts.shard.name)
        whole = path.is_file() and path.stat().st_size == facts.shard.bytes
        return whole and len(read_index(path)) == facts.shard.images
    except DataError:
        return False


def merge_parts(
    parts: Iterable[Path], output: Path, splits: Sequence[str], classes: int
) -> dict[str, Totals]:
    """Write the rows of `parts`, in order, to `output`/ledger.parquet; their totals by split.

    One part is held in memory at a time.
    """
    totals = {name: Totals(class_counts=np.zeros(classes, np.int64)) for name in splits}
    path = output / LEDGER_NAME
    temporary = output / f".{LEDGER_NAME}.{os.getpid()}.tmp"
    with pq.ParquetWriter(temporary, SCHEMA) as writer:
        for part in parts:
            table = pq.read_table(part, partitioning=None).replace_schema_metadata(None)
            writer.write_table(table)
            _add(totals[table["split"][0].as_py()], table)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    return totals


def _add(totals: Totals, table: pa.Table) -> None:
    rejected = table.filter(pc.field("status") == REJECTED)
    totals.rejected += rejected.num_rows
    totals.reasons.update(reason.split(":")[0] for reason in rejected["reason"].to_pylist())
    accepted = table.filter(pc.field("status") == OK)
    if accepted.num_rows:
        labels = accepted["label"].to_numpy()
        totals.class_counts += np.bincount(labels, minlength=len(totals.class_counts))
        totals.superpixels += pc.sum(accepted["superpixels"]).as_py()
        largest = pc.max(accepted["superpixels"]).as_py()
        totals.max_superpixels = max(totals.max_superpixels, largest)


def read_ledger(
    data: str | Path,
    split: str,
    columns: Sequence[str] | None = None,
    status: str | None = OK,
) -> pa.Table:
    """The ledger's rows of one split of the set at place `data`, in row order.

    columns: those wanted (see SCHEMA), all by default. status: only rows of this status, those
    with a sample by default; None gives every row. Raises DataError where there is no ledger.
    """
    place = storage.join(data, LEDGER_NAME)
    chosen = pc.field("split") == split
    if status is not None:
        chosen &= pc.field("status") == status
    names = list(columns) if columns is not None else None

    def read() -> pa.Table:
        with storage.open_input(place) as file:
            return pq.read_table(file, columns=names, filters=chosen, partitioning=None)

    try:
        return storage.attempt(place, read)
    except storage.MissingError as error:
        raise DataError(
            f"{place} is missing; run jobs.preprocess again to finish the set."
        ) from error
    except pa.ArrowException as error:
        raise DataError(f"{place} cannot be read ({error}); run jobs.preprocess again.") from error
