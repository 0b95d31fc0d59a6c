import hashlib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.synthetic_controls import learned_accuracies
from pipeline.evaluation.constant_boxes import centred_boxes, fit_centred_box, whole_image_boxes
from pipeline.evaluation.protocols import best_iou
from pipeline.synthetic import WNIDS, SyntheticConfig, draw_image, write_synthetic

CONFIG = SyntheticConfig()


def boxes_and_sizes(split: str, count: int) -> list[tuple[np.ndarray, tuple[int, int]]]:
    drawn = (draw_image(CONFIG, split, index) for index in range(count))
    return [(np.array(boxes), image.shape[:2]) for image, _, _, boxes in drawn]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_same_configuration_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    small = SyntheticConfig(train_images=16, val_images=8)
    write_synthetic(tmp_path / "a", small)
    write_synthetic(tmp_path / "b", small)
    write_synthetic(tmp_path / "c", SyntheticConfig(train_images=16, val_images=8, seed=1))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a").keys() == digest(tmp_path / "c").keys()
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_layout_is_ilsvrcs_with_the_boxes_that_were_drawn(tmp_path: Path) -> None:
    write_synthetic(tmp_path, SyntheticConfig(train_images=16, val_images=9))
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == sorted(WNIDS)
    assert len(list((tmp_path / "train").glob("*/*.JPEG"))) == 16
    assert len(list((tmp_path / "val").glob("*.JPEG"))) == 9
    for index in range(9):
        image, _, label, boxes = draw_image(CONFIG, "val", index)
        stem = f"ILSVRC2012_val_{index + 1:08d}"
        root = ElementTree.parse(tmp_path / "boxes" / "val" / f"{stem}.xml").getroot()
        assert root.findtext("size/width") == str(image.shape[1])
        assert {node.text for node in root.iter("name")} == {WNIDS[label]}
        names = ("xmin", "ymin", "xmax", "ymax")
        corners = [[int(b.findtext(n) or -1) for n in names] for b in root.iter("bndbox")]
        assert corners == boxes
        stored = cv2.imread(str(tmp_path / "val" / f"{stem}.JPEG"))
        assert stored is not None
        assert stored.shape == image.shape


def test_objects_differ_from_the_background_inside_their_boxes_alone() -> None:
    for index in range(24):
        image, empty, _, boxes = draw_image(CONFIG, "val", index)
        changed = np.abs(image.astype(int) - empty).max(axis=2) > 12
        inside = np.zeros(changed.shape, bool)
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 < image.shape[1]
            assert 0 <= y0 < y1 < image.shape[0]
            box = changed[y0 : y1 + 1, x0 : x1 + 1]
            assert box.mean() > 0.2
            inside[y0 - (y0 > 0) : y1 + 2, x0 - (x0 > 0) : x1 + 2] = True
        assert not (changed & ~inside).any()


def test_sizes_places_and_counts_vary_as_stated() -> None:
    images = boxes_and_sizes("val", 400)
    areas, centres = [], []
    for boxes, (height, width) in images:
        sides = boxes[:, 2:] - boxes[:, :2] + 1
        areas += (sides.prod(axis=1) / (height * width)).tolist()
        centres += ((boxes[:, :2] + boxes[:, 2:]) / 2 / [width, height]).tolist()
    counts = np.bincount([len(boxes) for boxes, _ in images], minlength=4)
    assert counts[0] == 0
    assert len(counts) == 4
    assert 0.1 < (counts[2] + counts[3]) / 400 < 0.3
    assert 0.05 <= min(areas) < 0.08
    assert 0.4 < max(areas) <= 0.5
    assert np.std(centres, axis=0).min() > 0.15
    assert np.abs(np.mean(centres, axis=0) - 0.5).max() < 0.05


def test_no_constant_box_scores() -> None:
    """Not even the centred box of the size that is best on these very images."""
    images = boxes_and_sizes("val", 500)
    sizes = np.array([size for _, size in images])
    truths = [boxes.tolist() for boxes, _ in images]
    shares = fit_centred_box(sizes, truths)
    assert shares is not None
    flat = np.concatenate([boxes for boxes, _ in images])
    starts = np.cumsum([0] + [len(boxes) for boxes in truths])
    assert (best_iou(centred_boxes(sizes, shares), flat, starts) >= 0.5).mean() < 0.25
    assert (best_iou(whole_image_boxes(sizes), flat, starts) >= 0.5).mean() < 0.25


@pytest.mark.slow
def test_backgrounds_say_nothing_about_the_class_while_objects_do() -> None:
    """The script that this calls shows the same with all images, at 64 px, in 25 epochs."""
    objects, backgrounds = learned_accuracies(train_images=1200, val_images=500, epochs=8, side=32)
    assert objects > 0.25
    assert abs(backgrounds - 1 / 8) < 0.05
