"""The ledger: a row per source image with its outcome, in parquet. A shard's rows lie beside it in
its record, which is written last: a shard without one is not finished. The finished set has one
`ledger.parquet` with the rows of all records in order."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.ahead import run_ahead
from pipeline.errors import UserError
from pipeline.shards.format import REMAKE, Shard
from pipeline.storage import Result

LEDGER_NAME = "ledger.parquet"
OK, REJECTED = "ok", "rejected"
FACTS = b"shard_facts"
READ_AHEAD = 16  # records: remote ones take tens of milliseconds each

LedgerRow = dict[str, Any]  # by the columns of SCHEMA

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
    """The facts of a shard as a whole, kept in its record. shard: None where every image was
    rejected. sums, squares: over all stored pixels, per channel of 0..255. pixels: their number."""

    shard: Shard | None
    index_bytes: int
    pixels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]

    @property
    def images(self) -> int:
        """Accepted images."""
        return self.shard.images if self.shard else 0


@dataclass(kw_only=True)
class Totals:
    """Sums over ledger rows of one split."""

    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # by kind, the part before the colon
    class_counts: np.ndarray  # int64 [classes], of accepted images
    noted: int = 0  # accepted images with a note
    superpixels: int = 0
    max_superpixels: int = 0

    def merge(self, other: "Totals") -> None:
        """Add the totals of other rows."""
        self.rejected += other.rejected
        self.reasons += other.reasons
        self.class_counts = self.class_counts + other.class_counts
        self.noted += other.noted
        self.superpixels += other.superpixels
        self.max_superpixels = max(self.max_superpixels, other.max_superpixels)

    def add(self, table: pa.Table) -> None:
        """Add the ledger's rows in `table`."""
        rejected = table.filter(pc.field("status") == REJECTED)
        self.rejected += rejected.num_rows
        self.reasons.update(reason.split(":")[0] for reason in rejected["reason"].to_pylist())
        accepted = table.filter(pc.field("status") == OK)
        if accepted.num_rows:
            labels = accepted["label"].to_numpy()
            self.class_counts += np.bincount(labels, minlength=len(self.class_counts))
            self.noted += accepted.num_rows - accepted["note"].null_count
            self.superpixels += pc.sum(accepted["superpixels"]).as_py()
            largest = pc.max(accepted["superpixels"]).as_py()
            self.max_superpixels = max(self.max_superpixels, largest)


def write_record(location: str | Path, rows: Sequence[LedgerRow], facts: ShardFacts) -> None:
    """Write one shard's record atomically, which commits the shard."""
    table = pa.Table.from_pylist(list(rows), SCHEMA)
    content = json.dumps(asdict(facts), sort_keys=True).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({FACTS: content}), sink)
    storage.write_atomically(location, sink.getvalue().to_pybytes())


def read_facts(record: str | Path) -> ShardFacts:
    """Read the facts in a record. Raises UserError where it is missing or damaged."""

    def facts(file: pa.NativeFile) -> ShardFacts:
        content = json.loads(pq.read_schema(file).metadata[FACTS])
        content["shard"] = Shard(**content["shard"]) if content["shard"] else None
        content |= {name: tuple(content[name]) for name in ("sums", "squares")}
        return ShardFacts(**content)

    return _read(record, facts)


def read_record(record: str | Path) -> pa.Table:
    """Read a record's ledger rows. Raises UserError where it is missing or damaged."""
    return _read(record, lambda file: pq.read_table(file, partitioning=None).cast(SCHEMA))


def read_row_group(data: str | Path, group: int) -> pa.Table:
    """Read the rows of the shard with this number, over all splits, in the ledger of a set."""
    location = storage.join(data, LEDGER_NAME)
    return _read(location, lambda file: pq.ParquetFile(file).read_row_group(group))


def _read(location: str | Path, read: Callable[[pa.NativeFile], Result]) -> Result:
    """Return `read(file)`, tried again where a connection is lost. Raises UserError for damage."""

    def attempted() -> Result:
        with storage.open_input(location) as file:
            return read(file)

    try:
        return storage.attempt(location, attempted)
    except UserError:
        raise
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{location} cannot be read ({error}). {REMAKE}") from error


def committed_facts(record: str | Path, sizes: dict[str, int]) -> ShardFacts | None:
    """Return the facts of a finished shard, None where it is not finished. Its record can be read,
    and shard and index have the sizes that it states; their bytes are not read. sizes: of the files
    in the record's folder, by name."""
    if storage.name(record) not in sizes:
        return None
    try:
        facts = read_facts(record)
    except storage.UnreachableError:
        raise
    except UserError:
        return None
    if facts.shard is not None:
        index = Path(facts.shard.name).with_suffix(".idx").name
        actual = sizes.get(facts.shard.name), sizes.get(index)
        if actual != (facts.shard.bytes, facts.index_bytes):
            return None
    return facts


def merge_records(
    records: Iterable[str | Path], output: str | Path, splits: Sequence[str], classes: int
) -> tuple[dict[str, Totals], str]:
    """Write the rows of these records, in order, to `output`/ledger.parquet, a row group each.
    Returns the totals by split, and the file's SHA-256."""
    totals = {name: Totals(class_counts=np.zeros(classes, np.int64)) for name in splits}
    with storage.atomic_file(storage.join(output, LEDGER_NAME)) as file:
        with pq.ParquetWriter(file, SCHEMA) as writer:
            for table in run_ahead(read_record, records, threads=READ_AHEAD, depth=READ_AHEAD):
                writer.write_table(table)
                totals[table["split"][0].as_py()].add(table)
        file.seek(0)
        sha256 = hashlib.sha256()
        while piece := file.read(storage.CHUNK):
            sha256.update(piece)
    return totals, sha256.hexdigest()


def read_ledger(
    data: str | Path, split: str, columns: Sequence[str] | None = None, status: str | None = OK
) -> pa.Table:
    """Read the ledger's rows of one split of the set at location `data`. columns: of SCHEMA, all by
    default. status: None for every row. Raises UserError where there is no ledger."""
    location = storage.join(data, LEDGER_NAME)
    chosen = pc.field("split") == split
    if status is not None:
        chosen &= pc.field("status") == status
    names = list(columns) if columns is not None else None
    try:
        return _read(
            location,
            lambda file: pq.read_table(file, columns=names, filters=chosen, partitioning=None),
        )
    except storage.MissingError as error:
        raise UserError(f"{location} is missing; preprocess again to finish the set.") from error
