"""RUN/checkpoints/: a folder for each, written whole and read with every byte checked."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from jobs.runs import DamagedError, read_weights, write_weights
from jobs.train.state import TrainingError

CHECKPOINTS_NAME = "checkpoints"
STATE_NAME = "state.json"  # state.safetensors holds the tensors
CHECKPOINT_FORMAT = 1
FAULT_NAME = "fault.txt"  # why no other attempt would end better
REQUEST_NAME = "checkpoint.request"  # asks rank 0 for a checkpoint, after which it is gone


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint, and what is wrong with the newer ones."""

    folder: Path
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    damaged: tuple[str, ...]


def _folders(run: Path) -> list[Path]:
    """Return complete ones, newest first; one whose writing was cut off has no JSON yet."""
    return [folder for folder in _all_folders(run) if (folder / STATE_NAME).is_file()]


def _all_folders(run: Path) -> list[Path]:
    """Return all, newest first, without a user's copies of other names."""
    return sorted((run / CHECKPOINTS_NAME).glob(f"step-{'[0-9]' * 9}"), reverse=True)


def newest_step(run: Path) -> int | None:
    """Return the step of the newest complete checkpoint, None where there is none."""
    folders = _folders(run)
    return int(folders[0].name.removeprefix("step-")) if folders else None


def way_on(run: Path) -> str:
    """Return in words where the same command goes on."""
    step = newest_step(run)
    if step is None:
        return "there is no checkpoint yet: the same command starts again"
    return f"the same command goes on from the checkpoint of step {step}"


def read_warmup(run: Path) -> Checkpoint:
    """Return the newest sound checkpoint of a run that has finished its warm-up. Raises
    TrainingError where there is none."""
    checkpoint = read_checkpoint(run)
    if checkpoint is None or not checkpoint.numbers["clean_accuracy"]:
        raise TrainingError(
            f"--warmup-from {run} holds no checkpoint past its warm-up. Let that run get "
            "further, or leave the flag out"
        )
    return checkpoint


def write_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`. Raises OSError, with nothing
    left of the new one and the older ones untouched, where it cannot be written."""
    folder = run / CHECKPOINTS_NAME / f"step-{step:09}"
    content = {"format": CHECKPOINT_FORMAT, "numbers": dict(numbers)}
    try:
        write_weights(folder / STATE_NAME, tensors, content)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    kept = _folders(run)[:keep]
    for path in _all_folders(run):
        if path not in kept:
            shutil.rmtree(path)
    return folder


def read_checkpoint(run: Path) -> Checkpoint | None:
    """Return the newest sound checkpoint, None where none was written yet. Raises TrainingError
    where all are damaged."""
    damaged: list[str] = []
    for folder in _folders(run):
        try:
            tensors, content = read_weights(folder / STATE_NAME)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        if content.get("format") != CHECKPOINT_FORMAT:
            number = content.get("format")
            raise TrainingError(
                f"{folder} has format {number}; this program reads {CHECKPOINT_FORMAT}"
            )
        return Checkpoint(folder, tensors, content["numbers"], tuple(damaged))
    if damaged:
        raise TrainingError(
            f"no sound checkpoint is left ({'; '.join(damaged)}); train anew in another --output"
        )
    return None
