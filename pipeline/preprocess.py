"""From a collection of images to a set of shards: plan, make each shard in a Ray task, finish.

The bytes written depend on the source, the parameters and the seed alone. Whatever ends the job,
the same command goes on from the shards that are there.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pipeline.annotations import fit_boxes
from pipeline.files import SourceFiles
from pipeline.images import ImageError, read_image
from pipeline.ledger import (
    LEDGER_NAME,
    OK,
    REJECTED,
    ShardFacts,
    Totals,
    is_committed,
    merge_parts,
    read_facts,
    write_part,
)
from pipeline.plan import Plan, PreprocessConfig, ShardTask, claim_output, make_plan
from pipeline.shards import (
    CARD_NAME,
    Card,
    DataError,
    Sample,
    Split,
    card_to_json,
    read_card,
    write_atomically,
    write_shard,
)
from pipeline.superpixels import label_dtype, superpixels

POLL_SECONDS = 1.0
ATTEMPTS = 4  # at a shard whose worker process is killed


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a task returns: images accepted and rejected, and how long it took in seconds."""

    accepted: int
    rejected: int
    seconds: float


@dataclass(kw_only=True)
class Progress:
    """Counts of images. resumed: in shards that were there before; done, rejected: in this run's;
    seconds: since its first task; task_seconds: added up over tasks, by split."""

    total: int
    resumed: int
    done: int = 0
    rejected: int = 0
    seconds: float = 0.0
    task_seconds: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished set. totals: by split, None where it was finished before this run."""

    output: Path
    card: Card
    totals: dict[str, Totals] | None
    progress: Progress


def preprocess(
    config: PreprocessConfig, show: Callable[[Progress], None], connect: Callable[[], None]
) -> Outcome:
    """Make the set of shards that `config` asks for, going on where an earlier run stopped.

    `show` is called after each shard and about every second; `connect`, which must leave Ray
    initialized, only where there is something to make. Raises DataError for a source or output
    that cannot be used, for shards that failed repeatedly and for too many rejected images.
    """
    plan = make_plan(config)
    claim_output(plan)
    pending = [task for task in plan.tasks if not is_committed(task.part(plan.output))]
    total = sum(task.rows for task in plan.tasks)
    progress = Progress(total=total, resumed=total - sum(task.rows for task in pending))
    if not pending and (plan.output / CARD_NAME).is_file():
        return Outcome(
            output=plan.output, card=read_card(plan.output), totals=None, progress=progress
        )
    if not pending:  # an earlier run was refused for its rejected images, which may be mended
        rejected = {task.name: _rejected(task, plan.output) for task in plan.tasks}
        if _too_many(sum(rejected.values()), total, config):
            pending = [task for task in plan.tasks if rejected[task.name]]
            progress.resumed -= sum(task.rows for task in pending)
    if pending:
        connect()
        _run_tasks(plan, pending, config, progress, show)
    return _finish(plan, config, progress)


def _rejected(task: ShardTask, output: Path) -> int:
    shard = read_facts(task.part(output)).shard
    return task.rows - (shard.images if shard else 0)


def _too_many(rejected: int, total: int, config: PreprocessConfig) -> bool:
    return rejected > config.max_bad_share * total or rejected == total


def make_shard(
    task: ShardTask, images: pa.Table, source: str, output: Path, config: PreprocessConfig
) -> ShardReport:
    """Make one shard, of `images`, with its index and ledger part. Needs no Ray; may be repeated
    at will."""
    started = time.monotonic()
    part = task.part(output)
    part.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    sums = np.zeros((2, 3), np.int64)
    with SourceFiles(source) as files:
        samples = _samples(task, images, files, config, rows, sums)
        first = next(samples, None)
        shard = None
        if first is not None:  # readers of tars dislike empty ones
            samples = itertools.chain([first], samples)
            shard = write_shard(part.with_suffix(".tar"), samples, config.image_format)
    accepted = shard.images if shard else 0
    (r, g, b), (rr, gg, bb) = sums.tolist()
    facts = ShardFacts(
        shard=shard,
        pixels=accepted * config.height * config.width,
        sums=(r, g, b),
        squares=(rr, gg, bb),
    )
    write_part(part, rows, facts)
    return ShardReport(
        accepted=accepted,
        rejected=len(rows) - accepted,
        seconds=time.monotonic() - started,
    )


def _samples(
    task: ShardTask,
    images: pa.Table,
    files: SourceFiles,
    config: PreprocessConfig,
    rows: list[dict[str, Any]],
    sums: np.ndarray,
) -> Iterator[Sample]:
    """The task's samples in order. Appends a ledger row for every image to `rows` and adds the
    pixels and their squares to `sums`, int64 [2, 3]."""
    position = 0
    for row, image in enumerate(images.to_pylist(), start=task.first_row):
        entry = {
            "row": row,
            "split": task.split,
            "key": f"{task.split}-{row:08d}",
            **{name: image[name] for name in ("id", "path", "wnid", "label", "note")},
        }
        rows.append(entry)
        try:
            sample = _make_sample(entry, image, files, config)
        except ImageError as error:
            entry |= {"status": REJECTED, "reason": str(error)}
            continue
        entry |= {"status": OK, "shard": f"{task.name}.tar", "position": position}
        position += 1
        planes = sample.image.reshape(-1, 3).T.astype(np.int64, order="C")  # [3, H*W]
        sums[0] += planes.sum(axis=1)
        sums[1] += np.einsum("ci,ci->c", planes, planes)
        yield sample


def _make_sample(
    entry: dict[str, Any], image: dict[str, Any], files: SourceFiles, config: PreprocessConfig
) -> Sample:
    """One image's sample; its sizes, boxes and notes are added to its ledger row."""
    if image["problem"]:
        raise ImageError(image["problem"])
    try:
        data = files.read(image["path"], image["offset"], image["size"])
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


def _run_tasks(
    plan: Plan,
    pending: list[ShardTask],
    config: PreprocessConfig,
    progress: Progress,
    show: Callable[[Progress], None],
) -> None:
    workers = config.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    remote = ray.remote(max_retries=ATTEMPTS - 1)(make_shard)
    started = time.monotonic()
    waiting, in_flight = iter(pending), dict[ray.ObjectRef, ShardTask]()
    failures: dict[str, str] = {}
    while True:
        for task in itertools.islice(waiting, workers - len(in_flight)):
            images = plan.images(task)
            in_flight[remote.remote(task, images, plan.source, plan.output, config)] = task
        if not in_flight:
            break
        finished, _ = ray.wait(list(in_flight), timeout=POLL_SECONDS)
        for reference in finished:
            task = in_flight.pop(reference)
            try:
                report = ray.get(reference)
            except ray.exceptions.RayError as error:
                failures[task.name] = _reason(error)
                continue
            if not task.part(plan.output).is_file():
                failures[task.name] = (
                    "it was made on another node, and its files are not visible here; --output "
                    "must lie on storage that all nodes share"
                )
                continue
            progress.done += report.accepted + report.rejected
            progress.rejected += report.rejected
            progress.task_seconds[task.split] += report.seconds
        progress.seconds = time.monotonic() - started
        show(progress)
    if failures:
        name, reason = next(iter(failures.items()))
        raise DataError(
            f"{len(failures)} of {len(plan.tasks)} shards failed, the first {name}: {reason}. "
            "The others are finished; the same command tries only these again."
        )


def _reason(error: Exception) -> str:
    """One line of a task's failure: the exception in the task where there was one."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    return f"its worker process ended {ATTEMPTS} times ({str(error).splitlines()[0]})"


def _finish(plan: Plan, config: PreprocessConfig, progress: Progress) -> Outcome:
    """Merge the ledger, check the share of rejected images, write the card."""
    splits = plan.listed.images
    parts = [task.part(plan.output) for task in plan.tasks]
    totals = merge_parts(parts, plan.output, list(splits), len(plan.listed.classes))
    rejected = sum(total.rejected for total in totals.values())
    if _too_many(rejected, progress.total, config):
        reasons = sum((total.reasons for total in totals.values()), Counter[str]())
        common = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise DataError(
            f"{rejected} of {progress.total} images were rejected ({common}), more than "
            f"--max-bad-share {config.max_bad_share} allows; {plan.output / LEDGER_NAME} names "
            "them all. Mend the source and run the same command, which makes the shards with "
            "rejected images again, or allow more."
        )
    card = _card(plan, config, totals)
    write_atomically(plan.output / CARD_NAME, card_to_json(card).encode())
    return Outcome(output=plan.output, card=card, totals=totals, progress=progress)


def _card(plan: Plan, config: PreprocessConfig, totals: dict[str, Totals]) -> Card:
    facts = {
        split: [read_facts(t.part(plan.output)) for t in plan.tasks if t.split == split]
        for split in plan.listed.images
    }
    # The train split comes first; a collection without one is normalized by what it has.
    mean, std = _mean_std(next(iter(facts.values())))
    configuration = plan.fingerprint["configuration"] | {
        "source": plan.source,
        "layout": plan.listed.layout,
    }
    return Card(
        classes=plan.listed.classes,
        class_names=plan.listed.class_names,
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
        configuration=configuration,
        versions=plan.fingerprint["versions"],
    )


def _mean_std(
    facts: list[ShardFacts],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Per-channel mean and deviation in 0..255, exact until the last division: in whole numbers,
    so that the order of the shards cannot matter."""
    pixels = sum(fact.pixels for fact in facts)
    if not pixels:
        raise DataError("no train image was accepted; the ledger names the reasons.")
    means, deviations = [], []
    for channel in range(3):
        total = sum(fact.sums[channel] for fact in facts)
        squares = sum(fact.squares[channel] for fact in facts)
        means.append(total / pixels)
        deviations.append(math.sqrt(pixels * squares - total**2) / pixels)
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])
