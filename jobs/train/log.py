"""What a training reports: RUN/metrics.jsonl, RUN/log.txt for people, TensorBoard, Ray's metrics,
and the table at the end."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from ray.util.metrics import Gauge
from tensorboardX import SummaryWriter

from jobs.cli import duration, table
from jobs.runs import LOG_NAME, METRICS_NAME
from pipeline.storage import naming_full_disk, write_atomically

TENSORBOARD_NAME = "tensorboard"
EXAMPLES_NAME = "examples"


class TrainingLog:
    """Appends to a run's metrics file, its log and TensorBoard events, from one rank alone, and
    sets Ray's metrics, which its dashboard and Prometheus show as aln_NAME.

    A resumed run first drops the metrics that were logged after its checkpoint, so that they have
    every step once; log.txt keeps their lines. notes: for the next interval.
    """

    def __init__(self, run: Path, resumed_step: int) -> None:
        self.run = run
        path = run / METRICS_NAME
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [f"{text}\n" for text in lines if _step(text) <= resumed_step]
        write_atomically(path, "".join(kept).encode())
        self.file = path.open("a")
        self.text = (run / LOG_NAME).open("a")
        self.events = SummaryWriter(str(run / TENSORBOARD_NAME), purge_step=resumed_step + 1)
        self.gauges: dict[str, Gauge] = {}
        self.notes: list[str] = []

    def write(self, values: dict[str, Any]) -> None:
        """Log one interval. values: JSON numbers, "step" and "phase" among them."""
        noted = values | ({"notes": self.notes} if self.notes else {})
        self.notes = []
        for file, text in ((self.file, json.dumps(noted)), (self.text, line(noted))):
            with naming_full_disk(file.name):
                file.write(f"{text}\n")
                file.flush()
        phase, step = values["phase"], values["step"]
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        with naming_full_disk(self.run / TENSORBOARD_NAME):
            for name, value in numbers.items():
                self.events.add_scalar(f"{phase}/{name}", value, step)
            self.events.flush()
        for name, value in numbers.items():
            if name not in self.gauges:
                self.gauges[name] = Gauge(f"aln_{name}", name, tag_keys=("run", "phase"))
            self.gauges[name].set(value, {"run": self.run.name, "phase": phase})

    def picture(self, step: int, picture: np.ndarray, encoded: bytes) -> None:
        """Keep the example images' masks at a step: RGB uint8 [H, W, 3] and the same as PNG."""
        path = self.run / EXAMPLES_NAME / f"step-{step:06}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, encoded)
        self.events.add_image("examples", picture, step, dataformats="HWC")
        self.events.flush()

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        self.text.close()
        self.events.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf  # the last line of a killed run may be cut off


def _intervals(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / METRICS_NAME).read_text().splitlines()]


def waiting_summary(run: Path) -> str:
    """Return in one line how much of a run's time went into waiting for batches, by phase, and how
    much into the first ones, while the loader starts."""
    seconds: dict[str, float] = {}
    waited: dict[str, float] = {}
    starting = 0.0
    for values in _intervals(run):
        phase, first = values["phase"], values["first_batch_seconds"]
        seconds[phase] = seconds.get(phase, 0.0) + values["seconds"] - first
        waited[phase] = waited.get(phase, 0.0) + values["waiting"] * values["seconds"] - first
        starting += first
    shares = [f"{phase} {max(0.0, waited[phase]) / seconds[phase]:.1%}" for phase in seconds]
    return f"waiting for data: {', '.join(shares)}; for the first batches {starting:.1f} s"


def summary(run: Path) -> str:
    """Return the table at the end: each phase's steps, time and rate, and its last values."""
    accuracies = ("accuracy", "clean_accuracy", "context_accuracy", "swapped_accuracy")
    others = ("target", "area", "area_weight", "joint_share", "corruption_loss", "classifier_loss")
    names = (*accuracies, *others)
    intervals = _intervals(run)
    rows, start = [], 0
    for phase in dict.fromkeys(values["phase"] for values in intervals):
        own = [values for values in intervals if values["phase"] == phase]
        steps = own[-1]["step"] - start
        seconds = sum(values["seconds"] for values in own)
        images = sum(values["images_per_second"] * values["seconds"] for values in own)
        start = own[-1]["step"]
        # a column that some lines lack is taken from the last line that has it
        last = {name: value for values in own for name, value in values.items()}
        rows.append(
            [phase, str(steps), duration(seconds), f"{images / seconds:.0f}"]
            + [f"{last[name]:.3g}" if name in last else "-" for name in names]
        )
    titles = ["accuracy", "clean", "context", "swapped", "target", "area", "lambda", "joint"]
    losses = ["corruption loss", "classifier loss"]
    return table(["phase", "steps", "time", "images/s", *titles, *losses], rows)


def line(values: dict[str, Any]) -> str:
    """Return one interval's values as a line for people."""
    parts = [f"step {values['step']}/{values['steps']}", f"epoch {values['epoch'] + 1}"]
    if values["phase"] == "warmup":
        parts += ["warm-up", f"loss {values['classifier_loss']:.3f}"]
        parts += [f"accuracy {values['accuracy']:.3f}"]
    else:
        parts += [f"joint {values['joint_share']:.0%}"]
        for name in ("corruption", "imitation", "classifier"):
            if f"{name}_loss" in values:
                parts += [f"{name} loss {values[f'{name}_loss']:.3f}"]
        parts += [f"masked accuracy {values['accuracy']:.3f} (target {values['target']:.3f})"]
        for name in ("clean", "context", "swapped"):
            if f"{name}_accuracy" in values:
                parts += [f"{name} {values[f'{name}_accuracy']:.3f}"]
        parts += [f"lambda {values['area_weight']:.3g}", f"area {values['area']:.3f}"]
    parts += [f"{values['images_per_second']:.0f} images/s", f"waiting {values['waiting']:.1%}"]
    parts += [f"ETA {duration(values['eta_seconds'])}"]
    parts += [f"NOTE: {text}" for text in values.get("notes", [])]
    return " | ".join(parts)
