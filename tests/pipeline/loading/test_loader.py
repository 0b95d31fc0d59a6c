import io
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.loading import cache as cache_module
from pipeline.loading import loader as loading
from pipeline.loading.augmentation import Augmentation, augment, draw
from pipeline.loading.cache import CacheConfig, ShardCache, cached_bytes
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.order import AHEAD, Order, Position
from pipeline.loading.samples import JPEG_END, Extents, RawBatch, Samples
from pipeline.shards.format import Manifest, Sample, read_samples
from tests import remote
from tests.pipeline.made_set import MEAN, assert_same, make_samples, write_set

CPU = torch.device("cpu")
FORMATS = ("rgb", "jpg")
Stored = tuple[Path, Manifest]
STEPS = 4  # of an epoch of 53 samples in batches of 16
PLAIN = Augmentation(min_area=1.0, max_aspect=1.0, flip=False)
EVERYTHING = Augmentation(min_area=0.4, max_aspect=1.5, translation=0.2)


@pytest.fixture(scope="module")
def written() -> list[Sample]:
    return make_samples(segments_dtype="uint16")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, written: list[Sample]) -> dict[str, Stored]:
    """The same samples as raw and as JPEG shards."""
    folder = tmp_path_factory.mktemp("sets")
    return {name: (folder / name, write_set(folder / name, written, name)) for name in FORMATS}


@pytest.fixture(scope="module")
def raw(sets: dict[str, Stored]) -> Stored:
    return sets["rgb"]


@pytest.fixture(params=FORMATS)
def shards(sets: dict[str, Stored], request: pytest.FixtureRequest) -> Stored:
    return sets[request.param]


def stream(data: Path | str, manifest: Manifest, **changes: Any) -> Iterator[Batch]:
    """Batches for training; changes: of Order, of CacheConfig, or arguments of `Loader.train`."""

    def given(config: type, **defaults: Any) -> Any:
        names = [field.name for field in fields(config) if field.name in changes]
        return config(**(defaults | {name: changes.pop(name) for name in names}))

    loader = Loader(data, manifest, changes.pop("device", CPU), given(CacheConfig))
    augmentation = changes.pop("augmentation", EVERYTHING)
    return loader.train(given(Order, batch_size=16), augmentation, **changes)


def evaluated(
    data: Path, manifest: Manifest, batch_size: int = 10, device: torch.device = CPU, **part: int
) -> list[Batch]:
    return list(Loader(data, manifest, device).evaluation("train", batch_size, **part))


def pixels(batch: Batch) -> np.ndarray:
    return batch.images.permute(0, 2, 3, 1).cpu().numpy()


def rows(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.rows for batch in batches]).tolist()


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


# The same numbers everywhere.


@pytest.mark.parametrize("segments_dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("batch_size", [1, 10, 53, 64])
def test_evaluation_gives_every_stored_sample_once_in_order_as_it_is(
    tmp_path: Path, segments_dtype: str, batch_size: int
) -> None:
    samples = make_samples(size=(9, 14), segments_dtype=segments_dtype)
    found = evaluated(tmp_path, write_set(tmp_path, samples), batch_size)
    full, rest = divmod(53, batch_size)
    assert [len(batch.labels) for batch in found] == [batch_size] * full + [rest] * (rest > 0)
    assert rows(found) == [sample.row for sample in samples]
    assert torch.cat([b.labels for b in found]).tolist() == [s.label for s in samples]
    segments = torch.cat([batch.segments for batch in found])
    assert segments.dtype == torch.int64
    assert np.array_equal(segments, np.stack([sample.segments for sample in samples]))
    assert np.array_equal(
        np.concatenate([pixels(batch) for batch in found]), np.stack([s.image for s in samples])
    )
    assert {(batch.total, batch.offset) for batch in found} <= {(batch_size, 0), (rest, 0)}
    assert found[0].images.is_contiguous(memory_format=torch.channels_last)


def test_jpeg_decoded_by_dali_is_that_of_simplejpeg_and_pillow_within_a_grey_level(
    sets: dict[str, Stored], written: list[Sample]
) -> None:
    data, manifest = sets["jpg"]
    found = np.concatenate([pixels(batch) for batch in evaluated(data, manifest)]).astype(int)
    cache = ShardCache(data, manifest, "train", CacheConfig())
    samples = Samples(manifest, "train", cache)
    files = samples.read(samples.extents(np.arange(53))).images
    for image, file, sample in zip(found, files, written, strict=True):
        assert np.abs(image - simplejpeg.decode_jpeg(file)).max() <= 1
        assert np.abs(image - np.asarray(Image.open(io.BytesIO(file.tobytes())))).max() <= 1
        assert np.abs(image - sample.image).mean() < 6


def test_a_training_batch_is_the_stored_samples_augmented_as_drawn(shards: Stored) -> None:
    """Put together here from `read_samples`, whose decoder is not the loader's."""
    data, manifest = shards
    stored = {
        sample.row: sample
        for path in sorted((data / "train").glob("*.tar"))
        for sample in read_samples(path, manifest)
    }
    found = list(islice(stream(data, manifest, start=Position(epoch=1)), STEPS))
    for step, batch in enumerate(found):
        chosen = [stored[row] for row in batch.rows.tolist()]
        assert batch.labels.tolist() == [sample.label for sample in chosen]
        drawn = draw(batch.total, 0, Position(epoch=1, step=step), (24, 32), MEAN, EVERYTHING)
        images = torch.from_numpy(np.stack([sample.image for sample in chosen]))
        segments = torch.from_numpy(np.stack([sample.segments for sample in chosen]))
        expected, labels = augment(images, segments, drawn)
        assert torch.equal(batch.segments, labels)
        difference = np.abs(pixels(batch).astype(int) - expected.numpy())
        assert difference.max() <= (0 if manifest.image_format == "rgb" else 2)
        assert (batch.total, batch.offset) == (len(chosen), 0)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ranks", [2, 3, 5, 13])
def test_the_shares_of_any_number_of_ranks_are_one_ranks_batches(
    shards: Stored, ranks: int
) -> None:
    data, manifest = shards
    count = STEPS + 2
    alone = islice(stream(data, manifest), count)
    parts = [islice(stream(data, manifest, rank=rank, ranks=ranks), count) for rank in range(ranks)]
    for whole, *shares in zip(alone, *parts, strict=True):
        for name in ("images", "segments", "labels", "rows"):
            joined = torch.cat([getattr(share, name) for share in shares])
            assert torch.equal(joined, getattr(whole, name)), name
        lengths = [len(share.labels) for share in shares]
        assert [share.offset for share in shares] == [0, *np.cumsum(lengths)[:-1].tolist()]
        assert {share.total for share in shares} == {whole.total} == {sum(lengths)}


@pytest.mark.parametrize("segments_dtype", ["uint8", "uint16"])
def test_several_readers_give_what_one_thread_gives(tmp_path: Path, segments_dtype: str) -> None:
    manifest = write_set(tmp_path, make_samples(segments_dtype=segments_dtype))
    samples = Samples(manifest, "train", ShardCache(tmp_path, manifest, "train", CacheConfig()))

    def decoded(readers: int) -> list[loading.Decoded]:
        requests = loading.training_requests(
            manifest, Order(batch_size=8, window=1), EVERYTHING, Position(), 0, 1, samples.use_only
        )
        return list(islice(loading._raw(samples, requests, readers=readers), 30))

    for one, other in zip(decoded(3), decoded(0), strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.segments, other.segments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_numbers_of_the_cpu(shards: Stored) -> None:
    """Raw pixels bit for bit; JPEG as near as nvJPEG's rounding is to libjpeg's."""
    data, manifest = shards
    cuda = torch.device("cuda")
    found = [
        *islice(stream(data, manifest, device=cuda), 9),
        *evaluated(data, manifest, device=cuda),
    ]
    expected = [*islice(stream(data, manifest), 9), *evaluated(data, manifest)]
    for one, other in zip(found, expected, strict=True):
        assert one.images.is_cuda
        for name in ("segments", "labels", "rows"):
            assert torch.equal(getattr(one, name).cpu(), getattr(other, name)), name
        difference = np.abs(pixels(one).astype(int) - pixels(other))
        assert difference.max() <= (0 if manifest.image_format == "rgb" else 8)


# Epochs, and resuming.


@pytest.mark.parametrize("window", [None, 1])
def test_epochs_have_every_sample_once_and_resume_at_any_step_bit_for_bit_also_with_other_ranks(
    shards: Stored, window: int | None
) -> None:
    data, manifest = shards
    whole = list(islice(stream(data, manifest, window=window, seed=3), 3 * STEPS))
    epochs = [rows(whole[first : first + STEPS]) for first in range(0, 3 * STEPS, STEPS)]
    assert all(sorted(epoch) == list(range(1000, 1053)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for stop in range(2 * STEPS + 1):
        epoch, step = divmod(stop, STEPS)
        settings = {"window": window, "seed": 3, "start": Position(epoch=epoch, step=step)}
        count = min(5, 3 * STEPS - stop)
        assert_same(list(islice(stream(data, manifest, **settings), count)), whole[stop:][:count])
        second = next(stream(data, manifest, rank=1, ranks=2, **settings))
        for name in ("images", "segments", "labels", "rows"):
            assert torch.equal(getattr(second, name), getattr(whole[stop], name)[second.offset :])


@pytest.mark.parametrize("step", [STEPS, 100, -1])
def test_a_position_that_no_epoch_has_is_refused(raw: Stored, step: int) -> None:
    fault = rf"no step {step} .* 53 images in batches of 16 has 4 steps"
    with pytest.raises(UserError, match=fault):
        next(stream(*raw, start=Position(step=step)))


def test_a_range_of_evaluation_batches_is_that_part_of_all(shards: Stored) -> None:
    data, manifest = shards
    whole = evaluated(data, manifest)
    for first, stop in ((0, 1), (2, 4), (5, 6)):
        assert_same(evaluated(data, manifest, first=first, stop=stop), whole[first:stop])
    assert evaluated(data, manifest, first=3, stop=3) == []


# Trust.


def damage(path: Path, sample: int, content: bytes, size: int | None = None) -> None:
    """Put other bytes in place of a sample's image; with `size`, the index says so many."""
    lines = path.with_suffix(".idx").read_text().splitlines()
    words = lines[1 + sample].split()
    offset, there = int(words[1]), int(words[2])
    shard = bytearray(path.read_bytes())
    shard[offset : offset + there] = content[:there].ljust(there, b"\0")
    path.write_bytes(shard)
    words[2] = str(size or there)
    lines[1 + sample] = " ".join(words)
    path.with_suffix(".idx").write_text("\n".join(lines) + "\n")


def test_a_jpeg_that_is_damaged_or_of_another_size_is_named(
    tmp_path: Path, written: list[Sample]
) -> None:
    manifest = write_set(tmp_path, written, "jpg")
    path = tmp_path / "train" / "train-000001.tar"
    shard, index = path.read_bytes(), path.with_suffix(".idx").read_bytes()
    offset, size = (int(word) for word in index.decode().splitlines()[8].split()[1:3])
    whole, end = shard[offset : offset + size], JPEG_END
    wide = simplejpeg.encode_jpeg(np.zeros((24, 40, 3), np.uint8), 50)
    tall = simplejpeg.encode_jpeg(np.zeros((32, 24, 3), np.uint8), 50)
    cut = r"image of sample 7 of .*train-000001\.tar is cut off.* Delete it"
    no_jpeg = r"sample 7 of .*train-000001\.tar is not a JPEG of 24 x 32 .*Delete it"
    for content, fault in (
        *((content, cut) for content in (whole[: size // 2], whole[:-2], b"", b"no image")),
        *((x.ljust(size - 2, b"\0") + end, no_jpeg) for x in (whole[:50], b"no image", wide, tall)),
    ):
        path.write_bytes(shard)
        damage(path, 7, content)
        with pytest.raises(UserError, match=fault):
            evaluated(tmp_path, manifest)
        with pytest.raises(UserError, match=fault):
            list(islice(stream(tmp_path, manifest), STEPS))
        assert len(evaluated(tmp_path, manifest, first=3, stop=6)) == 3  # others are not touched
    path.write_bytes(shard)
    for wrong in (size - 1, size + 1):  # what the index says of an inner sample
        path.with_suffix(".idx").write_bytes(index)
        damage(path, 7, whole, size=wrong)
        with pytest.raises(UserError, match=cut):
            evaluated(tmp_path, manifest)


def test_all_images_of_another_size_are_refused_too(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, make_samples(size=(24, 32)), "jpg")
    with pytest.raises(UserError, match=r"sample 0 of .* is not a JPEG of 32 x 24 .*24, 32, 3"):
        evaluated(tmp_path, replace(manifest, height=32, width=24))


def test_a_local_set_is_checked_whole_before_the_first_batch(
    tmp_path: Path, written: list[Sample]
) -> None:
    """The first batch, of one image and a window of one shard, does not need the bad shard."""
    manifest = write_set(tmp_path, written)
    last, other = (tmp_path / "train" / f"train-00000{n}.idx" for n in (2, 1))
    settings = {"batch_size": 1, "window": 1, "seed": 1}
    assert next(stream(tmp_path, manifest, **settings)).rows.item() < 1040
    last.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"train-000002\.idx does not fit"):
        next(stream(tmp_path, manifest, **settings))


def test_a_cache_that_cannot_hold_the_shards_of_every_batch_is_refused_up_front(
    tmp_path: Path, written: list[Sample]
) -> None:
    """Windows of a shard, one of four samples: a batch may lie across it and both its neighbours,
    in an epoch that may come after days. Nothing is asked of a server before."""
    manifest = write_set(tmp_path, written[:44], counts=(20, 20, 4))
    sizes = [cached_bytes(shard) for shard in manifest.splits["train"].shards]
    settings = {"window": 1, "folder": tmp_path / "cache", "limit_bytes": sum(sizes) - 1}
    with pytest.raises(UserError, match="3 shards of s3://nowhere/train are needed at once"):
        next(stream("s3://nowhere", manifest, **settings))


# Ahead of use, and gone after it.


def test_memory_is_not_used_again_while_a_view_or_an_array_refers_to_it(shards: Stored) -> None:
    kept: list[list[torch.Tensor]] = []
    copies: list[list[torch.Tensor]] = []
    for batch in islice(stream(*shards, batch_size=7), 30):
        array = batch.images.numpy()[2:]
        kept.append([batch.images[:1], batch.segments[1:3], torch.from_numpy(array)])
        copies.append([part.clone() for part in kept[-1]])
        del batch, array
    for parts, expected in zip(kept, copies, strict=True):
        assert all(map(torch.equal, parts, expected))


def test_batches_that_are_done_with_leave_their_memory_to_later_ones(raw: Stored) -> None:
    # Batches of one size: a larger one is put into new memory the first time.
    batches = islice(stream(*raw, batch_size=1), 60)
    assert len({batch.images.data_ptr() for batch in batches}) <= AHEAD + 2  # one is made, one used


def test_batches_are_made_ahead_of_use_and_no_more_than_stated(
    raw: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = threading.Semaphore(0)
    read = Samples.read

    def counted(samples: Samples, extents: Extents, **options: bool) -> RawBatch:
        assert threading.current_thread() is not threading.main_thread()
        made.release()
        return read(samples, extents, **options)

    monkeypatch.setattr(Samples, "read", counted)
    batches = stream(*raw)
    next(batches)
    for _ in range(1 + AHEAD):  # the one that was asked for, and those after it
        assert made.acquire(timeout=10)
    assert not made.acquire(timeout=0.3)
    next(batches)
    assert made.acquire(timeout=10)
    batches.close()  # type: ignore[attr-defined]


def test_a_closed_iterator_leaves_no_thread_and_no_map(shards: Stored) -> None:
    data, manifest = shards
    before = threads()
    batches = stream(data, manifest)
    next(batches)
    assert threads() > before
    batches.close()  # type: ignore[attr-defined]
    assert threads() == before
    assert str(data) not in Path("/proc/self/maps").read_text()
    evaluated(data, manifest)
    dropped = stream(data, manifest)
    next(dropped)
    del dropped
    assert threads() == before


def test_an_error_in_the_thread_reaches_the_caller_and_ends_it(
    shards: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = Samples.read, [0]

    def failing(samples: Samples, extents: Extents, **options: bool) -> RawBatch:
        calls[0] += 1
        if calls[0] == 6:
            raise OSError("the disk is gone")
        return read(samples, extents, **options)

    monkeypatch.setattr(Samples, "read", failing)
    before = threads()
    batches = stream(*shards)
    with pytest.raises(OSError, match="the disk is gone"):
        list(islice(batches, 20))
    assert calls == [6]
    assert threads() == before
    assert list(batches) == []


@pytest.mark.parametrize(("first", "stop"), [(5, 7), (-1, 2), (3, 2), (6, 7)])
def test_batches_that_a_split_does_not_have_are_refused(raw: Stored, first: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"split 'train' has 6 of 10 images"):
        evaluated(*raw, first=first, stop=stop)
    assert evaluated(*raw, first=6, stop=6) == []


@pytest.fixture(scope="module")
def remote_raw(s3_endpoint: str, raw: Stored) -> str:
    return remote.upload(raw[0], s3_endpoint, "made")


def test_a_closed_iterator_of_a_remote_set_fetches_no_more_shards(
    remote_raw: str, raw: Stored, tmp_path: Path
) -> None:
    """The cache holds two of three shards, so the third waits for room until the end."""
    manifest = raw[1]
    limit = sum(sorted(cached_bytes(shard) for shard in manifest.splits["train"].shards)[1:])
    before = threads()
    cache = CacheConfig(folder=tmp_path, limit_bytes=limit)
    batches = Loader(remote_raw, manifest, cache=cache).evaluation("train", 5)
    assert rows([next(batches)]) == [1000, 1001, 1002, 1003, 1004]
    deadline = time.monotonic() + 10
    while len(list(tmp_path.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    batches.close()  # type: ignore[attr-defined]
    while threads() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threads() == before
    again = ShardCache(
        remote_raw, manifest, "train", CacheConfig(folder=tmp_path, limit_bytes=limit)
    )
    assert all(again._evict(shard.sha256) > 0 for shard in manifest.splits["train"].shards[:2])


def test_ranks_in_step_that_share_the_smallest_allowed_cache_do_not_wait_for_each_other(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank's loader is always ahead, with shards of a later window in use, when the other's
    asks for those of an earlier one."""
    monkeypatch.setattr(cache_module, "ROOM_WAIT", 1.0)
    manifest = write_set(tmp_path / "set", make_samples(100), counts=[20] * 5)
    data = remote.upload(tmp_path / "set", s3_endpoint, "in-step")
    space = cached_bytes(manifest.splits["train"].shards[0])

    def two_ranks(shards: int) -> list[Iterator[Batch]]:
        return [
            stream(
                data,
                manifest,
                ranks=2,
                rank=rank,
                window=1,
                folder=tmp_path / f"cache-{shards}",
                limit_bytes=shards * space,
            )
            for rank in (0, 1)
        ]

    with pytest.raises(UserError, match=r"4 shards .* are needed at once"):
        next(two_ranks(3)[0])
    slow, fast = two_ranks(4)
    for _ in range(16):  # batches: two epochs and more
        next(fast)
        time.sleep(0.05)  # it makes those after this one meanwhile
        next(slow)
