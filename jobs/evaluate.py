"""`python -m jobs.evaluate`: boxes and classes of a split, scored, with a report to look at."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import cli
from jobs.evaluation import EvaluateConfig, evaluate
from jobs.report import REPORT_NAME, render, report_pictures
from pipeline.shards import write_atomically

PREDICTIONS_NAME = "predictions.parquet"
METRICS_NAME = "metrics.json"
LINE_SECONDS = 2.0  # between progress lines


def progress_printer() -> Callable[[int, int], None]:
    """A printer of progress with the time left, at most a line every two seconds."""
    started = last = time.monotonic()

    def show(done: int, batches: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < batches and now - last < LINE_SECONDS:
            return
        last = now
        left = (now - started) / done * (batches - done)
        print(f"{done} of {batches} batches, ETA {cli.duration(left)}", flush=True)

    return show


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def figures_table(metrics: dict[str, Any]) -> str:
    """The methods' figures as plain text; n counts the images with known boxes."""
    headers = ["method", "GT-known", "top-1 loc", "top-1 cls", "mean IoU", "n"]
    rows = [
        [
            row["title"],
            _share(row["gt_known"]),
            _share(row["top1_loc"]),
            _share(row["top1_cls"]),
            "-" if row["mean_iou"] is None else f"{row['mean_iou']:.3f}",
            str(row["n"]),
        ]
        for row in metrics["methods"].values()
    ]
    return cli.table(headers, rows)


def write_predictions(predictions: pa.Table) -> bytes:
    """The predictions as a parquet file's bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(predictions, sink)
    return sink.getvalue().to_pybytes()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job with command-line flags (`--help` lists them)."""
    config = cli.parse(EvaluateConfig, argv, __doc__ or "")
    # Tasks may run in another folder than the driver.
    config = replace(
        config,
        data=config.data.resolve(),
        run=config.run.resolve(),
        output=config.output.resolve(),
    )
    if config.output.exists() and not config.output.is_dir():
        raise cli.UserError(f"--output {config.output} is a file; give a folder.")
    evaluation = evaluate(config, progress_printer())
    metrics = {**evaluation.metrics, **cli.record(config)}
    pictures = report_pictures(config, evaluation.predictions)
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output / PREDICTIONS_NAME, write_predictions(evaluation.predictions))
    report = render(metrics, evaluation.predictions, pictures)
    write_atomically(config.output / REPORT_NAME, report.encode())
    write_atomically(config.output / METRICS_NAME, (json.dumps(metrics, indent=1) + "\n").encode())
    print(figures_table(metrics))
    unknown = metrics["images"] - metrics["methods"]["aln"]["n"]
    if unknown:
        print(
            f"{unknown} of {metrics['images']} images have no known box: they count as class only"
        )
    print(f"centred box: {metrics['methods']['centred_box']['source']}")
    print(f"report: {config.output / REPORT_NAME}")
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)
