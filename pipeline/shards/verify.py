"""Check every file of a finished set. The manifest holds the hash of every shard and of the ledger;
index and record are compared with both. Our reader and `webdataset` must read the same samples."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards.format import (
    MANIFEST_NAME,
    Index,
    Manifest,
    Shard,
    decode_sample,
    extensions,
    index_content,
    parse_index,
    read_manifest,
    shards_by_name,
)
from pipeline.shards.ledger import (
    LEDGER_NAME,
    OK,
    LedgerRow,
    ShardFacts,
    Totals,
    read_facts,
    read_record,
    read_row_group,
)
from pipeline.shards.make import Connect, Progress, Show
from pipeline.shards.manifest import differences, make_manifest
from pipeline.shards.output import read_fingerprint
from pipeline.shards.plan import ShardTask, location_of, shard_tasks
from pipeline.tasks import Failure, run_tasks

Members = dict[str, bytes]  # by extension
Keyed = tuple[str, Members]


@dataclass(frozen=True, kw_only=True)
class ShardCheck:
    """The result of checking one shard. problems: a line each. facts, totals: of its record."""

    problems: tuple[str, ...]
    facts: ShardFacts | None = None
    totals: Totals | None = None


@dataclass(kw_only=True)
class Verification:
    """The result of checking a set. fingerprint: of its plan.json. shards: results by name.
    problems: of other files, by name."""

    output: str
    manifest: Manifest
    fingerprint: dict[str, Any]
    tasks: tuple[ShardTask, ...]
    shards: dict[str, ShardCheck] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def damaged(self) -> list[ShardTask]:
        """Shards with problems, in order."""
        return [task for task in self.tasks if self.shards[task.name].problems]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.damaged


def verify(output: str, workers: int | None, show: Show, connect: Connect) -> Verification:
    """Check every file of the set at location `output`, each shard in a Ray task. Raises UserError
    where no finished set lies there, or its plan.json cannot be read."""
    output = location_of(output)
    manifest, fingerprint = read_manifest(output), read_fingerprint(output)
    tasks = shard_tasks(fingerprint["images"], fingerprint["configuration"]["samples_per_shard"])
    result = Verification(
        output=output, manifest=manifest, fingerprint=fingerprint, tasks=tuple(tasks)
    )
    connect()
    if problem := _ledger_problem(output, manifest):
        result.problems[LEDGER_NAME] = problem
    result.shards = _check_shards(result, workers, show)
    if not result.damaged:
        names = differences(manifest, _manifest_of_records(result))
        if names:
            result.problems[MANIFEST_NAME] = f"{', '.join(names)}: not what the records give"
    return result


def _ledger_problem(output: str, manifest: Manifest) -> str | None:
    location = storage.join(output, LEDGER_NAME)

    def read() -> str:
        digest = hashlib.sha256()
        for piece in storage.chunks(location):
            digest.update(piece)
        return digest.hexdigest()

    try:
        sha256 = storage.attempt(location, read)
    except storage.MissingError:
        return "is missing"
    return None if sha256 == manifest.ledger else f"its SHA-256 is not the one in {MANIFEST_NAME}"


def _check_shards(result: Verification, workers: int | None, show: Show) -> dict[str, ShardCheck]:
    progress = Progress(total=sum(task.rows for task in result.tasks), resumed=0)
    recorded = shards_by_name(result.manifest)
    groups = {task.name: group for group, task in enumerate(result.tasks)}
    small = replace(result.manifest, splits={})  # the whole manifest would travel with each task

    def arguments(task: ShardTask) -> tuple:
        group = None if LEDGER_NAME in result.problems else groups[task.name]
        return task, result.output, recorded.get(f"{task.name}.tar"), small, group

    checks = {}
    tick = progress.ticking(show)
    for task, check in run_tasks(check_shard, result.tasks, arguments, workers, tick=tick):
        if isinstance(check, Failure):
            check = ShardCheck(problems=(f"could not be checked: {check.reason}",))
        checks[task.name] = check
        progress.done += task.rows
        progress.failed_shards += bool(check.problems)
    return checks


def check_shard(
    task: ShardTask, output: str, recorded: Shard | None, manifest: Manifest, group: int | None
) -> ShardCheck:
    """Check one shard, its index and its record. recorded: the manifest's entry, or None. group:
    its row group in the ledger, None where the ledger is damaged."""
    record = task.record(output)
    try:
        facts, table = read_facts(record), read_record(record)
    except storage.UnreachableError:
        raise
    except UserError as error:
        return ShardCheck(problems=(f"{storage.name(record)}: {error}",))
    if facts.shard != recorded:
        problem = f"{storage.name(record)}: describes another shard than {MANIFEST_NAME}"
        return ShardCheck(problems=(problem,), facts=facts)
    if group is not None and not read_row_group(output, group).equals(table):
        problem = f"{storage.name(record)}: its rows are not those of {LEDGER_NAME}"
        return ShardCheck(problems=(problem,), facts=facts)
    totals = Totals(class_counts=np.zeros(len(manifest.classes), np.int64))
    totals.add(table)
    if recorded is None:
        return ShardCheck(problems=(), facts=facts, totals=totals)
    location = storage.with_suffix(record, ".tar")
    try:
        content = storage.read_bytes(location)
        index = storage.read_bytes(storage.with_suffix(record, ".idx"))
    except storage.MissingError as error:
        return ShardCheck(problems=(str(error),), facts=facts, totals=totals)
    rows = table.filter(pc.field("status") == OK).to_pylist()
    problems = _shard_problems(content, index, recorded, manifest, rows)
    named = tuple(f"{storage.name(location)}: {text}" for text in problems)
    return ShardCheck(problems=named, facts=facts, totals=totals)


def _shard_problems(
    content: bytes, index: bytes, recorded: Shard, manifest: Manifest, rows: list[LedgerRow]
) -> Iterator[str]:
    """Yield what is wrong with a shard or its index, beside the ledger's rows of its samples."""
    if hashlib.sha256(content).hexdigest() != recorded.sha256:
        yield f"its SHA-256 is not the one in {MANIFEST_NAME}"
        return
    try:
        if index != index_content(np.frombuffer(content, np.uint8)):
            yield "its index is not the shard's index"
            return
        samples = _own_samples(content, parse_index(index, manifest), extensions(manifest))
    except ValueError as error:
        yield f"it or its index cannot be read ({error})"
        return
    for own, other, row in zip_longest(samples, _webdataset_samples(content), rows):
        if own is None or other is None or row is None:
            yield f"it has not the ledger's {len(rows)} samples, by our reader or by webdataset"
            return
        if own != other:
            yield f"{own[0]}: webdataset reads other bytes, or another key"
        yield from (f"{own[0]}: {text}" for text in _sample_problems(own, row, manifest))


def _own_samples(content: bytes, index: Index, names: tuple[str, ...]) -> Iterator[Keyed]:
    """Yield key and members of each sample, read as our loader does."""
    for keyed, offsets, sizes in zip(index.names, index.offsets, index.sizes, strict=True):
        members = zip(names, offsets, offsets + sizes, strict=True)
        yield keyed[0].split(".")[0], {name: content[low:high] for name, low, high in members}


def _webdataset_samples(content: bytes) -> Iterator[Keyed]:
    """Yield key and members of each sample as the `webdataset` library reads them."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    files = tar_file_iterator(io.BytesIO(content))
    for sample in group_by_keys({**file, "__url__": ""} for file in files):
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        yield sample["__key__"], members


def _sample_problems(keyed: Keyed, row: LedgerRow, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with a sample, decoded, beside its ledger row."""
    try:
        sample = decode_sample(*keyed, manifest)
    except (KeyError, ValueError) as error:
        yield f"cannot be decoded ({error!r})"
        return
    if (sample.key, sample.row, sample.label) != (row["key"], row["row"], row["label"]):
        yield "its key, row or label is not that of the ledger"
    if sample.image.shape != (manifest.height, manifest.width, 3):
        yield f"its image has shape {sample.image.shape}"
    pixels = np.bincount(sample.segments.ravel())  # of each superpixel
    if len(pixels) != row["superpixels"] or not pixels.all():
        yield f"it has other superpixels than the ledger's 0 to {row['superpixels'] - 1}"
    if sample.meta != {name: row[name] for name in sample.meta}:
        yield "its json is not that of the ledger"


def _manifest_of_records(result: Verification) -> Manifest:
    """Make the manifest that the records give, with the recorded one's classes and source."""
    facts: dict[str, list[ShardFacts]] = {split: [] for split in result.fingerprint["images"]}
    classes = np.zeros(len(result.manifest.classes), np.int64)
    totals = {split: Totals(class_counts=classes) for split in facts}
    for task in result.tasks:
        check = result.shards[task.name]
        assert check.facts is not None
        assert check.totals is not None
        facts[task.split].append(check.facts)
        totals[task.split].merge(check.totals)
    recorded, source = result.manifest, result.manifest.configuration["source"]
    return make_manifest(recorded, source, result.fingerprint, facts, totals, recorded.ledger)
