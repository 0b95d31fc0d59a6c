"""Files of other programs for tests of their readers, and how those refuse them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.evaluation.truth import GroundTruth


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_all(folder: Path, files: dict[str, str]) -> Path:
    """Write files by name into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write(folder / name, text)
    return folder


def write_metadata(folder: Path, truth: GroundTruth) -> Path:
    """Write the ground truth as wsolevaluation's metadata."""
    assert truth.sizes is not None
    owners = np.repeat(np.arange(len(truth.ids)), np.diff(truth.starts))
    tables = {
        "class_labels.txt": [truth.ids, truth.labels],
        "image_sizes.txt": [truth.ids, *truth.sizes.T[::-1]],
        "localization.txt": [np.array(truth.ids)[owners], *truth.boxes.T],
    }
    lines = {
        k: [",".join(map(str, row)) for row in zip(*v, strict=True)] for k, v in tables.items()
    }
    return write_all(folder, {name: "\n".join(rows) for name, rows in lines.items()})


def assert_refused(
    path: object, fact: str, function: Callable[..., object], *arguments: Any, **named: Any
) -> None:
    """Assert that the call ends in one line that names the path, and right after it the fact, a
    regular expression."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert re.search(f"{re.escape(str(path))}{fact}", message), message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))  # whatever the file contains


def content(words: list[str]) -> st.SearchStrategy[bytes]:
    """Any bytes, or text made of the words that a format knows."""
    text = st.lists(st.sampled_from([*words, *',-. \t"\n\r\0é{']), max_size=25).map("".join)
    return st.one_of(st.binary(max_size=200), text.map(str.encode))
