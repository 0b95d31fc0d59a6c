import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import cli
from jobs.preprocess.preview import (
    LARGEST_SIDE,
    _histogram,
    border_path,
    read_rows,
    render,
    write_previews,
)
from pipeline import storage
from pipeline.shards.format import read_manifest, read_sample, read_shard
from pipeline.shards.ledger import read_ledger
from pipeline.shards.make import preprocess
from pipeline.shards.plan import PreprocessConfig
from tests import remote


def test_the_borders_path_separates_every_pair_of_different_neighbours() -> None:
    segments = np.array([[0, 0, 1], [0, 2, 1], [2, 2, 1]], np.uint8)
    crossed = set()
    for x, y, way, n in re.findall(r"M(\d+) (\d+)([hv])(\d+)", border_path(segments)):
        for i in range(int(n)):
            if way == "h":
                crossed.add(((int(y) - 1, int(x) + i), (int(y), int(x) + i)))
            else:
                crossed.add(((int(y) + i, int(x) - 1), (int(y) + i, int(x))))
    pairs = [((r, c), (r, c + 1)) for r in range(3) for c in range(2)]
    pairs += [((r, c), (r + 1, c)) for r in range(2) for c in range(3)]
    assert crossed == {(a, b) for a, b in pairs if segments[a] != segments[b]}


@pytest.mark.parametrize(
    ("values", "first", "widths"),
    [([5], "5: 1 of", 1), (range(10, 42), "10: 1 of", 1), (range(1000), "0–49: 50 of", 50)],
)
def test_a_histogram_counts_every_value_once(values: list[int], first: str, widths: int) -> None:
    counts = np.bincount(list(values), minlength=2000)
    chart = _histogram(counts, "title", "x", "of")
    assert sum(int(bar.text.split(": ")[1].split()[0]) for bar in chart.bars) == len(values)
    assert chart.bars[0].text == first
    assert len(chart.bars) == -(-len(values) // widths) <= 33
    tallest = max(chart.bars, key=lambda bar: bar.height)
    assert tallest.y == min(bar.y for bar in chart.bars)
    assert f"median {sorted(values)[(len(values) - 1) // 2]:,}" in chart.summary


def test_one_sample_read_alone_is_the_one_among_all(small_set: Path, remote_set: str) -> None:
    manifest = read_manifest(small_set)
    everything = list(read_shard(small_set / "train" / "train-000001.tar", manifest))
    for place in (str(small_set), remote_set):
        one = read_sample(storage.join(place, "train", "train-000001.tar"), 7, manifest)
        assert (one.row, one.label, one.meta) == (
            everything[7].row,
            everything[7].label,
            everything[7].meta,
        )
        assert np.array_equal(one.image, everything[7].image)
        assert np.array_equal(one.segments, everything[7].segments)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_counts_are_those_of_the_ledger(small_set: Path, split: str) -> None:
    manifest, table = read_manifest(small_set), read_ledger(small_set, split).to_pylist()
    seen = read_rows(str(small_set), manifest, split)
    assert seen.accepted == len(table) == manifest.splits[split].images
    assert seen.superpixels.nonzero()[0].max() == max(row["superpixels"] for row in table)
    assert (seen.widths * np.arange(LARGEST_SIDE + 1)).sum() == sum(r["width"] for r in table)
    assert seen.boxes[0] == sum(not row["boxes"] for row in table)
    assert seen.areas.sum() == sum(len(row["boxes"] or []) for row in table)
    assert len({row["id"] for row in seen.chosen}) == min(24, len(table))
    assert all(row in [{k: r[k] for k in row} for r in table] for row in seen.chosen)


class Page(HTMLParser):
    """Collects what a page loads, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object")
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.usefixtures("ray_local")
def test_the_page_is_whole_escaped_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("<b>cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (40, 50 + i, 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            data = buffer.getvalue() if i else b""
            (tmp_path / "images" / name / f"{i}.png").write_bytes(data)
    config = PreprocessConfig(
        source=str(tmp_path / "images"),
        output=str(tmp_path / "shards"),
        image_size="32x48",
        superpixels=20,
        max_bad_share=0.5,
    )
    outcome = preprocess(config, lambda progress: None, cli.connect_ray)
    (place,) = write_previews(outcome.output, outcome.manifest)
    assert write_previews(outcome.output, outcome.manifest) == []
    text = Path(place).read_text()
    assert text == render(outcome.output, outcome.manifest, "train")
    page = Page(text)
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert sum(load.startswith("data:image/jpeg") for load in page.loads) == 2 * 10
    words = " ".join(" ".join(page.words).split())
    assert "“train”: 10 images" in words
    assert "empty file: 2" in words
    assert "<b>cat" in words  # as text
    assert "51 × 40 ·" in words


def test_the_page_of_a_remote_set_is_that_of_the_local_one(
    small_set: Path, remote_set: str, s3_endpoint: str
) -> None:
    manifest = read_manifest(small_set)
    assert render(remote_set, manifest, "val") == render(str(small_set), manifest, "val")
    place = remote.upload(small_set, s3_endpoint, "previewed")
    pages = write_previews(place, manifest)
    assert len(pages) == 2
    assert all(storage.is_file(page) for page in pages)
