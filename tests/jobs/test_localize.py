"""Boxes and overlays of single images, with random nets."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import localize as job
from jobs.cli import UserError
from jobs.evaluation import predict
from jobs.localize import draw_overlay, find_images, locate, overlay_names
from jobs.models import load_nets, save_nets
from model.localization import scale_boxes
from pipeline.ledger import read_ledger
from pipeline.shards import read_card, read_shard, shard_paths


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of images of several sizes and kinds, one of them broken."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (150, 230, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "a.jpg")
    Image.fromarray(noise[:5, :3]).save(folder / "sub" / "a.png")
    Image.fromarray(noise[:40, :300, 0]).save(folder / "grey.GIF")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(run_folder: Path, output: Path, *images: Path) -> None:
    job.main(["--run", str(run_folder), "--output", str(output), *map(str, images)])


def test_every_image_gets_an_overlay_of_its_size_and_the_broken_one_a_reason(
    pictures: Path, random_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match="1 of 4 images failed"):
        run(random_run, output, pictures)
    entries = {
        Path(entry["image"]).relative_to(pictures).as_posix(): entry
        for entry in json.loads((output / "boxes.json").read_text())["images"]
    }
    assert set(entries) == {"a.jpg", "sub/a.png", "grey.GIF", "broken.jpg"}
    assert entries["broken.jpg"].keys() == {"image", "error"}
    assert entries["broken.jpg"]["error"] in capsys.readouterr().err
    classes = load_nets(random_run).config.classes
    for name, size in (("a.jpg", (230, 150)), ("sub/a.png", (3, 5)), ("grey.GIF", (230, 40))):
        entry = entries[name]
        assert (entry["width"], entry["height"]) == size
        with Image.open(output / entry["overlay"]) as overlay:
            assert (overlay.size, overlay.mode) == (size, "RGB")
        x0, y0, x1, y1 = entry["box"]
        assert 0 <= x0 <= x1 < size[0]
        assert 0 <= y0 <= y1 < size[1]
        assert entry["class"] in classes
        assert 1 / len(classes) <= entry["score"] <= 1
    assert len(list(output.iterdir())) == 4  # three overlays and boxes.json


def test_a_missing_file_is_reported_and_the_rest_done(
    pictures: Path, random_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="1 of 2 images failed"):
        run(random_run, tmp_path / "out", pictures / "none.jpg", pictures / "a.jpg")
    first, second = json.loads((tmp_path / "out" / "boxes.json").read_text())["images"]
    assert "No such file" in first["error"]
    assert second["overlay"] == "a.png"


def test_a_picture_is_located_as_in_evaluation(small_set: Path, random_run: Path) -> None:
    nets, card = load_nets(random_run), read_card(small_set)
    source = small_set.parent / "images"
    paths = read_ledger(small_set, "val", ["path"])["path"].to_pylist()
    (shard, *_) = shard_paths(small_set, card, "val")
    for path, sample in zip(paths[:8], read_shard(shard, card), strict=False):
        located = locate(nets, (source / path).read_bytes())
        columns = predict(
            nets,
            torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None].contiguous(),
            torch.from_numpy(sample.segments.astype(np.int64))[None],
            torch.tensor([sample.label]),
            superpixels=card.max_superpixels,
            baselines=False,
        )
        size = np.array([[sample.meta["height"], sample.meta["width"]]])
        assert [located.box] == scale_boxes(columns["aln_box"], (32, 32), size).tolist()
        assert located.wnid == card.classes[columns["clean_classifier_classes"][0, 0]]
        assert located.score == pytest.approx(columns["clean_classifier_scores"][0, 0], rel=1e-6)


def test_overlay_names_are_unique_whatever_the_folders_and_letter_case() -> None:
    paths = [Path(p) for p in ("x/a.jpg", "y/a.png", "y/A.png", "a-2.jpg", "b.jpg")]
    assert overlay_names(paths) == ["a.png", "a-2.png", "A-3.png", "a-2-2.png", "b.png"]


def test_an_overlay_over_its_own_image_is_refused(pictures: Path, random_run: Path) -> None:
    before = (pictures / "sub" / "a.png").read_bytes()
    with pytest.raises(UserError, match="would replace an image given"):
        run(random_run, pictures / "sub", pictures / "sub" / "a.png")
    assert (pictures / "sub" / "a.png").read_bytes() == before


def test_folders_are_searched_in_order_and_empty_ones_refused(
    pictures: Path, tmp_path: Path
) -> None:
    names = [path.name for path in find_images([pictures, Path("other.xyz")])]
    assert names == ["a.jpg", "broken.jpg", "grey.GIF", "a.png", "other.xyz"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no image files"):
        find_images([empty])


def test_the_overlay_shows_the_box_where_it_is(random_run: Path) -> None:
    nets = load_nets(random_run)
    pixels = np.full((120, 160, 3), 128, np.uint8)
    with torch.no_grad():  # a flat map: one colour all over, and the whole image as the box
        nets.corruption.output.weight.zero_()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    located = locate(nets, buffer.getvalue())
    assert (located.box, located.found) == ([0, 0, 159, 119], False)
    picture = np.asarray(draw_overlay(pixels, located))
    assert picture[119, 80].tolist() == list(job.BOX_COLOUR)
    assert picture[60, 159].tolist() == list(job.BOX_COLOUR)
    inside = picture[40:110, 10:150].reshape(-1, 3)
    assert (inside == inside[0]).all()


def test_diverged_nets_end_the_job_with_the_remedy(
    pictures: Path, random_run: Path, tmp_path: Path
) -> None:
    nets = load_nets(random_run)
    with torch.no_grad():
        nets.corruption.output.weight.fill_(torch.nan)
    (tmp_path / "run").mkdir()
    save_nets(tmp_path / "run", nets, {})
    with pytest.raises(UserError, match="train it again"):
        run(tmp_path / "run", tmp_path / "out", pictures / "a.jpg")
