"""Whether a finished set is what it says it is, and making again only what is not.

The manifest is the anchor: it holds the hash of every shard and of the ledger. Each shard is held
against it, and its index and ledger part against the shard and the ledger.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards.format import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    decode_sample,
    index_content,
    index_samples,
    manifest_to_json,
    read_manifest,
)
from pipeline.shards.ledger import (
    LEDGER_NAME,
    OK,
    REJECTED,
    ShardFacts,
    Totals,
    merge_parts,
    read_facts,
    read_part,
)
from pipeline.shards.make import Progress, file_sizes, make_manifest, make_shards
from pipeline.shards.plan import (
    PLAN_NAME,
    PreprocessConfig,
    ShardTask,
    alone_at,
    claim_output,
    make_plan,
    place_of,
    read_fingerprint,
    shard_tasks,
)
from pipeline.tasks import Failure, run_tasks

DECODED = 8  # samples of each shard that are decoded: first, last and even steps between


@dataclass(frozen=True, kw_only=True)
class ShardCheck:
    """What a task found of one shard. problems: one line each, none where all is well; facts,
    totals: what its part says, None where it cannot be read; bytes: read and hashed; decoded:
    number of samples."""

    problems: tuple[str, ...]
    facts: ShardFacts | None = None
    totals: Totals | None = None
    bytes: int = 0
    decoded: int = 0


@dataclass(kw_only=True)
class Verification:
    """What is known of a set. fingerprint: content of its plan.json; shards: what was found of
    each, by name; problems: of the files that tell of the whole set, by file name; unknown: files
    that do not belong to the set, which harm nobody."""

    output: str
    manifest: Manifest
    fingerprint: dict[str, Any]
    tasks: tuple[ShardTask, ...]
    shards: dict[str, ShardCheck] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @property
    def damaged(self) -> list[ShardTask]:
        """Shards with problems, in order."""
        return [task for task in self.tasks if self.shards[task.name].problems]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.damaged


def verify(
    output: str,
    workers: int | None,
    show: Callable[[Progress], None],
    connect: Callable[[], None],
) -> Verification:
    """Check every file of the set at place `output`: each shard in a Ray task against its hash, its
    index, its ledger part and decoded samples; then manifest and ledger against all parts.

    Raises UserError where no finished set lies there, or its plan.json cannot be read.
    """
    output = place_of(output)
    manifest, fingerprint = read_manifest(output), read_fingerprint(output)
    counts = {split: fingerprint["images"][split] for split in fingerprint["images"]}
    tasks = tuple(shard_tasks(counts, fingerprint["configuration"]["samples_per_shard"]))
    found = Verification(output=output, manifest=manifest, fingerprint=fingerprint, tasks=tasks)
    connect()
    _check_ledger(found)
    _check_shards(found, tasks, workers, show)
    _check_manifest(found)
    found.unknown = _unknown_files(found)
    return found


def repair(
    found: Verification,
    source: str,
    workers: int | None,
    show: Callable[[Progress], None],
) -> None:
    """Make again in place what `found` names, and check that again: afterwards `found` tells of the
    mended set. Files that are sound are not written.

    source: place of the images, the manifest's if empty; needed for damaged shards alone. Raises
    UserError where the source has changed since the set was made: no hash in the manifest changes.
    """
    with alone_at(found.output):
        if found.damaged:
            damaged = found.damaged
            _make_again(found, damaged, source, workers, show)
            _check_shards(found, damaged, workers, lambda _: None)
        if LEDGER_NAME in found.problems and not found.damaged:
            _merge_again(found)
        _check_manifest(found)
        if (
            MANIFEST_NAME in found.problems
            and not found.damaged
            and LEDGER_NAME not in found.problems
        ):
            content = manifest_to_json(_manifest_of_parts(found)).encode()
            storage.write_atomically(storage.join(found.output, MANIFEST_NAME), content)
            found.manifest = read_manifest(found.output)
            _check_manifest(found)


def _make_again(
    found: Verification,
    damaged: list[ShardTask],
    source: str,
    workers: int | None,
    show: Callable[[Progress], None],
) -> None:
    recorded = found.manifest.configuration
    config = PreprocessConfig(
        source=source or recorded["source"],
        output=found.output,
        layout=recorded["layout"],
        workers=workers,
        **found.fingerprint["configuration"],
    )
    plan = make_plan(config)
    claim_output(plan)
    progress = Progress(total=sum(task.rows for task in damaged), resumed=0)
    made = make_shards(plan, damaged, config, progress, show)
    differing = [task.name for task in damaged if made[task.name].shard != _recorded(found, task)]
    if differing:
        raise UserError(
            f"{', '.join(differing)}: made again, they are not what {MANIFEST_NAME} records. The "
            f"images in {config.source} have changed since, or {MANIFEST_NAME} has: mend either, "
            f"or delete {storage.join(found.output, MANIFEST_NAME)} and run jobs.preprocess "
            "without --repair to take the set as it is now."
        )


def _merge_again(found: Verification) -> None:
    """Write the ledger anew, but only where the parts give what the manifest records."""
    parts = [task.part(found.output) for task in found.tasks]
    splits, classes = list(found.fingerprint["images"]), len(found.manifest.classes)
    _, sha256 = merge_parts(parts, found.output, splits, classes)
    if sha256 == found.manifest.ledger:
        del found.problems[LEDGER_NAME]
    else:
        found.problems[LEDGER_NAME] = (
            f"the parts together give another one than {MANIFEST_NAME} says"
        )


def _recorded(found: Verification, task: ShardTask) -> Shard | None:
    split = found.manifest.splits.get(task.split)
    shards = {shard.name: shard for shard in split.shards} if split else {}
    return shards.get(f"{task.name}.tar")


def _check_ledger(found: Verification) -> None:
    place = storage.join(found.output, LEDGER_NAME)
    digest = hashlib.sha256()

    def read() -> None:
        nonlocal digest
        digest = hashlib.sha256()
        for piece in storage.chunks(place):
            digest.update(piece)

    try:
        storage.attempt(place, read)
    except storage.MissingError:
        found.problems[LEDGER_NAME] = "is missing"
        return
    if digest.hexdigest() != found.manifest.ledger:
        found.problems[LEDGER_NAME] = f"its SHA-256 is not the one in {MANIFEST_NAME}"


def _check_shards(
    found: Verification,
    tasks: Iterable[ShardTask],
    workers: int | None,
    show: Callable[[Progress], None],
) -> None:
    tasks = list(tasks)
    progress = Progress(total=sum(task.rows for task in tasks), resumed=0)
    recorded = {
        shard.name: shard for split in found.manifest.splits.values() for shard in split.shards
    }
    groups = {task.name: group for group, task in enumerate(found.tasks)}
    small = replace(found.manifest, splits={})  # the whole manifest would travel with each task

    def arguments(task: ShardTask) -> tuple:
        group = None if LEDGER_NAME in found.problems else groups[task.name]
        return task, found.output, recorded.get(f"{task.name}.tar"), small, group

    tick = progress.ticking(show)
    for task, result in run_tasks(check_shard, tasks, arguments, workers, tick=tick):
        if isinstance(result, Failure):
            result = ShardCheck(problems=(f"could not be checked: {result.reason}",))
        found.shards[task.name] = result
        progress.done += task.rows
        progress.failed_shards += bool(result.problems)


def check_shard(
    task: ShardTask, output: str, recorded: Shard | None, manifest: Manifest, group: int | None
) -> ShardCheck:
    """Check one shard, its index and its part. Needs no Ray.

    recorded: the manifest's entry, None where it has none. group: the shard's row group in the
    ledger, None where the ledger is damaged and says nothing.
    """
    part = task.part(output)
    try:
        facts, table = read_facts(part), read_part(part)
    except storage.UnreachableError:
        raise
    except UserError as error:
        return ShardCheck(problems=(f"{storage.name(part)}: {error}",))
    problems = [f"{storage.name(part)}: {text}" for text in _part_problems(task, table)]
    if facts.shard != recorded:
        problems.append(f"{storage.name(part)}: tells of another shard than {MANIFEST_NAME}")
    if group is not None and not _ledger_group(output, group).equals(table):
        problems.append(f"{storage.name(part)}: its rows are not those of {LEDGER_NAME}")
    totals = Totals.of_none(len(manifest.classes))
    if problems or recorded is None:  # the shard can be held against nothing, or there is none
        if not problems:
            totals.add(table)
        return ShardCheck(problems=tuple(problems), facts=facts, totals=totals)
    totals.add(table)
    accepted = table.filter(pc.field("status") == OK)
    try:
        content = _read(storage.with_suffix(part, ".tar"))
        index = _read(storage.with_suffix(part, ".idx")).tobytes()
    except storage.MissingError as error:
        return ShardCheck(problems=(str(error),), facts=facts, totals=totals)
    decoded = 0
    if (
        len(content) != recorded.bytes
        or hashlib.sha256(content.data).hexdigest() != recorded.sha256
    ):
        problems.append(f"{recorded.name}: its SHA-256 is not the one in {MANIFEST_NAME}")
    elif index != _index_of(content):
        problems.append(f"{storage.with_suffix(recorded.name, '.idx')}: is not the shard's index")
    else:
        samples = _Samples(content, index_samples(index), manifest)
        problems += [f"{recorded.name}: {text}" for text in samples.problems(accepted)]
        decoded = len(samples.chosen)
    return ShardCheck(
        problems=tuple(problems),
        facts=facts,
        totals=totals,
        bytes=len(content),
        decoded=decoded,
    )


def _read(place: str) -> np.ndarray:
    """A file's bytes, uint8 [N]: mapped where it is local."""
    if storage.is_remote(place):
        return np.frombuffer(storage.read_bytes(place), np.uint8)
    path = storage.local_path(place)
    if not path.is_file():
        raise storage.MissingError(f"{path.name}: is missing")
    return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)


def _index_of(content: np.ndarray) -> bytes | None:
    try:
        return index_content(content)
    except ValueError:
        return None


def _ledger_group(output: str, group: int) -> pa.Table:
    place = storage.join(output, LEDGER_NAME)

    def read() -> pa.Table:
        with storage.open_input(place) as file:
            return pq.ParquetFile(file).read_row_group(group)

    return storage.attempt(place, read)


def _part_problems(task: ShardTask, table: pa.Table) -> Iterator[str]:
    """What is wrong with a part's rows by themselves."""
    rows = range(task.first_row, task.first_row + task.rows)
    if table["row"].to_pylist() != list(rows):
        yield f"its rows are not {rows.start} to {rows.stop - 1}"
        return
    if table["key"].to_pylist() != [f"{task.split}-{row:08d}" for row in rows]:
        yield "its keys are not those of its rows"
    status = table["status"].to_pylist()
    if set(status) - {OK, REJECTED}:
        yield f"it has a status besides {OK} and {REJECTED}"
    accepted = table.filter(pc.field("status") == OK)
    if accepted["position"].to_pylist() != list(range(accepted.num_rows)):
        yield "its samples' positions are not in order"
    if table.filter(pc.field("status") == REJECTED)["reason"].null_count:
        yield "an image was rejected without a reason"


class _Samples:
    """Check the samples of a shard whose hash and index are right against ledger and manifest."""

    def __init__(
        self, content: np.ndarray, extents: list[dict[str, tuple[int, int]]], manifest: Manifest
    ) -> None:
        self.content, self.extents, self.manifest = content, extents, manifest
        steps = np.linspace(0, len(extents) - 1, DECODED).round().astype(int)
        self.chosen = sorted(set(steps.tolist()))

    def problems(self, accepted: pa.Table) -> Iterator[str]:
        """What is wrong, where `accepted` are the ledger's rows of the samples."""
        if len(self.extents) != accepted.num_rows:
            yield f"it has {len(self.extents)} samples, the ledger {accepted.num_rows}"
            return
        for name, column in (("row", "row"), ("cls", "label")):
            numbers = [
                int.from_bytes(self._member(i, name), "little", signed=True)
                for i in range(len(self.extents))
            ]
            if numbers != accepted[column].to_pylist():
                yield f"its samples' {name} is not the ledger's {column}"
        for position, entry in zip(
            self.chosen, accepted.take(self.chosen).to_pylist(), strict=True
        ):
            yield from (f"{entry['key']}: {text}" for text in self._decoded(position, entry))

    def _member(self, position: int, name: str) -> bytes:
        start, size = self.extents[position][name]
        return self.content[start : start + size].tobytes()

    def _decoded(self, position: int, entry: dict[str, Any]) -> Iterator[str]:
        members = {name: self._member(position, name) for name in self.extents[position]}
        try:
            sample = decode_sample(entry["key"], members, self.manifest)
        except (KeyError, ValueError) as error:
            yield f"cannot be decoded ({error!r})"
            return
        if sample.image.shape != (self.manifest.height, self.manifest.width, 3):
            yield f"its image has shape {sample.image.shape}"
        labels = np.unique(sample.segments)
        if len(labels) != entry["superpixels"] or labels[-1] + 1 != len(labels):
            yield f"it has {len(labels)} superpixels, the ledger {entry['superpixels']}"
        if sample.meta != {name: entry[name] for name in sample.meta}:
            yield "its json is not what the ledger says"


def _manifest_of_parts(found: Verification) -> Manifest:
    """The manifest that the parts give, with the recorded one's classes and source."""
    facts: dict[str, list[ShardFacts]] = {split: [] for split in found.fingerprint["images"]}
    totals = {split: Totals.of_none(len(found.manifest.classes)) for split in facts}
    for task in found.tasks:
        check = found.shards[task.name]
        assert check.facts is not None
        assert check.totals is not None
        facts[task.split].append(check.facts)
        totals[task.split].merge(check.totals)
    return make_manifest(
        classes=found.manifest.classes,
        class_names=found.manifest.class_names,
        source=found.manifest.configuration["source"],
        fingerprint=found.fingerprint,
        facts=facts,
        totals=totals,
        ledger=found.manifest.ledger,
    )


def _check_manifest(found: Verification) -> None:
    """Hold the manifest against all parts, where those are sound."""
    found.problems.pop(MANIFEST_NAME, None)
    if found.damaged:
        return
    there, made = asdict(found.manifest), asdict(_manifest_of_parts(found))
    differing = [name for name in made if there[name] != made[name]]
    if differing:
        found.problems[MANIFEST_NAME] = (
            f"{', '.join(differing)}: not what {PLAN_NAME} and the parts of the ledger give"
        )


def _unknown_files(found: Verification) -> list[str]:
    """Files in the folders of the splits that the set does not account for."""
    known = {"preview.html"}
    for task in found.tasks:
        known |= {f"{task.name}{suffix}" for suffix in (".parquet", ".tar", ".idx")}
    sizes = file_sizes(found.output, found.tasks)
    return sorted(
        f"{split}/{name}" for split, names in sizes.items() for name in names if name not in known
    )
