"""`python -m jobs.preprocess`: a collection of images becomes a set of shards."""

import sys
import time
from collections.abc import Callable, Sequence

from jobs import cli
from pipeline.preprocess import Outcome, PreprocessConfig, Progress, preprocess

LINE_SECONDS = 5.0  # between progress lines where the output is no terminal
BAR_CELLS = 24


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job with command-line flags (`--help` lists them)."""
    config = cli.parse(PreprocessConfig, argv, "Turn a collection of images into shards.")
    show = progress_printer(terminal=sys.stdout.isatty())
    outcome = preprocess(config, show, cli.connect_ray)
    if outcome.totals is None:
        print(f"{outcome.output} was finished before: {_counts(outcome)}. Nothing to do.")
        return
    print(summary(outcome))
    print(f"{outcome.output}: {_counts(outcome)}")


def progress_line(progress: Progress) -> str:
    """`done of all`, rejected, images/s of this run and the time left in minutes and seconds."""
    done = progress.resumed + progress.done
    rate = progress.done / progress.seconds if progress.seconds else 0.0
    left = (progress.total - done) / rate if rate else None
    eta = "unknown" if left is None else cli.duration(left)
    return (
        f"{done} of {progress.total} images, {progress.rejected} rejected, "
        f"{rate:.0f} images/s, ETA {eta}"
    )


def progress_printer(terminal: bool) -> Callable[[Progress], None]:
    """A printer of progress: a bar that redraws itself on a terminal, else a line now and then."""
    last = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal last
        finished = progress.resumed + progress.done == progress.total
        if terminal:
            filled = BAR_CELLS * (progress.resumed + progress.done) // progress.total
            bar = "#" * filled + "." * (BAR_CELLS - filled)
            print(f"\r[{bar}] {progress_line(progress)}\x1b[K", end="\n" if finished else "")
            sys.stdout.flush()
        elif finished or time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(progress_line(progress), flush=True)

    return show


def summary(outcome: Outcome) -> str:
    """A table with a row per split; seconds are those of this run's tasks, added up."""
    rows = []
    for split, total in (outcome.totals or {}).items():
        entry = outcome.card.splits[split]
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
    splits = outcome.card.splits.items()
    counts = ", ".join(f"{entry.images} {split} images" for split, entry in splits)
    return f"{counts} in {len(outcome.card.classes)} classes"


if __name__ == "__main__":
    cli.run(main)
