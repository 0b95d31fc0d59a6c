"""What is the ILSVRC devkit's own: rows without ids, and classes by ILSVRC2012_ID."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.evaluation.rows import SHOWN, at, class_indices, read_lines, read_text
from pipeline.sources.labels import PROBE_WNID, WNID, read_meta

DEVKIT_ID = re.compile(r"[0-9]{1,9}")
# The one number that tells the devkit's order of the 1000 ILSVRC classes from the sorted wnids.
PROBE_ID = 490


def read_devkit_rows(path: Path, images: int) -> tuple[list[int], list[list[str]]]:
    """1-based line numbers and words of a devkit file, whose lines may be blank.

    images: how many rows there have to be. Raises UserError for another number of rows, and for a
    row that is not groups of five words.
    """
    words = [line.split() for line in read_text(path).removesuffix("\n").split("\n")]
    if len(words) != images:
        raise UserError(
            f"{path} has {len(words)} rows and the ground truth {images} images; expected a row "
            "per image in file-name order, blank where nothing was found."
        )
    for number, row in enumerate(words, 1):
        if len(row) % 5:
            raise UserError(
                f"{at(path, number)} has {len(row)} words; expected groups of five, "
                "`label x0 y0 x1 y1`. Mend the line."
            )
    return list(range(1, images + 1)), words


def read_devkit_ids(path: Path, devkit_ids: Path | None) -> list[str]:
    """The wnids in the order of ILSVRC2012_ID, which counts from 1.

    path: the file of rows that needs them. Raises UserError where `devkit_ids` is missing, damaged
    or the ILSVRC classes in another order.
    """
    if devkit_ids is None:
        raise UserError(
            f"{path} has devkit rows, whose labels are ILSVRC2012_IDs; give --devkit-ids FILE, "
            "the devkit's meta.mat or a wnid per line in that order."
        )
    wnids = _read_meta(devkit_ids) if devkit_ids.suffix == ".mat" else _read_order(devkit_ids)
    if len(wnids) >= PROBE_ID and PROBE_WNID in wnids and wnids[PROBE_ID - 1] != PROBE_WNID:
        raise UserError(
            f"{devkit_ids} has {PROBE_WNID} at {wnids.index(PROBE_WNID) + 1}; in the order of "
            f"ILSVRC2012_ID it is {PROBE_ID}. Give the devkit's own order, not the sorted wnids."
        )
    return wnids


def _read_order(path: Path) -> list[str]:
    wnids = []
    for number, line in read_lines(path):
        wnid = line.split()[0]
        if not WNID.fullmatch(wnid) or wnid in wnids:
            raise UserError(
                f"{at(path, number)} is {line[:SHOWN]!r}; expected a wnid, each once, in the order "
                "of ILSVRC2012_ID."
            )
        wnids.append(wnid)
    return wnids


def _read_meta(path: Path) -> list[str]:
    try:
        return [synset.wnid for synset in read_meta(path.read_bytes(), str(path))]
    except (OSError, UserError) as error:
        raise UserError(str(error)) from error


def devkit_labels(
    path: Path,
    lines: Sequence[int],
    tokens: Sequence[str],
    classes: Sequence[str] | None,
    devkit_ids: Path | None,
) -> np.ndarray:
    """Class indices int64 [K] of labels that are ILSVRC2012_IDs; lines: the line of each."""
    wnids = read_devkit_ids(path, devkit_ids)
    for line, token in zip(lines, tokens, strict=True):
        if not DEVKIT_ID.fullmatch(token) or not 1 <= int(token) <= len(wnids):
            raise UserError(
                f"{at(path, line)} has label {token[:SHOWN]!r}; expected an ILSVRC2012_ID from 1 "
                f"to {len(wnids)}. Mend the line, or give the --devkit-ids that belong to it."
            )
    return class_indices(path, lines, [wnids[int(token) - 1] for token in tokens], classes)
