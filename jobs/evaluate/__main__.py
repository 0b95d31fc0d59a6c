"""`python -m jobs.evaluate`: every localization figure of one source, with a page.

With --data SHARDS: of --run (our nets beside the paper's baselines) or --network. With
--ground-truth FILES (or --data): of --score-maps or --predictions of any origin. Several
evaluations are compared by jobs.report.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import cli
from jobs.evaluate.config import EvaluateConfig
from jobs.evaluate.inputs import NO_SIZES, Inputs, centred_shares, class_names, read_inputs
from jobs.evaluate.sources import Source, constant_boxes, read_source
from model.localization import RULE_TEXTS
from pipeline.errors import UserError
from pipeline.evaluation.lines import MissingClassesError
from pipeline.evaluation.metrics import SUBSETS
from pipeline.evaluation.protocols import PROTOCOLS
from pipeline.evaluation.results import (
    MAPS_NAME,
    METRICS_NAME,
    Evaluation,
    RowFigures,
    clear_maps,
    write_evaluation,
)
from pipeline.evaluation.scoring import (
    class_lists,
    classifier_figures,
    score,
    truth_lists,
)
from pipeline.shards.format import split_of
from pipeline.storage import absolute, is_file, join, locked_file, working_folder

REPORT_NAME = "report.html"
LOCK_NAME = ".lock"  # an empty file; not removed, since another evaluation may have it open
ROOT = Path(__file__).parents[2]  # of the packages
COLUMNS = {  # of the printed table, where shares are per cent
    "gt_known": "GT-known",
    "top1_loc": "top-1",
    "top5_loc": "top-5",
    "max_box_acc": "MaxBoxAcc",
    "max_box_acc_v2": "V2",
    "mean_iou": "mean IoU",
    "auc_gap": "AUC gap",
}
UNITLESS = ("mean_iou", "auc_gap")
# Of `doubts`: the fewest boxes or maps, the share of images, and the AUC of inverted maps.
FEWEST, MOST, INVERTED = 20, 0.9, 0.35


def evaluate(config: EvaluateConfig, progress: Callable[[int, int], None]) -> Evaluation:
    """Evaluate, over Ray where nets are evaluated, and write all files of --output but the page.
    progress: called with the images that are scored, and all. Raises UserError, of one line, for
    inputs that do not fit each other."""
    with working_folder(absolute(config.output), METRICS_NAME, replaced=MAPS_NAME) as folder:
        metrics, rows = _evaluate(config, folder, progress)
    return Evaluation(folder=config.output, metrics=metrics, rows=tuple(rows))


def _evaluate(
    config: EvaluateConfig, folder: Path, progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], list[RowFigures]]:
    started = time.monotonic()
    inputs = read_inputs(config)
    truth = inputs.truth
    clear_maps(folder)
    try:
        source = read_source(replace(config, output=folder), inputs, progress)
    except MissingClassesError as error:
        raise UserError(f"{error}; give --classes FILE, as LOC_synset_mapping.txt.") from None
    localizations = list(source.localizations)
    centred = None
    if config.centred_box is not None and inputs.maps is None:
        raise UserError(f"--centred-box needs the sizes of the images; {NO_SIZES}.")
    if inputs.maps is not None:
        shares, origin = centred_shares(config.data, inputs.manifest, config.centred_box)
        centred = {"height": shares[0], "width": shares[1], "source": origin}
        localizations[:0] = constant_boxes(source, inputs.maps, shares)
    if not localizations:
        raise UserError(
            f"{config.ground_truth} holds no image sizes, so no constant box can be scored, and "
            f"there are no --predictions: nothing to evaluate; {NO_SIZES}."
        )
    rows, predictions = score(
        localizations, source.classes, truth, protocol=config.protocol, seed=config.seed
    )
    metrics = {
        **described(config, inputs, source),
        "centred_box": centred,
        "doubts": doubts(config, inputs, source),
        "seconds": round(time.monotonic() - started, 2),
        **cli.record(config),
    }
    write_evaluation(folder, metrics, rows, predictions, images_table(inputs, source))
    return metrics, rows


def described(config: EvaluateConfig, inputs: Inputs, source: Source) -> dict[str, Any]:
    """Return what metrics.json tells of source, data and protocol."""
    truth, manifest = inputs.truth, inputs.manifest
    content: dict[str, Any] = {
        "source": {"kind": source.kind, "name": source.name},
        "data": config.data,
        "split": None if manifest is None else config.split,
        "images": len(truth.ids),
        "with_boxes": int((np.diff(truth.starts) > 0).sum()),
        "rejected": None if manifest is None else split_of(manifest, config.split).rejected,
        "data_configuration": None if manifest is None else manifest.configuration,
        "protocol": config.protocol,
        "protocol_text": PROTOCOLS[config.protocol].text,
        "rules": RULE_TEXTS,
        "rule": config.rule or "paper",
        "subsets": SUBSETS,
        "seed": config.seed,
        "class_names": class_names(truth),
        "classifiers": {
            name: classifier_figures(classes, truth) for name, classes in source.classes.items()
        },
    }
    if config.run is not None:
        from jobs.runs import model_hash, read_config  # here: it needs torch

        content["model_sha256"] = model_hash(config.run)
        content["rule"] = config.rule or read_config(config.run).rule
    return content


def doubts(config: EvaluateConfig, inputs: Inputs, source: Source) -> list[str]:
    """Return facts of given files that point to a misreading, though they prove none."""
    truth = inputs.truth
    if truth.sizes is None:
        return []
    given = {}
    if config.ground_truth is not None:
        owners = np.repeat(np.arange(len(truth.ids)), np.diff(truth.starts))
        given[str(config.ground_truth)] = (truth.boxes, truth.sizes[owners])
    result = []
    for own in source.localizations:
        if own.guesses is not None:
            present = (own.boxes >= 0).all(axis=1)
            given[source.name] = (own.boxes[present], truth.sizes[present])
        if own.rule == "paper" and own.map == "given" and own.auc is not None:
            auc = own.auc[~np.isnan(own.auc)]
            if len(auc) >= FEWEST and auc.mean() < INVERTED:
                result.append(
                    f"{source.name}: pixels in the boxes score below those outside (AUC "
                    f"{auc.mean():.2f}): are the maps inverted?"
                )
    for name, (boxes, sizes) in given.items():
        if len(boxes) < FEWEST:
            continue
        if (sizes.min(axis=1) > 1.25 * boxes.max()).mean() > MOST:
            result.append(
                f"{name}: no box reaches beyond pixel {boxes.max():g}, and almost all images are "
                "far larger: are the boxes of resized images?"
            )
        elif boxes.min() > 0 and (boxes[:, 2:] == sizes[:, ::-1]).any():
            result.append(
                f"{name}: no corner is 0, and some are the width or height: are pixels counted "
                "from 1, where 0 is expected?"
            )
    return result


def images_table(inputs: Inputs, source: Source) -> pa.Table:
    """Return images.parquet: image, id, label; row, and for shards key and shard; width and
    height where known; boxes; classes and scores, by classifier, where there are any."""
    truth = inputs.truth
    columns: dict[str, Any] = {
        "image": np.arange(len(truth.ids)),
        "id": pa.array(truth.ids, pa.string()),
        "label": truth.labels,
        **{name: inputs.images[name] for name in inputs.images.column_names},
        "boxes": truth_lists(truth),
    }
    if truth.sizes is not None:
        columns |= {"height": truth.sizes[:, 0], "width": truth.sizes[:, 1]}
    for column, values in (("classes", source.classes), ("scores", source.scores)):
        if values:
            lists = [class_lists(source.classes[name], values[name]) for name in values]
            columns[column] = pa.StructArray.from_arrays(lists, list(values))
    return pa.table(columns)


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name in UNITLESS else f"{100 * value:.1f}"


def figures_table(evaluation: Evaluation, rule: str) -> str:
    """Return a line per map as plain text: its first row by the rule, or by the one it has. The
    last two columns are the paper's Table 1, on ILSVRC val."""
    rules = {row.row.map: {row.row.rule} for row in evaluation.rows}
    for row in evaluation.rows:
        rules[row.row.map].add(row.row.rule)
    lines: dict[str, list[str]] = {}
    for row in evaluation.rows:
        name = row.row.map
        if name in lines or (rule in rules[name] and row.row.rule != rule):
            continue
        paper = row.paper or {"metric1": None, "metric2": None}
        figures = [_figure(column, row.figures[column]) for column in COLUMNS]
        lines[name] = [row.title, *figures, *(_figure(metric, v) for metric, v in paper.items())]
    return cli.table(["map", *COLUMNS.values(), "paper 1", "2"], list(lines.values()))


def notes(evaluation: Evaluation, rule: str) -> list[str]:
    """Return what the printed table needs to be read."""
    metrics = evaluation.metrics
    lines = [
        f"{metrics['source']['kind']} {metrics['source']['name']}; "
        f"n = {metrics['with_boxes']} images with known boxes; shares in %; "
        "top-1, top-5: localization with the class",
        f"protocol {metrics['protocol']} ({metrics['protocol_text']}); box rule: "
        f"{metrics['rules'][rule]}; paper: its Table 1 on ILSVRC val, metrics 1 and 2",
    ]
    if metrics["configuration"]["ten_crops"]:
        lines.append("the nets' classes: from ten crops of each image; maps: from the whole")
    unknown = metrics["images"] - metrics["with_boxes"]
    if unknown:
        lines.append(
            f"{unknown} of {metrics['images']} images have no known box: they count as class only"
        )
    lines += [f"doubtful: {doubt}" for doubt in metrics["doubts"]]
    if metrics["centred_box"] is not None:
        lines.append(f"centred box: {metrics['centred_box']['source']}")
    return lines


def write_page(folder: Path | str) -> str:
    """Have jobs.report write the page. Raises UserError with its error."""
    page = join(folder, REPORT_NAME)
    command = [sys.executable, "-m", "jobs.report", str(folder), "--output", page]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if result.returncode:
        error = (result.stderr.strip().splitlines() or ["no error was printed"])[-1]
        raise UserError(f"{page} could not be written by jobs.report: {error}")
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job with command-line flags (`--help` lists them)."""
    config = cli.parse(EvaluateConfig, argv, __doc__ or "").resolved()
    if is_file(config.output):
        raise UserError(f"--output {config.output} is a file; give a folder.")
    with locked_file(join(config.output, LOCK_NAME)) as is_alone:
        if not is_alone:
            raise UserError(
                f"another evaluation into {config.output} runs now; wait for it, or give another "
                "--output."
            )
        evaluation = evaluate(config, cli.ProgressPrinter().show)
    print(figures_table(evaluation, evaluation.metrics["rule"]))
    print("\n".join(notes(evaluation, evaluation.metrics["rule"])))
    print(f"report: {write_page(config.output)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
