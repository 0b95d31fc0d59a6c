from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.loader import (
    Augmentation,
    Batch,
    Position,
    crop_regions,
    epoch_order,
    evaluation_batches,
    rank_range,
    step_range,
    steps_per_epoch,
    train_batches,
)
from pipeline.shards import Card, DataError, Sample, Split, pack_shard, write_shard

CPU = torch.device("cpu")
SIZE = (48, 64)
SAMPLES = 53
PLAIN = Augmentation(min_area=1.0, max_aspect=1.0, flip=False)


def make_samples(dtype: str = "uint16") -> list[Sample]:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 255, (SAMPLES, 6, 8, 3), dtype=np.uint8)
    labels = 300 if dtype == "uint16" else 200
    return [
        Sample(
            key=f"train-{row:08d}",
            row=row + 1000,
            label=row % 7,
            image=smooth[row].repeat(8, 0).repeat(8, 1),
            segments=rng.integers(0, labels, SIZE).astype(dtype),
            meta={},
        )
        for row in range(SAMPLES)
    ]


def write_set(folder: Path, samples: list[Sample], image_format: str) -> Card:
    (folder / "train").mkdir(parents=True)
    shards = tuple(
        write_shard(
            folder / "train" / f"train-{n:06d}.tar",
            pack_shard(samples[20 * n : 20 * n + 20], image_format),
        )
        for n in range(3)
    )
    return Card(
        classes=tuple("abcdefg"),
        class_names=tuple("abcdefg"),
        height=SIZE[0],
        width=SIZE[1],
        image_format=image_format,
        segments_dtype=str(samples[0].segments.dtype),
        max_superpixels=300,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        splits={"train": Split(images=SAMPLES, rejected=0, shards=shards, class_counts=())},
    )


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Card, list[Sample]]:
    samples = make_samples()
    return tmp_path, write_set(tmp_path, samples, "rgb"), samples


def batches(
    data: Path, card: Card, count: int, *, start: Position | None = None, **changes: int
) -> list[Batch]:
    options = {"batch_size": 16, "rank": 0, "ranks": 1, "seed": 0} | changes
    stream = train_batches(
        data,
        card,
        start=start or Position(),
        augmentation=Augmentation(),
        device=CPU,
        batch_size=options["batch_size"],
        rank=options["rank"],
        ranks=options["ranks"],
        seed=options["seed"],
    )
    return list(islice(stream, count))


@pytest.mark.parametrize("samples", [7, 64, 1000, 1001])
@pytest.mark.parametrize("batch_size", [7, 64, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_place_falls_to_one_rank_in_one_step_and_no_batch_is_empty(
    samples: int, batch_size: int, ranks: int
) -> None:
    fewest = samples // -(-samples // batch_size)
    if fewest < ranks:
        with pytest.raises(DataError, match="fewer workers"):
            steps_per_epoch(samples, batch_size, ranks)
        return
    steps = steps_per_epoch(samples, batch_size, ranks)
    places: list[int] = []
    for step in range(steps):
        first, stop = step_range(samples, steps, step)
        assert stop - first <= batch_size
        for rank in range(ranks):
            low, high = rank_range(first, stop, rank, ranks)
            assert 0 < high - low <= -(-batch_size // ranks)
            places += range(low, high)
    assert places == list(range(samples))


@pytest.mark.parametrize(("samples", "batch_size", "ranks"), [(3, 64, 4), (64, 3, 4), (0, 8, 1)])
def test_fewer_images_than_ranks_are_refused_with_the_remedy(
    samples: int, batch_size: int, ranks: int
) -> None:
    with pytest.raises(DataError, match="fewer workers"):
        steps_per_epoch(samples, batch_size, ranks)


def test_order_is_a_permutation_that_changes_with_epoch_and_seed_alone() -> None:
    order = epoch_order(1000, 0, 0)
    assert sorted(order) == list(range(1000))
    assert (order == epoch_order(1000, 0, 0)).all()
    for other in (epoch_order(1000, 0, 1), epoch_order(1000, 1, 0)):
        assert (order == other).mean() < 0.01
        # a uniform shuffle moves a sample by a third of the length on average
        assert abs(np.abs(np.argsort(order) - np.argsort(other)).mean() - 1000 / 3) < 30


def test_crops_stay_inside_and_keep_the_stated_area() -> None:
    augmentation = Augmentation(min_area=0.5, max_aspect=1.3)
    start, end = crop_regions(5000, 0, Position(epoch=3, step=2), SIZE, augmentation)
    low, high = np.minimum(start, end), np.maximum(start, end)
    assert (low >= -1e-4).all()
    assert (high <= np.array(SIZE) + 1e-4).all()
    shares = (high - low).prod(axis=1) / np.prod(SIZE)
    assert shares.min() > 0.5 / 1.3  # the aspect is cut where it would leave the image
    assert shares.mean() == pytest.approx(0.745, abs=0.02)
    assert (start[:, 1] > end[:, 1]).mean() == pytest.approx(0.5, abs=0.03)
    assert (start[:, 0] <= end[:, 0]).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("image_format", ["rgb", "jpg"])
def test_evaluation_gives_every_stored_sample_once_in_order(
    tmp_path: Path, image_format: str, dtype: str
) -> None:
    samples = make_samples(dtype)
    card = write_set(tmp_path, samples, image_format)
    found = list(
        evaluation_batches(tmp_path, card, "train", batch_size=10, first=0, stop=6, device=CPU)
    )
    assert [len(batch.labels) for batch in found] == [10, 10, 10, 10, 10, 3]
    assert torch.cat([b.index for b in found]).tolist() == [s.row for s in samples]
    assert torch.cat([b.labels for b in found]).tolist() == [s.label for s in samples]
    segments = torch.cat([b.segments for b in found]).numpy()
    assert (segments == np.stack([s.segments for s in samples])).all()
    images = torch.cat([b.images for b in found]).numpy().transpose(0, 2, 3, 1)
    difference = np.abs(images.astype(int) - np.stack([s.image for s in samples]))
    assert difference.mean() < (0.5 if image_format == "rgb" else 4)
    assert image_format == "jpg" or difference.max() == 0


def test_a_range_of_evaluation_batches_equals_that_part_of_all(
    stored: tuple[Path, Card, list[Sample]],
) -> None:
    data, card, _ = stored
    whole, part = (
        list(
            evaluation_batches(
                data, card, "train", batch_size=10, first=first, stop=stop, device=CPU
            )
        )
        for first, stop in ((0, 6), (2, 4))
    )
    assert len(part) == 2
    for a, b in zip(whole[2:4], part, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.index, b.index)


def nearest(labels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The label at the source pixel that holds each output pixel's centre."""
    places = [
        np.floor(start[axis] + (np.arange(n) + 0.5) * (end[axis] - start[axis]) / n).astype(int)
        for axis, n in enumerate(labels.shape)
    ]
    return labels[np.ix_(*places)]


def linear(image: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Bilinear samples at each output pixel's centre, edges repeated."""
    result = image.astype(np.float64)
    for axis in (0, 1):
        n = image.shape[axis]
        centre = start[axis] + (np.arange(n) + 0.5) * (end[axis] - start[axis]) / n - 0.5
        low = np.floor(centre).astype(int)
        share = (centre - low).reshape([-1 if a == axis else 1 for a in range(3)])
        below = result.take(np.clip(low, 0, n - 1), axis)
        above = result.take(np.clip(low + 1, 0, n - 1), axis)
        result = below * (1 - share) + above * share
    return result


def test_image_and_superpixels_are_cropped_and_flipped_alike(
    stored: tuple[Path, Card, list[Sample]],
) -> None:
    data, card, samples = stored
    by_row = {sample.row: sample for sample in samples}
    for step, batch in enumerate(batches(data, card, 4)):
        start, end = crop_regions(
            batch.total, 0, Position(epoch=0, step=step), SIZE, Augmentation()
        )
        for n, row in enumerate(batch.index.tolist()):
            expected = nearest(by_row[row].segments, start[n], end[n])
            assert (batch.segments[n].numpy() == expected).all()
            reference = linear(by_row[row].image, start[n], end[n])
            image = batch.images[n].numpy().transpose(1, 2, 0)
            assert np.abs(image - reference).max() <= 1.0


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_exactly_the_batches_that_one_rank_sees(
    stored: tuple[Path, Card, list[Sample]], ranks: int
) -> None:
    data, card, _ = stored
    alone = batches(data, card, 9)
    parts = [batches(data, card, 9, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step, whole in enumerate(alone):
        shares = [part[step] for part in parts]
        assert torch.equal(torch.cat([share.index for share in shares]), whole.index)
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
        assert torch.equal(torch.cat([share.segments for share in shares]), whole.segments)
        assert [share.offset for share in shares] == [
            sum(len(before.labels) for before in shares[:rank]) for rank in range(ranks)
        ]
        assert {share.total for share in shares} == {len(whole.labels)}


def test_every_sample_comes_once_an_epoch(stored: tuple[Path, Card, list[Sample]]) -> None:
    data, card, samples = stored
    rows = sorted(sample.row for sample in samples)
    found = batches(data, card, 8)
    for epoch in (found[:4], found[4:]):
        assert sorted(torch.cat([batch.index for batch in epoch]).tolist()) == rows


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_resuming_at_any_step_gives_the_same_bytes(
    stored: tuple[Path, Card, list[Sample]], stop: int
) -> None:
    data, card, _ = stored
    whole = batches(data, card, 8)
    start = Position(epoch=stop // 4, step=stop % 4)  # 53 images in 4 steps an epoch
    rest = batches(data, card, 8 - stop, start=start)
    for a, b in zip(whole[stop:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.segments, b.segments)
        assert torch.equal(a.index, b.index)


def test_without_augmentation_training_gives_the_stored_pixels(
    stored: tuple[Path, Card, list[Sample]],
) -> None:
    data, card, samples = stored
    by_row = {sample.row: sample for sample in samples}
    stream = train_batches(
        data,
        card,
        batch_size=16,
        rank=0,
        ranks=1,
        seed=0,
        start=Position(),
        augmentation=PLAIN,
        device=CPU,
    )
    batch = next(stream)
    for n, row in enumerate(batch.index.tolist()):
        assert (batch.images[n].numpy().transpose(1, 2, 0) == by_row[row].image).all()
        assert (batch.segments[n].numpy() == by_row[row].segments).all()


def test_batches_stay_valid_after_later_ones_are_made(
    stored: tuple[Path, Card, list[Sample]],
) -> None:
    data, card, _ = stored
    kept = batches(data, card, 12)
    again = batches(data, card, 12)
    assert all(torch.equal(a.images, b.images) for a, b in zip(kept, again, strict=True))


def test_a_missing_index_a_cut_shard_and_a_missing_shard_are_named(
    stored: tuple[Path, Card, list[Sample]],
) -> None:
    data, card, _ = stored
    index = data / "train" / "train-000001.idx"
    content = index.read_bytes()
    index.unlink()
    with pytest.raises(DataError, match=r"train-000001\.idx is missing"):
        batches(data, card, 1)
    index.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"train-000001\.idx is not a whole"):
        batches(data, card, 1)
    index.write_bytes(content)
    shard = data / "train" / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"train-000002\.tar has \d+ bytes"):
        batches(data, card, 1)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar is missing"):
        batches(data, card, 1)


def test_augmentation_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="min_area 0"):
        Augmentation(min_area=0.0)
