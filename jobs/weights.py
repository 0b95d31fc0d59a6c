"""Tensors in a safetensors file beside a JSON file that says what they are: written whole, read
with every byte checked. Nothing in either can be executed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.shards import write_atomically


class DamagedError(Exception):
    """Files that are not what was written: cut off, changed, or half there. The message says
    which file and how."""


def tensors_path(path: Path) -> Path:
    """Where the tensors beside a JSON file are."""
    return path.with_suffix(".safetensors")


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_weights(path: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write `content` to the JSON file `path` and the tensors beside it.

    The JSON comes last, as the mark that all is there, and holds the size and SHA-256 of the
    tensors' file and the SHA-256 of itself. Raises OSError where the disk is full, for one.
    """
    data = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    write_atomically(tensors_path(path), data)
    whole = {
        **content,
        "tensors": {
            "file": tensors_path(path).name,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        },
    }
    whole["sha256"] = _content_hash(whole)
    write_atomically(path, (json.dumps(whole, indent=1) + "\n").encode())


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the content. Raises DamagedError."""
    try:
        content = json.loads(path.read_bytes())
        stated = content.pop("sha256")
        expected = content["tensors"]
        size, sha256 = expected["bytes"], expected["sha256"]
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not what was written ({type(error).__name__})") from error
    if _content_hash(content) != stated:
        raise DamagedError(f"{path} was changed after it was written (its SHA-256 is another)")
    beside = tensors_path(path)
    try:
        data = beside.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{beside} is missing") from None
    if len(data) != size:
        raise DamagedError(f"{beside} has {len(data)} bytes instead of {size}")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedError(f"{beside} was changed after it was written (its SHA-256 is another)")
    try:
        return safetensors.torch.load(data), content
    except SafetensorError as error:
        raise DamagedError(f"{beside} is not a safetensors file ({error})") from error
