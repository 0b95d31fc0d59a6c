"""From a collection of images to a set of shards: plan, make each shard in a Ray task, finish.

The bytes written depend on the source, the parameters and the seed alone. Whatever ends the job,
the same command goes on from the shards that are there.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from ray.util import metrics

from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards.format import (
    MANIFEST_NAME,
    Manifest,
    Sample,
    Split,
    manifest_to_json,
    pack_shard,
    read_manifest,
    write_shard,
)
from pipeline.shards.images import ImageError, read_image
from pipeline.shards.ledger import (
    LEDGER_NAME,
    OK,
    REJECTED,
    ShardFacts,
    Totals,
    committed_facts,
    merge_parts,
    read_ahead,
    write_part,
)
from pipeline.shards.plan import (
    Plan,
    PreprocessConfig,
    ShardTask,
    alone_at,
    claim_output,
    make_plan,
)
from pipeline.shards.superpixels import label_dtype, superpixels
from pipeline.sources.annotations import fit_boxes
from pipeline.sources.files import SourceFiles
from pipeline.tasks import Failure, run_tasks

NAMED_FAILURES = 3  # in the error of a job some of whose shards failed


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a task returns: what its part says of the shard, images rejected, and how long it took
    in seconds."""

    facts: ShardFacts
    rejected: int
    seconds: float


@dataclass(kw_only=True)
class Progress:
    """Counts of images. resumed: in shards that were there before; done, rejected: in this run's;
    failed_shards: this run's that failed for good; seconds: since its first task; task_seconds:
    added up over tasks, by split."""

    total: int
    resumed: int
    done: int = 0
    rejected: int = 0
    failed_shards: int = 0
    seconds: float = 0.0
    task_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def ticking(self, show: Callable[["Progress"], None]) -> Callable[[], None]:
        """What shows this progress, with the time since now."""
        started = time.monotonic()

        def tick() -> None:
            self.seconds = time.monotonic() - started
            show(self)

        return tick


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished set. totals: by split, None where it was finished before this run."""

    output: str
    manifest: Manifest
    totals: dict[str, Totals] | None
    progress: Progress


def preprocess(
    config: PreprocessConfig, show: Callable[[Progress], None], connect: Callable[[], None]
) -> Outcome:
    """Make the set of shards that `config` asks for, going on where an earlier run stopped.

    `show` is called after each shard and about every second; `connect`, which must leave Ray
    initialized, only where there is something to make. Raises UserError for a source or output
    that cannot be used, for shards that failed repeatedly and for too many rejected images.
    """
    plan = make_plan(config)
    claim_output(plan)
    with alone_at(plan.output):
        return _go_on(plan, config, show, connect)


def _go_on(
    plan: Plan,
    config: PreprocessConfig,
    show: Callable[[Progress], None],
    connect: Callable[[], None],
) -> Outcome:
    facts = finished_shards(plan.output, plan.tasks)
    pending = [task for task in plan.tasks if task.name not in facts]
    total = sum(task.rows for task in plan.tasks)
    manifest = _manifest_there(plan.output)
    if not pending and manifest:
        progress = Progress(total=total, resumed=total)
        return Outcome(output=plan.output, manifest=manifest, totals=None, progress=progress)
    if not pending:  # an earlier run was refused for its rejected images, which may be mended
        rejected = {task.name: task.rows - facts[task.name].images for task in plan.tasks}
        if _too_many(sum(rejected.values()), total, config):
            pending = [task for task in plan.tasks if rejected[task.name]]
    progress = Progress(total=total, resumed=total - sum(task.rows for task in pending))
    if pending:
        connect()
        facts |= make_shards(plan, pending, config, progress, show)
    return _finish(plan, facts, config, progress)


def _manifest_there(output: str) -> Manifest | None:
    """The manifest of a finished set; None where there is none, or a damaged one to write again."""
    try:
        return read_manifest(output)
    except storage.UnreachableError:
        raise
    except UserError:
        return None


def file_sizes(output: str, tasks: Iterable[ShardTask]) -> dict[str, dict[str, int]]:
    """Sizes of the files beside these shards, by split and name, from a listing of each folder."""
    splits = {task.split for task in tasks}
    return {split: storage.file_sizes(storage.join(output, split)) for split in splits}


def finished_shards(output: str, tasks: Sequence[ShardTask]) -> dict[str, ShardFacts]:
    """What the parts of those shards say that are finished, by the shard's name."""
    sizes = file_sizes(output, tasks)
    found = read_ahead(lambda task: committed_facts(task.part(output), sizes[task.split]), tasks)
    return {task.name: facts for task, facts in zip(tasks, found, strict=True) if facts is not None}


def _too_many(rejected: int, total: int, config: PreprocessConfig) -> bool:
    return rejected > config.max_bad_share * total or rejected == total


def make_shard(
    task: ShardTask, images: pa.Table, source: str, output: str, config: PreprocessConfig
) -> ShardReport:
    """Make one shard, of `images`, with its index and ledger part. Needs no Ray; may be repeated
    at will."""
    started = time.monotonic()
    part = task.part(output)
    if not storage.is_remote(output):
        storage.local_path(part).parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    moments = np.zeros((2, 3), np.int64)
    with SourceFiles(source) as files:
        samples = _samples(task, images, files, config, rows, moments)
        packed = pack_shard(samples, config.image_format)
    # Readers of tars dislike empty ones.
    shard = write_shard(storage.with_suffix(part, ".tar"), packed) if packed.images else None
    (r, g, b), (rr, gg, bb) = moments.tolist()
    facts = ShardFacts(
        shard=shard,
        index_bytes=len(packed.index) if shard else 0,
        pixels=packed.images * config.height * config.width,
        sums=(r, g, b),
        squares=(rr, gg, bb),
    )
    write_part(part, rows, facts)
    return ShardReport(
        facts=facts, rejected=len(rows) - packed.images, seconds=time.monotonic() - started
    )


def _samples(
    task: ShardTask,
    images: pa.Table,
    files: SourceFiles,
    config: PreprocessConfig,
    rows: list[dict[str, Any]],
    moments: np.ndarray,
) -> Iterator[Sample]:
    """The task's samples in order. Appends a ledger row for every image to `rows` and adds up their
    pixels in `moments`, see `add_moments`."""
    from pipeline.shards.pixels import add_moments

    position = 0
    listed = images.to_pylist()
    fetched = files.fetch((x["path"], x["offset"], x["size"]) for x in listed)
    pairs = zip(listed, fetched, strict=True)
    for row, (image, fetch) in enumerate(pairs, start=task.first_row):
        entry = {
            "row": row,
            "split": task.split,
            "key": f"{task.split}-{row:08d}",
            **{name: image[name] for name in ("id", "path", "wnid", "label", "note")},
        }
        rows.append(entry)
        try:
            sample = _make_sample(entry, image, fetch, config)
        except ImageError as error:
            entry |= {"status": REJECTED, "reason": str(error)}
            continue
        entry |= {"status": OK, "shard": f"{task.name}.tar", "position": position}
        position += 1
        add_moments(sample.image, moments)
        yield sample


def _make_sample(
    entry: dict[str, Any],
    image: dict[str, Any],
    fetch: Callable[[], bytes],
    config: PreprocessConfig,
) -> Sample:
    """One image's sample, of the bytes that `fetch` gives; its sizes, boxes and notes are added to
    its ledger row."""
    if image["problem"]:
        raise ImageError(image["problem"])
    try:
        data = fetch()
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        # Of the file itself; a failing disk or network must fail the task, not reject its images.
        raise ImageError(f"unreadable file: {error.strerror}") from error
    decoded = read_image(data, config.height, config.width)
    segments = superpixels(decoded.pixels, config.superpixels, config.compactness)
    box_size = (image["box_width"], image["box_height"]) if image["box_width"] else None
    boxes, box_note = fit_boxes(image["boxes"], box_size, decoded.width, decoded.height)
    notes = (decoded.note, image["note"], box_note)
    entry |= {
        "note": "; ".join(note for note in notes if note) or None,
        "width": decoded.width,
        "height": decoded.height,
        "superpixels": int(segments.max()) + 1,
        "boxes": boxes,
    }
    meta = {name: entry[name] for name in ("id", "wnid", "width", "height", "boxes")}
    return Sample(
        key=entry["key"],
        row=entry["row"],
        label=entry["label"],
        image=decoded.pixels,
        segments=segments,
        meta=meta,
    )


def make_shards(
    plan: Plan,
    pending: list[ShardTask],
    config: PreprocessConfig,
    progress: Progress,
    show: Callable[[Progress], None],
) -> dict[str, ShardFacts]:
    """Make these shards in Ray tasks; what their parts say, by name.

    Raises UserError, once all others are made, where some fail.
    """
    sizes = file_sizes(plan.output, pending)
    for task in pending:
        if f"{task.name}.parquet" in sizes[task.split]:
            storage.remove(task.part(plan.output))  # not right: unfinished from here on
    record = _metrics(pending)
    made: dict[str, ShardFacts] = {}
    failures: dict[str, str] = {}

    def arguments(task: ShardTask) -> tuple:
        return task, plan.images(task), plan.source, plan.output, config

    def is_visible(task: ShardTask) -> bool:
        part = task.part(plan.output)
        return storage.is_remote(part) or storage.is_file(part)

    tick = progress.ticking(show)
    for task, result in run_tasks(make_shard, pending, arguments, config.workers, tick=tick):
        if isinstance(result, Failure) or not is_visible(task):
            failures[task.name] = (
                result.reason
                if isinstance(result, Failure)
                else "it was made on another node, and its files are not visible here; --output "
                "must lie on storage that all nodes share"
            )
            progress.failed_shards += 1
            continue
        made[task.name] = result.facts
        progress.done += task.rows
        progress.rejected += result.rejected
        progress.task_seconds[task.split] += result.seconds
        record(task.rows, result.rejected)
    if failures:
        named = sorted(failures.items())[:NAMED_FAILURES]
        listed = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in named)
        more = f"; and {len(failures) - len(named)} more" if len(failures) > len(named) else ""
        raise UserError(
            f"{len(failures)} of {len(plan.tasks)} shards failed, {listed}{more}. The others are "
            "finished; the same command tries only these again."
        )
    return made


def _metrics(pending: list[ShardTask]) -> Callable[[int, int], None]:
    """Counters for Ray's dashboard; what adds a finished shard's images and rejected images."""
    names = {"images": "source images read", "rejected": "of them rejected", "shards": "written"}
    counters = [
        metrics.Counter(f"preprocess_{name}", f"jobs.preprocess: {name} {text}")
        for name, text in names.items()
    ]
    gauge = metrics.Gauge("preprocess_images_to_do", "jobs.preprocess: images not yet read")
    left = sum(task.rows for task in pending)
    gauge.set(left)

    def record(images: int, rejected: int) -> None:
        nonlocal left
        for counter, count in zip(counters, (images, rejected, 1), strict=True):
            if count:
                counter.inc(count)
        left -= images
        gauge.set(left)

    return record


def _finish(
    plan: Plan, facts: Mapping[str, ShardFacts], config: PreprocessConfig, progress: Progress
) -> Outcome:
    """Merge the ledger, check the share of rejected images, write the manifest."""
    parts = [task.part(plan.output) for task in plan.tasks]
    splits, classes = list(plan.listed.images), len(plan.listed.classes)
    totals, ledger = merge_parts(parts, plan.output, splits, classes)
    rejected = sum(total.rejected for total in totals.values())
    if _too_many(rejected, progress.total, config):
        reasons = sum((total.reasons for total in totals.values()), Counter[str]())
        common = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise UserError(
            f"{rejected} of {progress.total} images were rejected ({common}), more than "
            f"--max-bad-share {config.max_bad_share} allows; "
            f"{storage.join(plan.output, LEDGER_NAME)} names them all. Mend the source and run "
            "the same command, which makes the shards with rejected images again, or allow more."
        )
    manifest = make_manifest(
        classes=plan.listed.classes,
        class_names=plan.listed.class_names,
        source=plan.source,
        fingerprint=plan.fingerprint,
        facts={
            split: [facts[task.name] for task in plan.tasks if task.split == split]
            for split in splits
        },
        totals=totals,
        ledger=ledger,
    )
    storage.write_atomically(
        storage.join(plan.output, MANIFEST_NAME), manifest_to_json(manifest).encode()
    )
    return Outcome(output=plan.output, manifest=manifest, totals=totals, progress=progress)


def make_manifest(
    *,
    classes: tuple[str, ...],
    class_names: tuple[str, ...],
    source: str,
    fingerprint: dict[str, Any],
    facts: dict[str, list[ShardFacts]],
    totals: dict[str, Totals],
    ledger: str,
) -> Manifest:
    """Make the manifest of a set. fingerprint: content of plan.json; facts: by split, in the
    order of the shards; ledger: the ledger's hash."""
    config = PreprocessConfig(source=source, output="", **fingerprint["configuration"])
    # The train split comes first; a collection without one is normalized by what it has.
    mean, std = _mean_std(next(iter(facts.values())))
    return Manifest(
        classes=classes,
        class_names=class_names,
        height=config.height,
        width=config.width,
        image_format=config.image_format,
        segments_dtype=str(label_dtype(config.superpixels)),
        max_superpixels=max(total.max_superpixels for total in totals.values()),
        mean=mean,
        std=std,
        splits={
            split: Split(
                images=int(total.class_counts.sum()),
                rejected=total.rejected,
                shards=tuple(fact.shard for fact in facts[split] if fact.shard),
                class_counts=tuple(total.class_counts.tolist()),
            )
            for split, total in totals.items()
        },
        ledger=ledger,
        configuration=fingerprint["configuration"]
        | {"source": source, "layout": fingerprint["layout"]},
        versions=fingerprint["versions"],
    )


def _mean_std(
    facts: list[ShardFacts],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Per-channel mean and deviation in 0..255, exact until the last division: in whole numbers,
    so that the order of the shards cannot matter."""
    pixels = sum(fact.pixels for fact in facts)
    if not pixels:
        raise UserError("no train image was accepted; the ledger names the reasons.")
    means, deviations = [], []
    for channel in range(3):
        total = sum(fact.sums[channel] for fact in facts)
        squares = sum(fact.squares[channel] for fact in facts)
        means.append(total / pixels)
        deviations.append(math.sqrt(pixels * squares - total**2) / pixels)
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])
