"""`python -m benchmarks.sweep --reference CHECKOUT`: the sweep against wsolevaluation's.

In one run, in one thread, per score map: ours (levels, boxes, IoUs and counts of both MaxBoxAcc
and MaxBoxAccV2), and the functions of the checkout, which give the two in separate runs.
"""

import importlib
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from benchmarks.machine import hardware, write_result
from jobs import cli
from pipeline.evaluation import sweep
from pipeline.evaluation.protocols import thresholds

TRUTHS = np.array([[0.1, 0.1, 0.7, 0.6], [0.3, 0.2, 0.9, 0.9]])  # shares of the side
OURS = "ours, both"
Score = Callable[[np.ndarray, np.ndarray], None]  # of a float map and its true boxes


@dataclass(frozen=True, kw_only=True)
class SweepBenchConfig:
    """What to compare with, and where the result goes."""

    reference: Path = cli.option(help="checkout of wsolevaluation to compare with")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


def score_map(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Make a map in [0, 1] of 7 x 7 upsampled values, of superpixels, or of noise."""
    if kind == "noise":
        return rng.random((side, side))
    if kind == "smooth":
        coarse = rng.random((7, 7))
        return sweep.stretch(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)[None])[
            0
        ]
    ys, xs = rng.random((2, 200, 1, 1)) * side
    grid = np.arange(side)
    return rng.random(200)[((grid[:, None] - ys) ** 2 + (grid - xs) ** 2).argmin(axis=0)]


def ours(scores: np.ndarray, truths: np.ndarray) -> None:
    """Score a map as the evaluator does under int224."""
    contours = sweep.level_boxes(sweep.quantize(scores))
    boxes = contours.boxes.copy()
    boxes[:, 2:] = np.minimum(boxes[:, 2:] + 1, len(scores) - 1)
    levels = sweep.threshold_levels(contours.maximum)
    counts = np.zeros((len(levels), 20), np.int64)
    for ious in sweep.level_ious(contours, boxes, truths, 1, np.zeros(4)):
        sweep.add_counts(counts, ious, levels)


def reference(checkout: Path) -> dict[str, Score]:
    """Load the reference's own functions; packages that these do not use stay out."""
    for name, needed in (("munch", "Munch"), ("torchvision", "transforms")):
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], needed, None)
    setattr(np, "float", float)  # noqa: B010 - the reference was written for an older NumPy
    sys.path.insert(0, str(checkout))
    evaluation = importlib.import_module("evaluation")
    steps = list(thresholds())

    def score(scores: np.ndarray, truths: np.ndarray, *, multi: bool) -> None:
        boxes, numbers = evaluation.compute_bboxes_from_scoremaps(scores, steps, multi)
        ious = evaluation.calculate_multiple_iou(np.concatenate(boxes), truths).max(1)
        np.maximum.reduceat(ious, np.cumsum([0, *numbers[:-1]]))

    return {"MaxBoxAcc": partial(score, multi=False), "MaxBoxAccV2": partial(score, multi=True)}


def milliseconds(score: Score, maps: list[np.ndarray], repeats: int) -> float:
    """Measure CPU time per map, which other work on the machine changes less than the clock's: the
    median over maps of the fastest run."""
    truths = (TRUTHS * len(maps[0])).astype(np.int64)
    fastest = []
    for scores in maps:
        marks = [time.process_time()]
        for _ in range(repeats):
            score(scores, truths)
            marks.append(time.process_time())
        fastest.append(1000 * np.diff(marks).min())
    return float(np.median(fastest))


def measure(scorers: dict[str, Score], kind: str, side: int) -> dict[str, float]:
    """Measure every scorer on the same maps, fewer where the reference takes seconds a map."""
    rng = np.random.default_rng(0)
    maps = [score_map(kind, side, rng) for _ in range(1 if kind == "noise" else 3)]
    ours(maps[0], TRUTHS * side)  # compiles
    return {x: milliseconds(score, maps, 20 if x == OURS else 2) for x, score in scorers.items()}


def main() -> None:
    config = cli.parse(SweepBenchConfig, None, __doc__ or "")
    cv2.setNumThreads(1)
    scorers = {OURS: ours, **reference(config.reference)}
    pairs = [(side, kind) for side in (64, 224) for kind in ("smooth", "superpixels", "noise")]
    results = [{"kind": kind, "side": side, **measure(scorers, kind, side)} for side, kind in pairs]
    rows = [[x if isinstance(x, str) else f"{x:.4g}" for x in row.values()] for row in results]
    print(cli.table(list(results[0]), rows))
    print("milliseconds of CPU time per map on one thread")
    machine = {**hardware(), "opencv": cv2.__version__}
    write_result(config.output, "sweep", {"hardware": machine, "milliseconds_per_map": results})


if __name__ == "__main__":
    cli.run(main)
