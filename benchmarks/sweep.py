"""`python -m benchmarks.sweep`: the sweep over all thresholds against contours drawn 1000 times.

Side by side in one run, in one thread, per score map: ours (levels, boxes, IoUs and counts of both
MaxBoxAcc and MaxBoxAccV2), a plain OpenCV loop over the thresholds, and, with --reference, the
functions of a checkout of wsolevaluation. The loop and the reference are given once for MaxBoxAcc
and once for V2, which they compute in separate runs; ours gives both in one.
"""

import importlib
import json
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.machine import hardware
from jobs import cli
from pipeline.evaluation.sweep import (
    add_counts,
    level_boxes,
    level_ious,
    quantize,
    stretch,
    threshold_levels,
)
from pipeline.evaluation.sweep import thresholds as all_thresholds

TRUTHS = np.array([[0.1, 0.1, 0.7, 0.6], [0.3, 0.2, 0.9, 0.9]])  # shares of the side
Score = Callable[[np.ndarray, np.ndarray], Any]  # of a float map and its true boxes


@dataclass(frozen=True, kw_only=True)
class SweepBenchConfig:
    """What to compare with, and where the result goes."""

    reference: Path | None = cli.option(None, help="checkout of wsolevaluation to compare with")
    output: Path | None = cli.option(None, help="JSON file for the figures, with the hardware")
    maps: int = cli.option(3, help="maps of each kind and size")


def score_map(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """A map in [0, 1] of 7 x 7 upsampled values, of superpixels, or of noise."""
    if kind == "noisy":
        return rng.random((side, side))
    if kind == "smooth":
        coarse = rng.random((7, 7))
        return stretch(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)[None])[0]
    ys, xs = rng.random((2, 200, 1, 1)) * side
    grid = np.arange(side)
    return rng.random(200)[((grid[:, None] - ys) ** 2 + (grid - xs) ** 2).argmin(axis=0)]


def ours(scores: np.ndarray, truths: np.ndarray) -> None:
    found = level_boxes(quantize(scores))
    boxes = found.boxes.copy()
    boxes[:, 2:] = np.minimum(boxes[:, 2:] + 1, len(scores) - 1)
    levels = threshold_levels(found.maximum)
    counts = np.zeros((2, len(levels), 20), np.int64)
    for part, ious in zip(counts, level_ious(found, boxes, truths, 1, np.zeros(4)), strict=True):
        add_counts(part, ious, levels)


def loop(multi: bool) -> Score:
    """The definition, drawn with OpenCV at every threshold; the boxes alone."""

    def score(scores: np.ndarray, _truths: np.ndarray) -> None:
        levels = quantize(scores)
        maximum = float(levels.max())
        for threshold in all_thresholds():
            drawn = cv2.threshold(levels, int(threshold * maximum), 255, cv2.THRESH_BINARY)[1]
            contours = cv2.findContours(drawn, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
            if contours and not multi:
                contours = [max(contours, key=cv2.contourArea)]
            for contour in contours:
                cv2.boundingRect(contour)

    return score


def reference(checkout: Path) -> dict[str, Score]:
    """The reference's own functions; packages that they do not use stay out."""
    for name, needed in (("munch", "Munch"), ("torchvision", "transforms")):
        stand_in = types.ModuleType(name)
        setattr(stand_in, needed, None)
        sys.modules[name] = stand_in
    setattr(np, "float", float)  # noqa: B010 - the reference was written for an older NumPy
    sys.path.insert(0, str(checkout))
    evaluation = importlib.import_module("evaluation")
    steps = list(all_thresholds())

    def score(multi: bool) -> Score:
        def run(scores: np.ndarray, truths: np.ndarray) -> None:
            boxes, numbers = evaluation.compute_bboxes_from_scoremaps(scores, steps, multi)
            ious = evaluation.calculate_multiple_iou(np.concatenate(boxes), truths).max(1)
            np.maximum.reduceat(ious, np.cumsum([0, *numbers[:-1]]))

        return run

    return {"reference MaxBoxAcc": score(False), "reference V2": score(True)}


def milliseconds(score: Score, maps: list[np.ndarray], repeats: int) -> float:
    """CPU time of one map, which other work on the machine moves less than the clock's: the median
    over maps of the fastest of a few runs."""
    truths = (TRUTHS * len(maps[0])).astype(np.int64)
    taken = []
    for scores in maps:
        fastest = float("inf")
        for _ in range(repeats):
            start = time.process_time()
            score(scores, truths)
            fastest = min(fastest, time.process_time() - start)
        taken.append(1000 * fastest)
    return float(np.median(taken))


def main() -> None:
    config = cli.parse(SweepBenchConfig, None, __doc__ or "")
    cv2.setNumThreads(1)
    scorers: dict[str, Score] = {"loop MaxBoxAcc": loop(False), "loop V2": loop(True)}
    if config.reference is not None:
        scorers |= reference(config.reference)
    ours(np.zeros((8, 8)), np.zeros((1, 4)))  # compiles
    rows, results = [], []
    for side in (64, 224):
        for kind in ("smooth", "superpixels", "noisy"):
            rng = np.random.default_rng(0)
            # Noise at 224 px takes the loops seconds a map.
            maps = [
                score_map(kind, side, rng) for _ in range(1 if kind == "noisy" else config.maps)
            ]
            for scores in maps:
                ours(scores, TRUTHS * side)
            mine = milliseconds(ours, maps, 20)
            times = {
                name: milliseconds(score, maps, 1 if kind == "noisy" else 2)
                for name, score in scorers.items()
            }
            results.append({"kind": kind, "side": side, "ours": mine, **times})
            shown = [f"{value:.1f} ({value / mine:.0f} x)" for value in times.values()]
            rows.append([kind, str(side), f"{mine:.2f}", *shown])
    print(cli.table(["map", "px", "ours, both", *scorers], rows))
    print("milliseconds of CPU time per map on one thread, and how many times ours")
    if config.output is not None:
        content = {
            "date": date.today().isoformat(),
            "hardware": {**hardware(), "opencv": cv2.__version__},
            "milliseconds_per_map": results,
        }
        config.output.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {config.output}")


if __name__ == "__main__":
    cli.run(main)
