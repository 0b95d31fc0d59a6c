"""RUN/checkpoints/: a folder for each, written whole and read with every byte checked."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from jobs.runs import DamagedError, read_weights, write_weights
from jobs.train.state import TrainingError
from pipeline.errors import UserError
from pipeline.storage import entries, is_file, join, name, remove, remove_folder

CHECKPOINTS_NAME = "checkpoints"
STATE_NAME = "state.json"  # state.safetensors holds the tensors
CHECKPOINT_FORMAT = 1
FAULT_NAME = "fault.txt"  # why no other attempt would end better
REQUEST_NAME = "checkpoint.request"  # asks rank 0 for a checkpoint, after which it is gone


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint, and what is wrong with the newer ones."""

    folder: str
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    damaged: tuple[str, ...]


def _all_folders(run: str | Path) -> list[str]:
    """Return all, newest first, without a user's copies of other names."""
    folder = join(run, CHECKPOINTS_NAME)
    steps = (own for own in entries(folder)[0] if fnmatch(own, f"step-{'[0-9]' * 9}"))
    return [join(folder, own) for own in sorted(steps, reverse=True)]


def _folders(run: str | Path) -> list[str]:
    """Return complete ones, newest first; one whose writing was cut off has no JSON yet."""
    return [folder for folder in _all_folders(run) if is_file(join(folder, STATE_NAME))]


def newest_step(run: str | Path) -> int | None:
    """Return the step of the newest complete checkpoint, None where there is none."""
    folders = _folders(run)
    return int(name(folders[0]).removeprefix("step-")) if folders else None


def way_on(run: str | Path) -> str:
    """Return in words where the same command goes on."""
    step = newest_step(run)
    if step is None:
        return "there is no checkpoint yet: the same command starts again"
    return f"the same command goes on from the checkpoint of step {step}"


def read_warmup(run: str | Path) -> Checkpoint:
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
    run: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    keep: int,
) -> str:
    """Write a checkpoint, then delete all but the newest `keep`. Raises OSError, or of a URI
    UserError, with nothing left of the new one and the older ones untouched, where it cannot be
    written."""
    folder = join(run, CHECKPOINTS_NAME, f"step-{step:09}")
    content = {"format": CHECKPOINT_FORMAT, "numbers": dict(numbers)}
    try:
        write_weights(join(folder, STATE_NAME), tensors, content)
    except (OSError, UserError):
        with suppress(OSError, UserError):
            remove_folder(folder)
        raise
    complete = _folders(run)
    for path in _all_folders(run):
        if path not in complete[:keep]:
            if path in complete:
                remove(join(path, STATE_NAME))  # so that a half removed one is none
            remove_folder(path)
    return folder


def read_checkpoint(run: str | Path) -> Checkpoint | None:
    """Return the newest sound checkpoint, None where none was written yet. Raises TrainingError
    where all are damaged."""
    damaged: list[str] = []
    for folder in _folders(run):
        try:
            tensors, content = read_weights(join(folder, STATE_NAME))
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
