"""`python -m jobs.evaluate`: every localization figure of a split or of given files, with a page.

With --data and --run: our nets beside the paper's baselines. With --ground-truth alone: the
constant boxes, and rows for --score-maps and --predictions of any origin.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs import cli
from jobs.evaluate.config import EvaluateConfig, Evaluation, evaluate
from jobs.evaluate.scoring import Scorer
from jobs.evaluate.tasks import TOP
from jobs.report.__main__ import REPORT_NAME, render, report_pictures
from pipeline.errors import UserError
from pipeline.evaluation.formats import Guesses, write_guesses
from pipeline.evaluation.truth import write_metadata
from pipeline.storage import absolute, write_atomically

PREDICTIONS_NAME = "predictions.parquet"
METRICS_NAME = "metrics.json"
_FOLDERS = ("output", "score_maps", "export", "network_weights", "network_classes", "cache")
COLUMNS = {
    "gt_known": "GT-known",
    "top1_loc": "top-1 loc",
    "top5_loc": "top-5 loc",
    "max_box_acc": "MaxBoxAcc",
    "max_box_acc_v2": "V2",
    "mean_iou": "mean IoU",
    "auc_gap": "AUC gap",
}


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name in ("mean_iou", "auc_gap") else f"{value:.1%}"


def figures_table(metrics: dict[str, Any]) -> str:
    """The methods' figures as plain text; n counts the images with known boxes. The last two
    columns are the paper's Table 1, on ILSVRC val."""
    rows = []
    for row in metrics["methods"].values():
        paper = row["paper"] or {"metric1": None, "metric2": None}
        rows.append(
            [row["title"]]
            + [_figure(name, row[name]) for name in COLUMNS]
            + [str(row["n"])]
            + [_figure(name, paper[name]) for name in ("metric1", "metric2")]
        )
    return cli.table(["method", *COLUMNS.values(), "n", "paper: 1", "2"], rows)


def write_predictions(predictions: pa.Table) -> bytes:
    """The predictions as a parquet file's bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(predictions, sink)
    return sink.getvalue().to_pybytes()


def export(folder: Path, evaluation: Evaluation) -> None:
    """Write the ground truth as wsolevaluation metadata, and each source's boxes with the classes
    of its first row as Kaggle CSV and Parquet."""
    truth, said = evaluation.truth, evaluation.said
    write_metadata(folder / "metadata", truth)
    scorer = Scorer(truth=truth, protocol="devkit")
    written: set[str] = set()
    for method in said.methods.values():
        if method.box in written or method.classes is None:
            continue
        written.add(method.box)
        labels = np.full((len(truth.ids), TOP), -1)
        classes = said.classes[method.classes]
        labels[:, : classes.shape[1]] = classes
        boxes = np.repeat(scorer.original(said.boxes[method.box])[:, None], TOP, axis=1)
        boxes[labels < 0] = -1
        guesses = Guesses(labels=labels, boxes=boxes)
        for suffix in (".csv", ".parquet"):
            path = folder / "boxes" / f"{method.box}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_guesses(path, truth, guesses)


def _resolved(config: EvaluateConfig) -> EvaluateConfig:
    """The configuration with absolute paths: tasks may run in another folder than the driver."""
    places: dict[str, Any] = {
        name: getattr(config, name).resolve()
        for name in _FOLDERS
        if getattr(config, name) is not None
    }
    if config.data is not None:
        places["data"] = absolute(config.data)
    return replace(config, run=tuple(run.resolve() for run in config.run), **places)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job with command-line flags (`--help` lists them)."""
    config = _resolved(cli.parse(EvaluateConfig, argv, __doc__ or ""))
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"--output {config.output} is a file; give a folder.")
    evaluation = evaluate(config, cli.ProgressPrinter().show)
    metrics = {**evaluation.metrics, **cli.record(config)}
    pictures = report_pictures(config, evaluation.predictions)
    report = render(metrics, evaluation.predictions, pictures)
    if config.export is not None:
        export(config.export, evaluation)
        print(f"score maps and boxes in the formats of others: {config.export}")
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output / PREDICTIONS_NAME, write_predictions(evaluation.predictions))
    write_atomically(config.output / REPORT_NAME, report.encode())
    write_atomically(config.output / METRICS_NAME, (json.dumps(metrics, indent=1) + "\n").encode())
    print(figures_table(metrics))
    print(
        f"protocol {metrics['protocol']} ({metrics['protocol_text']}); box rule: "
        f"{metrics['box_rule']}; paper: its Table 1 on ILSVRC val, metrics 1 and 2"
    )
    if config.ten_crops:
        print("the nets' classes: from ten crops of each image; maps and boxes: from the whole")
    unknown = metrics["images"] - metrics["with_boxes"]
    if unknown:
        print(
            f"{unknown} of {metrics['images']} images have no known box: they count as class only"
        )
    if "centred_box" in metrics["methods"]:
        print(f"centred box: {metrics['methods']['centred_box']['source']}")
    print(f"report: {config.output / REPORT_NAME}")
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)
