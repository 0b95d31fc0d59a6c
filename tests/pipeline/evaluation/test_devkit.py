from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from pipeline.errors import UserError
from pipeline.evaluation.devkit import devkit_labels, read_devkit_ids

ROWS = Path("guesses.txt")
SYNSET = [
    ("ILSVRC2012_ID", object),
    ("WNID", object),
    ("words", object),
    ("num_children", object),
    ("children", object),
]


def write_meta(path: Path, synsets: list[tuple[int, str, int]]) -> Path:
    """A meta.mat as the devkit's: a struct array of (ILSVRC2012_ID, WNID, num_children)."""
    table = np.empty((len(synsets), 1), SYNSET)
    for row, (number, wnid, children) in zip(table[:, 0], synsets, strict=True):
        listed = np.arange(float(children))
        for (name, _), value in zip(
            SYNSET, (float(number), wnid, "a, b", float(children), listed), strict=True
        ):
            row[name] = value
    scipy.io.savemat(path, {"synsets": table})
    return path


def refusal(call: Callable[[], object]) -> str:
    """The one line that the call is refused with."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def thousand(place: int) -> list[str]:
    """1000 wnids with n01751748 at the 1-based place."""
    wnids = [f"n{i:08d}" for i in range(2_000_000, 2_000_999)]
    return [*wnids[: place - 1], "n01751748", *wnids[place - 1 :]]


def test_leaves_of_meta_mat_are_taken_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = write_meta(
        tmp_path / "meta.mat",
        [(2, "n00000002", 0), (4, "n00000009", 2), (1, "n00000003", 0), (3, "n00000001", 0)],
    )
    assert read_devkit_ids(ROWS, path) == ["n00000003", "n00000002", "n00000001"]


def test_meta_mat_with_a_gap_is_refused(tmp_path: Path) -> None:
    path = write_meta(tmp_path / "meta.mat", [(1, "n00000002", 0), (3, "n00000009", 0)])
    assert f"{path} numbers its 2 classes otherwise" in refusal(lambda: read_devkit_ids(ROWS, path))
    scipy.io.savemat(path, {"other": 1})
    assert f"{path} cannot be read" in refusal(lambda: read_devkit_ids(ROWS, path))


def test_the_devkit_order_is_told_from_the_sorted_wnids(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("\n".join(thousand(490)))
    wnids = read_devkit_ids(ROWS, path)
    # Validation image 1: 490 by the devkit, 65 by the sorted wnids of ILSVRC.
    classes = thousand(66)
    assert devkit_labels(ROWS, [1], ["490"], classes, path).tolist() == [65]
    assert len(wnids) == 1000
    path.write_text("\n".join(thousand(66)))
    message = refusal(lambda: read_devkit_ids(ROWS, path))
    assert "n01751748 at 66" in message
    assert "it is 490" in message


def test_fewer_classes_may_come_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("n01751748 sea snake\nn00000001\n")
    assert read_devkit_ids(ROWS, path) == ["n01751748", "n00000001"]


@pytest.mark.parametrize("line", ["n00000001", "490", "n1"])
def test_a_faulty_list_is_refused_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(f"n00000001\n{line}\n")
    assert f"{path} line 2" in refusal(lambda: read_devkit_ids(ROWS, path))


def test_rows_without_their_numbers_name_the_remedy() -> None:
    assert "--devkit-ids FILE" in refusal(lambda: read_devkit_ids(ROWS, None))
