"""From a collection of images to a set of shards: plan, make each shard in a Ray task, finish. The
bytes depend on source, parameters and seed alone. Running it again resumes, or repairs a finished
set: files that are missing are made again, and must be what its manifest records."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ray.util import metrics

from pipeline import storage
from pipeline.ahead import run_ahead
from pipeline.errors import UserError
from pipeline.shards.format import (
    MANIFEST_NAME,
    Manifest,
    manifest_to_json,
    read_manifest,
    shards_by_name,
)
from pipeline.shards.ledger import (
    LEDGER_NAME,
    READ_AHEAD,
    ShardFacts,
    Totals,
    committed_facts,
    merge_records,
)
from pipeline.shards.manifest import differences, make_manifest
from pipeline.shards.output import check_claim, claim_output, exclusive_output
from pipeline.shards.plan import Plan, PreprocessConfig, ShardTask, make_plan
from pipeline.shards.shard import make_shard
from pipeline.tasks import Failure, run_tasks

MOST_FAILURES = 3  # named in the error of a job some of whose shards failed


@dataclass(kw_only=True)
class Progress:
    """Counts of images. unread: the source's files that are none of them; resumed: in shards that
    were finished before; done, rejected: in this run's; failed_shards: this run's that failed for
    good; seconds: since its first task."""

    total: int
    resumed: int
    unread: int = 0
    done: int = 0
    rejected: int = 0
    failed_shards: int = 0
    seconds: float = 0.0

    def ticking(self, show: Callable[["Progress"], None]) -> Callable[[], None]:
        """Return a callback that updates `seconds`, counted from now, and calls `show`."""
        started = time.monotonic()

        def tick() -> None:
            self.seconds = time.monotonic() - started
            show(self)

        return tick


Show = Callable[[Progress], None]
Connect = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished set. totals: by split, None where it was finished before this run."""

    output: str
    manifest: Manifest
    totals: dict[str, Totals] | None
    progress: Progress


def preprocess(config: PreprocessConfig, show: Show, connect: Connect) -> Outcome:
    """Make the set of shards that `config` asks for, or what is missing of it. `show` is called
    about every second; `connect`, which must leave Ray initialized, only where there is something
    to make. Raises UserError."""
    plan = make_plan(config)
    claim_output(plan)
    with exclusive_output(plan.output):
        facts = finished_shards(plan.output, plan.tasks)
        try:
            manifest: Manifest | None = read_manifest(plan.output)
        except storage.UnreachableError:
            raise
        except UserError:  # there is none, or it must be made again
            manifest = None
        recorded = shards_by_name(manifest) if manifest else {}
        if manifest:  # a shard that is not the recorded one was made of another source
            facts = {name: x for name, x in facts.items() if x.shard == recorded.get(f"{name}.tar")}
        pending = [task for task in plan.tasks if task.name not in facts]
        total = sum(task.rows for task in plan.tasks)
        if not pending and manifest and storage.is_file(storage.join(plan.output, LEDGER_NAME)):
            progress = Progress(total=total, resumed=total)
            return Outcome(output=plan.output, manifest=manifest, totals=None, progress=progress)
        if not pending and not manifest:  # refused for rejected images, perhaps repaired by now
            rejected = {task.name: task.rows - facts[task.name].images for task in plan.tasks}
            if _too_many(sum(rejected.values()), total, config):
                pending = [task for task in plan.tasks if rejected[task.name]]
        resumed = total - sum(task.rows for task in pending)
        unread = sum(x["files"] for x in plan.collection.unread.values())
        progress = Progress(total=total, resumed=resumed, unread=unread)
        if pending:
            connect()
            facts |= make_shards(plan, pending, config, progress, show)
        if manifest:
            names = [task.name for task in pending]
            changed = [x for x in names if facts[x].shard != recorded.get(f"{x}.tar")]
            if changed:
                raise _changed(plan, ", ".join(changed))
        return _finish(plan, facts, config, progress, manifest)


def file_sizes(output: str, tasks: Iterable[ShardTask]) -> dict[str, dict[str, int]]:
    """Return the sizes of the files beside these shards, by split and name."""
    splits = {task.split for task in tasks}
    return {split: storage.entries(storage.join(output, split))[1] for split in splits}


def finished_shards(output: str, tasks: Sequence[ShardTask]) -> dict[str, ShardFacts]:
    """Return the facts of those shards that are finished, by the shard's name."""
    sizes = file_sizes(output, tasks)

    def read(task: ShardTask) -> ShardFacts | None:
        return committed_facts(task.record(output), sizes[task.split])

    results = run_ahead(read, tasks, threads=READ_AHEAD, depth=READ_AHEAD)
    return {task.name: facts for task, facts in zip(tasks, results, strict=True) if facts}


def _too_many(rejected: int, total: int, config: PreprocessConfig) -> bool:
    return rejected > config.max_bad_share * total or rejected == total


def make_shards(
    plan: Plan, pending: list[ShardTask], config: PreprocessConfig, progress: Progress, show: Show
) -> dict[str, ShardFacts]:
    """Make these shards in Ray tasks; return their facts. Raises UserError last, if some failed."""
    sizes = file_sizes(plan.output, pending)
    for task in pending:
        if f"{task.name}.parquet" in sizes[task.split]:
            storage.remove(task.record(plan.output))  # not right: unfinished from here on
    count = _metrics(pending)
    facts: dict[str, ShardFacts] = {}
    failures: dict[str, str] = {}

    def arguments(task: ShardTask) -> tuple:
        return task, plan.images(task), plan.source, plan.output, config

    tick = progress.ticking(show)
    for task, result in run_tasks(make_shard, pending, arguments, config.workers, tick=tick):
        if isinstance(result, Failure):
            failures[task.name] = result.reason
        elif not storage.is_remote(plan.output) and not storage.is_file(task.record(plan.output)):
            failures[task.name] = (
                "it was made on another node, and its files are not visible here; the output must "
                "lie on storage that all nodes share"
            )
        else:
            facts[task.name] = result
            rejected = task.rows - result.images
            progress.done += task.rows
            progress.rejected += rejected
            count(task.rows, rejected)
        progress.failed_shards = len(failures)
    if failures:
        named = sorted(failures.items())[:MOST_FAILURES]
        reasons = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in named)
        more = f"; and {len(failures) - len(named)} more" if len(failures) > len(named) else ""
        raise UserError(
            f"{len(failures)} of {len(plan.tasks)} shards failed, {reasons}{more}. The others are "
            "finished; the same command tries only these again."
        )
    return facts


def _metrics(pending: list[ShardTask]) -> Callable[[int, int], None]:
    """Return a function that adds a shard's images and rejected ones to Ray's dashboard."""
    names = {"images": "source images read", "rejected": "of them rejected", "shards": "written"}
    counters = [
        metrics.Counter(f"preprocess_{name}", f"preprocessing: {name} {text}")
        for name, text in names.items()
    ]
    gauge = metrics.Gauge("preprocess_images_to_do", "preprocessing: images not yet read")
    left = sum(task.rows for task in pending)
    gauge.set(left)

    def count(images: int, rejected: int) -> None:
        nonlocal left
        for counter, number in zip(counters, (images, rejected, 1), strict=True):
            if number:
                counter.inc(number)
        left -= images
        gauge.set(left)

    return count


def _changed(plan: Plan, names: str) -> UserError:
    location = storage.join(plan.output, MANIFEST_NAME)
    return UserError(
        f"{names} of {plan.output}: made again, it is not what {MANIFEST_NAME} records. The images "
        f"in {plan.source} have changed since, or {MANIFEST_NAME} has: restore either, or delete "
        f"{location} and preprocess again to take the set as it is now."
    )


def _finish(
    plan: Plan,
    facts: Mapping[str, ShardFacts],
    config: PreprocessConfig,
    progress: Progress,
    recorded: Manifest | None,
) -> Outcome:
    """Merge the ledger, check the share of rejected images, and write the manifest. recorded: the
    manifest of a set that was finished before, which stays as it is."""
    check_claim(plan)
    records = [task.record(plan.output) for task in plan.tasks]
    splits, classes = list(plan.collection.images), len(plan.collection.classes)
    totals, ledger = merge_records(records, plan.output, splits, classes)
    rejected = sum(total.rejected for total in totals.values())
    if _too_many(rejected, progress.total, config):
        reasons = sum((total.reasons for total in totals.values()), Counter[str]())
        common = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise UserError(
            f"{rejected} of {progress.total} images were rejected ({common}), more than the share "
            f"of {config.max_bad_share} that is allowed; {storage.join(plan.output, LEDGER_NAME)} "
            "names them all. Repair the source and run the same command, which makes the shards "
            "with rejected images again, or allow more."
        )
    in_order = {x: [facts[task.name] for task in plan.tasks if task.split == x] for x in splits}
    source = recorded.configuration["source"] if recorded else plan.source
    collection = recorded or plan.collection
    manifest = make_manifest(collection, source, plan.fingerprint, in_order, totals, ledger)
    if recorded is None:
        content = manifest_to_json(manifest).encode()
        storage.write_atomically(storage.join(plan.output, MANIFEST_NAME), content)
    elif changed := differences(recorded, manifest):
        raise _changed(plan, ", ".join(changed))
    return Outcome(output=plan.output, manifest=manifest, totals=totals, progress=progress)
