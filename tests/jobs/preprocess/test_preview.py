import io
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import cli
from jobs.preprocess.__main__ import unread_lines
from jobs.preprocess.preview import histogram, read_rows, render, write_previews
from pipeline import storage
from pipeline.shards.format import read_manifest, read_sample, read_samples
from pipeline.shards.ledger import read_ledger
from pipeline.shards.make import preprocess
from pipeline.shards.plan import PreprocessConfig
from tests import remote


@pytest.mark.parametrize(
    ("values", "first", "widths"),
    [([5], "5: 1 of", 1), (range(10, 42), "10: 1 of", 1), (range(1000), "0–49: 50 of", 50)],
)
def test_a_histogram_counts_every_value_once(values: list[int], first: str, widths: int) -> None:
    counts = Counter(values)
    chart = histogram(counts, "title", "x", "of")
    assert sum(int(text.split(": ")[1].split()[0]) for _, text in chart.bars) == len(values)
    assert chart.bars[0][1] == first
    assert len(chart.bars) == -(-len(values) // widths) <= 33
    assert max(share for share, _ in chart.bars) == 100
    assert f"median {sorted(values)[(len(values) - 1) // 2]:,}," in chart.summary


def test_one_sample_read_alone_is_the_one_among_all(small_set: Path, remote_set: str) -> None:
    manifest = read_manifest(small_set)
    everything = list(read_samples(small_set / "train" / "train-000001.tar", manifest))
    for location in (str(small_set), remote_set):
        path = storage.join(location, "train", "train-000001.tar")
        sample, expected = read_sample(path, 7, manifest), everything[7]
        assert (sample.row, sample.label, sample.meta) == (
            expected.row,
            expected.label,
            expected.meta,
        )
        assert np.array_equal(sample.image, expected.image)
        assert np.array_equal(sample.segments, expected.segments)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_counts_are_those_of_the_ledger(small_set: Path, split: str) -> None:
    manifest, table = read_manifest(small_set), read_ledger(small_set, split).to_pylist()
    sums = read_rows(str(small_set), manifest, split)
    assert sums.widths.total() == len(table) == manifest.splits[split].images
    assert max(sums.superpixels) == max(row["superpixels"] for row in table)
    assert sum(k * n for k, n in sums.widths.items()) == sum(row["width"] for row in table)
    assert sums.boxes[0] == sum(not row["boxes"] for row in table)
    assert sums.areas.total() == sum(len(row["boxes"] or []) for row in table)
    assert len({row["id"] for row in sums.chosen}) == min(24, len(table))
    assert all(row in [{k: r[k] for k in row} for r in table] for row in sums.chosen)


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
    (tmp_path / "images" / "dog" / "<i>.txt").write_bytes(b"")
    config = PreprocessConfig(
        source=str(tmp_path / "images"),
        output=str(tmp_path / "shards"),
        image_size="32x48",
        superpixels=20,
        max_bad_share=0.5,
    )
    outcome = preprocess(config, lambda progress: None, cli.connect_ray)
    (location,) = write_previews(outcome.output, outcome.manifest)
    assert write_previews(outcome.output, outcome.manifest) == []
    text = Path(location).read_text()
    assert text == render(outcome.output, outcome.manifest, "train")
    page = Page(text)
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert sum(load.startswith("data:image/jpeg") for load in page.loads) == 2 * 10
    words = " ".join(" ".join(page.words).split())
    assert "“train”: 10 images" in words
    assert "empty file: 2" in words
    assert "Such as suffix .txt: not an image's 1 dog/<i>.txt" in words
    assert unread_lines(outcome.manifest) == [
        "not read: 1 x suffix .txt: not an image's, as dog/<i>.txt"
    ]
    assert "<b>cat" in words  # as text
    assert "51 × 40 ·" in words


def test_the_page_of_a_remote_set_is_that_of_the_local_one(
    small_set: Path, remote_set: str, s3_endpoint: str
) -> None:
    manifest = read_manifest(small_set)
    assert render(remote_set, manifest, "val") == render(str(small_set), manifest, "val")
    location = remote.upload(small_set, s3_endpoint, "previewed")
    pages = write_previews(location, manifest)
    assert len(pages) == 2
    assert all(storage.is_file(page) for page in pages)
