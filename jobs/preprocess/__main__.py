"""`python -m jobs.preprocess`: turn a collection of images into shards, or check finished ones."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from jobs import cli
from jobs.cli import option
from pipeline.errors import UserError
from pipeline.shards.format import Manifest
from pipeline.shards.output import PLAN_NAME
from pipeline.shards.plan import PreprocessConfig
from pipeline.storage import absolute, is_remote, join

if TYPE_CHECKING:  # the flags are read without Ray
    from pipeline.shards.make import Outcome, Progress
    from pipeline.shards.verify import Verification

DESCRIPTION = (
    "Turn a collection of images into shards (--source, --output), or check finished ones "
    "(--verify --output)."
)
MOST_LINES = 50  # of problems


@dataclass(frozen=True, kw_only=True)
class JobConfig(PreprocessConfig):
    """What to make, or which set to check."""

    source: str = option("", help="folder, archive, list or URI of the images; --verify needs none")
    verify: bool = option(
        False,
        help="check the set in --output: every shard against its SHA-256, index, ledger and "
        "decoded samples; prints a table, and exits with 1 naming what is wrong",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.source or self.verify):
            raise ValueError("--source is missing: name the folder that holds the images")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with its flags (`--help` lists them)."""
    config = cli.parse(JobConfig, argv, DESCRIPTION)
    if config.verify:
        check(config)
        return
    from jobs.preprocess.preview import write_previews
    from pipeline.shards.make import preprocess

    values = {field.name: getattr(config, field.name) for field in fields(PreprocessConfig)}

    def connect() -> None:
        cli.connect_ray()
        source = absolute(config.source)
        read = [] if is_remote(source) else [source]
        cli.check_hosts(join(absolute(config.output), PLAN_NAME), *read)

    outcome = preprocess(PreprocessConfig(**values), printer(making), connect)
    pages = write_previews(outcome.output, outcome.manifest)
    if outcome.totals is None and not pages:
        print(f"{outcome.output} was finished before: {_counts(outcome)}. Nothing to do.")
        return
    if outcome.totals is not None:
        print(summary(outcome))
        print("\n".join(unread_lines(outcome.manifest)))
    print(f"{outcome.output}: {_counts(outcome)}; look at {', '.join(pages)}")


def printer(note: "Callable[[Progress], str]") -> "Callable[[Progress], None]":
    """Return a printer of progress on standard output, with a note for each line."""
    line = cli.ProgressPrinter(in_place=sys.stdout.isatty())

    def show(progress: "Progress") -> None:
        line.show(
            progress.resumed + progress.done,
            progress.total,
            resumed=progress.resumed,
            note=note(progress),
            seconds=progress.seconds,
        )

    return show


def making(progress: "Progress") -> str:
    """Return the note of a line while shards are made."""
    unread = f", {progress.unread} files not read" if progress.unread else ""
    failed = f", shards failed: {progress.failed_shards}" if progress.failed_shards else ""
    return f"{progress.rejected} rejected{unread}{failed}"


def checking(progress: "Progress") -> str:
    """Return the note of a line while shards are verified."""
    damaged = f", shards damaged: {progress.failed_shards}" if progress.failed_shards else ""
    return f"checked{damaged}"


def check(config: JobConfig) -> None:
    """Verify the set in --output and print the result. Raises UserError where it is damaged."""
    from pipeline.shards.verify import verify

    verification = verify(config.output, config.workers, printer(checking), cli.connect_ray)
    _check_flags(config, verification.fingerprint["configuration"])
    print(verification_table(verification))
    if verification.is_sound:
        print(f"{verification.output} is sound.")
        return
    for line in problem_lines(verification):
        print(line)
    shards = [f"{task.split}/{task.name}.*" for task in verification.damaged]
    raise UserError(
        f"{verification.output} is damaged; remove {', '.join([*shards, *verification.problems])} "
        "from it and give again the command that made it, without --verify."
    )


def _check_flags(config: JobConfig, recorded: dict[str, Any]) -> None:
    """Raise UserError for a flag whose value is not the one that the set was made with."""
    for field in fields(PreprocessConfig):
        value = getattr(config, field.name)
        if field.name in recorded and value not in (field.default, recorded[field.name]):
            raise UserError(
                f"{cli.flag(field.name)} {value}: the set in {config.output} was made "
                f"with {recorded[field.name]}; leave the flag out."
            )


def verification_table(verification: "Verification") -> str:
    """Return a table of what was checked, a row per split."""
    rows = []
    for split in verification.fingerprint["images"]:
        checks = [verification.shards[x.name] for x in verification.tasks if x.split == split]
        images = sum(check.facts.images for check in checks if check.facts)
        rejected = sum(check.totals.rejected for check in checks if check.totals)
        damaged = sum(bool(check.problems) for check in checks)
        rows.append([split, *map(str, (images, rejected, len(checks), damaged))])
    return cli.table(["split", "images", "rejected", "shards", "damaged"], rows)


def problem_lines(verification: "Verification") -> list[str]:
    """Return a line for each problem, at most MOST_LINES of them."""
    lines = [f"{name}: {text}" for name, text in verification.problems.items()]
    for task in verification.damaged:
        lines += verification.shards[task.name].problems
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more"]
    return lines


def summary(outcome: "Outcome") -> str:
    """Return a table of the set, a row per split."""
    rows = []
    for split, total in (outcome.totals or {}).items():
        entry = outcome.manifest.splits[split]
        reasons = ", ".join(f"{count} {reason}" for reason, count in total.reasons.most_common())
        rows.append(
            [
                split,
                str(entry.images),
                f"{entry.rejected} ({reasons})" if reasons else "0",
                str(total.noted),
                str(len(entry.shards)),
                f"{sum(shard.bytes for shard in entry.shards) / 1e6:.1f}",
                f"{total.superpixels / max(1, entry.images):.1f}",
            ]
        )
    headers = ["split", "images", "rejected", "noted", "shards", "MB", "superpixels"]
    return cli.table(headers, rows)


def unread_lines(manifest: Manifest) -> list[str]:
    """Return a line for each reason why files of the source are not read, most files first."""
    unread = sorted(manifest.unread.items(), key=lambda item: -item[1]["files"])
    return [
        f"not read: {x['files']} x {reason}, as {', '.join(x['examples'])}" for reason, x in unread
    ]


def _counts(outcome: "Outcome") -> str:
    splits = outcome.manifest.splits.items()
    counts = ", ".join(f"{entry.images} {split} images" for split, entry in splits)
    return f"{counts} in {len(outcome.manifest.classes)} classes"


if __name__ == "__main__":
    cli.run(main)
