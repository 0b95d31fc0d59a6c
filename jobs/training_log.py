"""What training says of itself: RUN/metrics.jsonl, TensorBoard, and the line a person reads."""

import json
import math
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from jobs.cli import duration
from pipeline.shards import write_atomically

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"
FULL, EMPTY = 0.95, 0.005  # masked areas past which the masks say nothing of the object


class TrainingLog:
    """Appends to a run's metrics file and TensorBoard events, from one rank alone.

    A resumed run first drops what was logged after its checkpoint, so every step is there once.
    """

    def __init__(self, run: Path, resumed_step: int) -> None:
        path = run / METRICS_NAME
        kept = []
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _step(line) <= resumed_step]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self.file = path.open("a")
        self.events = SummaryWriter(str(run / TENSORBOARD_NAME), purge_step=resumed_step + 1)

    def write(self, values: dict[str, Any]) -> None:
        """Log one interval; `values` holds "step" and JSON numbers or strings."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                self.events.add_scalar(f"{values['phase']}/{name}", value, values["step"])
        self.events.flush()

    def close(self) -> None:
        self.file.close()
        self.events.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf  # the last line of a killed run may be cut off


def waiting_summary(run: Path) -> str:
    """How much of a run's training time went into waiting for batches, by phase, in one line; the
    wait for the first batch of each start, while the loader starts, is named apart."""
    seconds: dict[str, float] = {}
    waited: dict[str, float] = {}
    starting = 0.0
    for text in (run / METRICS_NAME).read_text().splitlines():
        values = json.loads(text)
        phase, first = values["phase"], values["first_batch_seconds"]
        seconds[phase] = seconds.get(phase, 0.0) + values["seconds"] - first
        waited[phase] = waited.get(phase, 0.0) + values["waiting"] * values["seconds"] - first
        starting += first
    shares = [f"{phase} {max(0.0, waited[phase]) / seconds[phase]:.1%}" for phase in seconds]
    return f"waiting for data: {', '.join(shares)}; for the first batches {starting:.1f} s"


def line(values: dict[str, Any]) -> str:
    """One interval's values as the line that the terminal shows."""
    parts = [f"step {values['step']}/{values['steps']}", f"epoch {values['epoch'] + 1}"]
    if values["phase"] == "warmup":
        parts += ["warm-up", f"loss {values['classifier_loss']:.3f}"]
        parts += [f"accuracy {values['accuracy']:.3f}"]
    else:
        parts += [f"joint {values['joint_share']:.0%}"]
        parts += [f"corruption loss {values['corruption_loss']:.3f}"]
        parts += [f"classifier loss {values['classifier_loss']:.3f}"]
        parts += [f"masked accuracy {values['accuracy']:.3f} (target {values['target']:.3f})"]
        parts += [f"lambda {values['area_weight']:.3g}", f"area {values['area']:.3f}"]
        if values["area"] > FULL:
            parts += ["MASKS COVER EVERYTHING: the target is too low, raise --target-share"]
        if values["area"] < EMPTY:
            parts += ["MASKS ARE EMPTY: the area weighs too much, lower --area-start"]
    parts += [f"{values['images_per_second']:.0f} images/s", f"waiting {values['waiting']:.1%}"]
    parts += [f"ETA {duration(values['eta_seconds'])}"]
    return " | ".join(parts)
