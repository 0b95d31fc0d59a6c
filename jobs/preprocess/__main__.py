"""`python -m jobs.preprocess`: a collection of images becomes a set of shards; sets are checked."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jobs import cli
from jobs.cli import option
from jobs.preprocess.preview import write_previews
from pipeline.errors import UserError
from pipeline.shards.make import Outcome, Progress, preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.shards.verify import Verification, repair, verify

DESCRIPTION = (
    "Turn a collection of images into shards (--source, --output), check finished ones "
    "(--verify --output), or make damaged ones again (--repair --output)."
)
NAMED_PROBLEMS = 50


@dataclass(frozen=True, kw_only=True)
class JobConfig(PreprocessConfig):
    """What to make, or which set to check."""

    source: str = option(
        "",
        help="folder or URI of the images; --verify needs none, and --repair finds it in the set",
    )
    verify: bool = option(
        False,
        help="check the set in --output: every shard against its SHA-256, index, ledger and "
        "decoded samples; prints a table, and exits with 1 naming what is wrong",
    )
    repair: bool = option(
        False,
        help="check the set in --output and make again, in place, only what is wrong with it",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.source or self.verify or self.repair):
            raise ValueError("--source is missing: name the folder that holds the images")
        if self.verify and self.repair:
            raise ValueError("--repair verifies too; give one of --verify and --repair")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job with command-line flags (`--help` lists them)."""
    config = cli.parse(JobConfig, argv, DESCRIPTION)
    if config.verify or config.repair:
        check(config)
        return
    values = {field.name: getattr(config, field.name) for field in fields(PreprocessConfig)}
    outcome = preprocess(PreprocessConfig(**values), printer(making), cli.connect_ray)
    pages = write_previews(outcome.output, outcome.manifest)
    if outcome.totals is None and not pages:
        print(f"{outcome.output} was finished before: {_counts(outcome)}. Nothing to do.")
        return
    if outcome.totals is not None:
        print(summary(outcome))
    print(f"{outcome.output}: {_counts(outcome)}; look at {', '.join(pages)}")


def printer(note: Callable[[Progress], str]) -> Callable[[Progress], None]:
    """Return a printer of progress on standard output, with a note for each line."""
    line = cli.ProgressPrinter(in_place=sys.stdout.isatty())

    def show(progress: Progress) -> None:
        line.show(
            progress.resumed + progress.done,
            progress.total,
            resumed=progress.resumed,
            note=note(progress),
            seconds=progress.seconds,
        )

    return show


def making(progress: Progress) -> str:
    """Return the note of a line while shards are made."""
    return f"{progress.rejected} rejected{_shards(progress.failed_shards, 'failed')}"


def checking(progress: Progress) -> str:
    """Return the note of a line while shards are verified."""
    return f"checked{_shards(progress.failed_shards, 'damaged')}"


def _shards(count: int, verb: str) -> str:
    if not count:
        return ""
    return f", {count} {'shard' if count == 1 else 'shards'} {verb}"


def check(config: JobConfig) -> None:
    """Verify the set, with --repair mend it, and print what was found.

    Raises UserError, naming what is wrong, where the set is not sound in the end.
    """
    found = verify(config.output, config.workers, printer(checking), cli.connect_ray)
    _check_flags(config, found.fingerprint["configuration"])
    print(verification_table(found))
    for name in found.unknown:
        print(f"not part of the set: {name}")
    if config.repair and not found.is_sound:
        for line in problem_lines(found):
            print(line)
        print("making these again", flush=True)
        repair(found, config.source, config.workers, printer(making))
        print(verification_table(found))
    if config.repair:
        write_previews(found.output, found.manifest)
    if not found.is_sound:
        for line in problem_lines(found):
            print(line)
        wrong = [*found.problems, *(task.name for task in found.damaged)]
        remedy = "" if config.repair else "; --repair makes these again"
        raise UserError(f"{found.output} is damaged: {', '.join(wrong)}{remedy}.")
    print(f"{found.output} is sound.")


def _check_flags(config: JobConfig, there: dict[str, Any]) -> None:
    for field in fields(PreprocessConfig):
        value = getattr(config, field.name)
        if field.name in there and value not in (field.default, there[field.name]):
            raise UserError(
                f"--{field.name.replace('_', '-')} {value}: the set in {config.output} was made "
                f"with {there[field.name]}; leave the flag out."
            )


def verification_table(found: Verification) -> str:
    """What was checked, by split."""
    rows = []
    for split in found.fingerprint["images"]:
        checks = [found.shards[task.name] for task in found.tasks if task.split == split]
        rows.append(
            [
                split,
                str(sum(check.facts.images for check in checks if check.facts)),
                str(sum(check.totals.rejected for check in checks if check.totals)),
                str(len(checks)),
                str(sum(bool(check.problems) for check in checks)),
                f"{sum(check.bytes for check in checks) / 1e6:.1f}",
                str(sum(check.decoded for check in checks)),
            ]
        )
    headers = ["split", "images", "rejected", "shards", "damaged", "MB hashed", "decoded"]
    return cli.table(headers, rows)


def problem_lines(found: Verification) -> list[str]:
    """A line for each thing that is wrong, the first NAMED_PROBLEMS of them."""
    lines = [f"{name}: {text}" for name, text in found.problems.items()]
    lines += [line for task in found.damaged for line in found.shards[task.name].problems]
    if len(lines) > NAMED_PROBLEMS:
        lines[NAMED_PROBLEMS:] = [f"and {len(lines) - NAMED_PROBLEMS} more"]
    return lines


def summary(outcome: Outcome) -> str:
    """A table with a row per split; seconds are those of this run's tasks, added up."""
    rows = []
    for split, total in (outcome.totals or {}).items():
        entry = outcome.manifest.splits[split]
        reasons = ", ".join(f"{count} {reason}" for reason, count in total.reasons.most_common())
        rows.append(
            [
                split,
                str(entry.images),
                f"{entry.rejected} ({reasons})" if reasons else "0",
                str(len(entry.shards)),
                f"{sum(shard.bytes for shard in entry.shards) / 1e6:.1f}",
                f"{total.superpixels / max(1, entry.images):.1f}",
                f"{outcome.progress.task_seconds[split]:.1f}",
            ]
        )
    headers = ["split", "images", "rejected", "shards", "MB", "superpixels", "task seconds"]
    return cli.table(headers, rows)


def _counts(outcome: Outcome) -> str:
    splits = outcome.manifest.splits.items()
    counts = ", ".join(f"{entry.images} {split} images" for split, entry in splits)
    return f"{counts} in {len(outcome.manifest.classes)} classes"


if __name__ == "__main__":
    cli.run(main)
