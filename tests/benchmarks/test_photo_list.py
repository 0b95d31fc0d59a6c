"""The list of public photographs: val images are recognized by name, wherever they lie."""

import gzip
from pathlib import Path

import pytest

from benchmarks.photo_list import ListConfig, list_photos
from pipeline.errors import UserError


def write_truth(folder: Path, lines: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in lines.items():
        with gzip.open(folder / f"{name}.txt.gz", "wt") as file:
            file.write(text)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in (
        *("n01440764/n01440764_7.JPEG", "n01440764/n01440764_9.JPEG"),
        *("n01440764/ILSVRC2012_val_00000002.JPEG", "n01440764/ILSVRC2012_val_00000003.JPEG"),
        "n02102040_springer.JPEG",
    ):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    ids = ("val/ILSVRC2012_val_00000002.JPEG", "val/ILSVRC2012_val_00000003.JPEG")
    return write_truth(
        tmp_path / "truth",
        {
            "class_labels": f"{ids[0]},1\n{ids[1]},0\n",
            "image_sizes": f"{ids[0]},500,375\n{ids[1]},64,48\n",
            "localization": f"{ids[0]},1,2,3,4\n{ids[0]},5,6,7,8\n{ids[1]},0,0,9,9\n",
        },
    )


@pytest.mark.parametrize(("parity", "number"), [(0, 2), (1, 3)])
def test_val_images_of_one_parity_have_a_line_per_box_and_are_never_train(
    images: Path, truth: Path, parity: int, number: int
) -> None:
    config = ListConfig(folders=(images,), truth=truth, output=images, parity=parity, per_class=1)
    lines = list_photos(config)
    train = [line for line in lines if line[2] == "train"]
    assert sorted(line[1] for line in train) == ["n01440764", "n02102040"], "one of each class"
    assert not any("ILSVRC2012_val_" in line[0] for line in train)
    val = [line for line in lines if line[2] == "val"]
    assert {Path(line[0]).name for line in val} == {f"ILSVRC2012_val_{number:08}.JPEG"}
    expected = {
        2: [
            ("n02102040", "val", "1", "2", "3", "4", "500", "375"),
            ("n02102040", "val", "5", "6", "7", "8", "500", "375"),
        ],
        3: [("n01440764", "val", "0", "0", "9", "9", "64", "48")],
    }
    assert [line[1:] for line in val] == expected[number]


def test_fewer_classes_than_val_has_are_refused(images: Path, truth: Path) -> None:
    (images / "n02102040_springer.JPEG").unlink()
    with pytest.raises(UserError, match="1 classes"):
        list_photos(ListConfig(folders=(images,), truth=truth, output=images))
