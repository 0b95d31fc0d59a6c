"""What a training reports: RUN/metrics.jsonl, RUN/log.txt for people, TensorBoard, Ray's metrics,
and the table at the end."""

import json
import math
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from ray.util.metrics import Gauge
from tensorboardX import SummaryWriter

from jobs.cli import duration, table
from jobs.runs import LOG_NAME, METRICS_NAME
from pipeline.storage import (
    MissingError,
    UnreachableError,
    is_remote,
    join,
    local_path,
    name,
    naming_full_disk,
    read_bytes,
    upload_changes,
    write_atomically,
)

TENSORBOARD_NAME = "tensorboard"
EXAMPLES_NAME = "examples"
UPLOAD_SECONDS = 10  # between uploads of what is appended to


class TrainingLog:
    """Appends to a run's metrics file, its log and TensorBoard events, from one rank alone, and
    sets Ray's metrics, which its dashboard and Prometheus show as aln_NAME.

    A resumed run first drops the metrics that were logged after its checkpoint, so that they have
    every step once; log.txt keeps their lines. Of a run at a URI the files grow in a local folder
    and are uploaded now and then. notes: for the next interval.
    """

    def __init__(self, run: str | Path, resumed_step: int) -> None:
        self.run = str(run)
        self.known: dict[str, tuple[int, int]] = {}
        self.uploaded = time.monotonic()
        if is_remote(run):
            self.temporary = tempfile.TemporaryDirectory()
            self.folder = Path(self.temporary.name)
            for file_name in (METRICS_NAME, LOG_NAME):
                with suppress(MissingError):
                    (self.folder / file_name).write_bytes(read_bytes(join(run, file_name)))
        else:
            self.folder = local_path(run)
        path = self.folder / METRICS_NAME
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [f"{text}\n" for text in lines if _step(text) <= resumed_step]
        write_atomically(path, "".join(kept).encode())
        self.file = path.open("a")
        self.text = (self.folder / LOG_NAME).open("a")
        self.events = SummaryWriter(
            str(self.folder / TENSORBOARD_NAME), purge_step=resumed_step + 1
        )
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
        with naming_full_disk(self.folder / TENSORBOARD_NAME):
            for key, value in numbers.items():
                self.events.add_scalar(f"{phase}/{key}", value, step)
            self.events.flush()
        for key, value in numbers.items():
            if key not in self.gauges:
                self.gauges[key] = Gauge(f"aln_{key}", key, tag_keys=("run", "phase"))
            self.gauges[key].set(value, {"run": name(self.run), "phase": phase})
        if time.monotonic() - self.uploaded >= UPLOAD_SECONDS:
            with suppress(UnreachableError):  # a checkpoint, which comes soon, must be written
                self.upload()

    def picture(self, step: int, picture: np.ndarray, encoded: bytes) -> None:
        """Keep the example images' masks at a step: RGB uint8 [H, W, 3] and the same as PNG."""
        path = self.folder / EXAMPLES_NAME / f"step-{step:06}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, encoded)
        self.events.add_image("examples", picture, step, dataformats="HWC")
        self.events.flush()

    def upload(self) -> None:
        """Upload what has grown, where the run lies at a URI. Raises UserError."""
        if is_remote(self.run):
            self.known = upload_changes(self.folder, self.run, self.known)
        self.uploaded = time.monotonic()

    def close(self) -> None:
        """Close the files. Raises UserError where they cannot be uploaded."""
        self.file.close()
        self.text.close()
        self.events.close()
        self.upload()


def append_line(run: str | Path, text: str) -> None:
    """Append a line to a run's log while no rank has it open. Raises OSError, of a URI UserError,
    where it cannot be written."""
    if not is_remote(run):
        with local_path(join(run, LOG_NAME)).open("a") as file:
            file.write(f"{text}\n")
        return
    before = b""
    with suppress(MissingError):
        before = read_bytes(join(run, LOG_NAME))
    write_atomically(join(run, LOG_NAME), before + f"{text}\n".encode())


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf  # the last line of a killed run may be cut off


def _intervals(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in read_bytes(join(run, METRICS_NAME)).splitlines()]


def waiting_summary(run: str | Path) -> str:
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


def summary(run: str | Path) -> str:
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
