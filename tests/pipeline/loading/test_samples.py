import io
import resource
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.loading.cache import CacheConfig, ShardCache
from pipeline.loading.samples import RawBatch, Samples, verify_shard
from pipeline.shards.format import Manifest, Sample, index_shard, sha256_file
from tests.pipeline.made_set import COUNTS, SUPERPIXELS, make_samples, write_set

ALL = np.arange(sum(COUNTS))


def opened(data: Path, manifest: Manifest) -> Samples:
    return Samples(manifest, "train", ShardCache(data, manifest, "train", CacheConfig()))


def read(samples: Samples, indices: np.ndarray) -> RawBatch:
    return samples.read(samples.extents(indices))


def shard_path(data: Path, number: int) -> Path:
    return data / "train" / f"train-{number:06d}.tar"


def with_shards(manifest: Manifest, data: Path) -> Manifest:
    """The manifest of the shards as they are now, as if they had been written so."""
    split = manifest.splits["train"]
    shards = tuple(
        replace(shard, bytes=path.stat().st_size, sha256=sha256_file(path))
        for n, shard in enumerate(split.shards)
        for path in [shard_path(data, n)]
    )
    return replace(manifest, splits={"train": replace(split, shards=shards)})


def rewrite(path: Path, members: list[tuple[str, bytes]]) -> None:
    """Write a shard of these members, and the index that belongs to it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.with_suffix(".idx").write_bytes(index_shard(path))


def read_members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def assert_stored(samples: Samples, indices: np.ndarray, written: list[Sample]) -> None:
    """Reading gives what was written, JPEG within its loss."""
    stored = read(samples, indices)
    chosen = [written[index] for index in indices.tolist()]
    assert stored.labels.tolist() == [sample.label for sample in chosen]
    assert stored.rows.tolist() == [sample.row for sample in chosen]
    assert stored.segments.dtype == samples.manifest.segments_dtype
    assert stored.labels.dtype == stored.rows.dtype == np.int64
    for n, sample in enumerate(chosen):
        assert np.array_equal(stored.segments[n], sample.segments)
        if samples.manifest.image_format == "rgb":
            assert np.array_equal(stored.images[n], sample.image)
        else:
            pixels = simplejpeg.decode_jpeg(stored.images[n])
            assert np.abs(pixels.astype(int) - sample.image).mean() < 6


@pytest.mark.parametrize("segments_dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("image_format", ["rgb", "jpg"])
def test_any_places_give_the_samples_that_were_written(
    tmp_path: Path, image_format: str, segments_dtype: str
) -> None:
    written = make_samples(size=(13, 7), segments_dtype=segments_dtype)
    samples = opened(tmp_path, write_set(tmp_path, written, image_format))
    assert len(samples) == len(written)
    random = np.random.default_rng(0)
    for indices in (ALL, ALL[::-1], random.permutation(ALL)[:9], np.array([40, 40, 0])):
        assert_stored(samples, indices, written)
    path, sample = samples.locate_sample(41)
    assert (path, sample) == (shard_path(tmp_path, 2), 1)


def test_shards_of_no_or_one_sample_are_shards_like_others(tmp_path: Path) -> None:
    written = make_samples(4)
    samples = opened(tmp_path, write_set(tmp_path, written, counts=(0, 1, 0, 3, 0)))
    for number in range(5):
        samples.open(number)
    assert_stored(samples, np.array([3, 0, 1, 2]), written)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def manifest(data: Path) -> Manifest:
    return write_set(data, make_samples(size=(5, 8)))


def test_a_missing_or_cut_index_is_named(data: Path, manifest: Manifest) -> None:
    index = shard_path(data, 1).with_suffix(".idx")
    content = index.read_bytes()
    index.unlink()
    with pytest.raises(UserError, match=r"train-000001\.idx is missing; preprocess again"):
        read(opened(data, manifest), ALL)
    for part in (content[: len(content) // 2], b"", content.replace(b"v1.2", b"v1.1")):
        index.write_bytes(part)
        with pytest.raises(UserError, match=r"train-000001\.idx is not a whole v1\.2 .*Delete it"):
            read(opened(data, manifest), ALL)
    read(opened(data, manifest), ALL[:20])  # the others are sound


def test_a_missing_shard_and_one_of_another_size_are_named(data: Path, manifest: Manifest) -> None:
    path = shard_path(data, 2)
    content = path.read_bytes()
    for wrong in (content[:-5000], content + bytes(tarfile.RECORDSIZE), b""):
        path.write_bytes(wrong)
        fault = rf"train-000002\.tar has {len(wrong)} bytes; .* says {len(content)} .*Delete it"
        with pytest.raises(UserError, match=fault):
            read(opened(data, manifest), ALL)
    path.unlink()
    with pytest.raises(UserError, match=r"train-000002\.tar is missing; .* preprocess again"):
        read(opened(data, manifest), ALL)


def test_an_index_of_another_shard_of_the_same_size_is_refused(
    data: Path, manifest: Manifest
) -> None:
    """Its offsets are right, so only the names in the shard tell."""
    one, other = (shard_path(data, n).with_suffix(".idx") for n in (0, 1))
    words = [[line.split()[1::4] for line in x.read_text().splitlines()[1:]] for x in (one, other)]
    assert words[0] == words[1]
    one.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"train-000000\.idx does not fit .*Delete both"):
        opened(data, manifest).open(0)


def test_a_stale_index_is_refused(data: Path, manifest: Manifest) -> None:
    """Of the shard as it was before a member grew by a block, and of one with fewer samples."""
    path = shard_path(data, 0)
    index, members = path.with_suffix(".idx").read_bytes(), read_members(path)
    for place in (4, 49, 99):  # of the first, an inner and the last sample
        grown = list(members)
        grown[place] = (members[place][0], members[place][1] + b" " * tarfile.BLOCKSIZE)
        rewrite(path, grown)
        changed = with_shards(manifest, data)
        read(opened(data, changed), ALL)
        path.with_suffix(".idx").write_bytes(index)
        with pytest.raises(UserError, match=r"train-000000\.idx .*Delete both"):
            read(opened(data, changed), ALL)
    rewrite(path, members[:-5])
    with pytest.raises(UserError, match=r"names 19 samples, dataset\.json says 20"):
        read(opened(data, with_shards(manifest, data)), ALL)


@given(st.data())
@settings(max_examples=150)
def test_a_mutated_index_is_refused_or_changes_nothing(
    data: Path, manifest: Manifest, choose: st.DataObject
) -> None:
    index = shard_path(data, 2).with_suffix(".idx")
    whole = index.read_bytes()
    content = bytearray(whole)
    for _ in range(choose.draw(st.integers(1, 3))):
        place = choose.draw(st.integers(0, len(content) - 1))
        action = choose.draw(st.sampled_from(["replace", "insert", "delete", "swap"]))
        if action == "replace":
            content[place] = choose.draw(st.sampled_from(b"0123456789- \nrgbsegclsx\xff"))
        elif action == "insert":
            content[place:place] = choose.draw(st.sampled_from([b"9", b"-", b" ", b"9" * 30]))
        elif action == "delete":
            del content[place]
        else:
            content[:] = content[:place] + content[place:][::-1]
    index.write_bytes(content)
    try:
        assert_stored(opened(data, manifest), ALL, make_samples(size=(5, 8)))
    except UserError as error:
        assert "train-000002" in str(error)  # noqa: PT017
        assert "preprocess again" in str(error)  # noqa: PT017
    finally:
        index.write_bytes(whole)


def test_an_inner_sample_that_is_not_where_the_index_says_is_refused(
    data: Path, manifest: Manifest
) -> None:
    """Zeros where sample 7 of the shard was: the size is right, as are its first and last."""
    path = shard_path(data, 1)
    content = bytearray(path.read_bytes())
    step = len(read_members(path)) // 20 * 2 * tarfile.BLOCKSIZE
    content[7 * step : 8 * step] = bytes(step)
    path.write_bytes(content)
    samples = opened(data, manifest)
    read(samples, np.array([20, 26, 28, 39]))
    with pytest.raises(UserError, match=r"train-000001\.idx does not fit .*: sample 7 does not"):
        read(samples, np.array([20, 27, 39]))


@pytest.mark.parametrize("member", ["rgb", "seg", "cls", "row", "json"])
def test_a_sample_that_lacks_a_member_is_refused(
    data: Path, manifest: Manifest, member: str
) -> None:
    path = shard_path(data, 1)
    members = read_members(path)
    for lacking in ("train-00000020", "train-00000025", ""):  # of one sample, then of all
        rewrite(path, [x for x in members if x[0] != f"{lacking or x[0][:14]}.{member}"])
        with pytest.raises(UserError, match=r"train-000001\.idx is not a whole .*rgb, seg, cls"):
            read(opened(data, with_shards(manifest, data)), ALL)


@pytest.mark.parametrize(
    ("label", "superpixel", "fault"),
    [
        *((label, 0, rf"class {label}, .*0 to 6:") for label in (7, 2**31 - 1, -1)),
        *((0, n, rf"superpixel label {n}, .*0 to 299:") for n in (SUPERPIXELS, 2**16 - 1)),
    ],
)
def test_a_class_or_superpixel_that_the_manifest_does_not_have_is_refused(
    tmp_path: Path, label: int, superpixel: int, fault: str
) -> None:
    written = make_samples(segments_dtype="uint16")
    written[25] = replace(written[25], label=label)
    written[25].segments[3, 4] = superpixel
    samples = opened(tmp_path, write_set(tmp_path, written))
    read(samples, np.delete(ALL, 25))
    with pytest.raises(
        UserError, match=rf"sample 5 of .*train-000001\.tar has {fault} .*Delete it"
    ):
        read(samples, ALL)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"width": 9}, "rgb of sample 0 has 120 bytes, which must be 135 at 5 x 9 pixels"),
        ({"segments_dtype": "uint16"}, "seg of sample 0 has 40 bytes, which must be 80"),
        ({"image_format": "jpg"}, "members jpg, seg, cls, row, json"),
    ],
)
def test_a_manifest_of_another_set_is_refused(
    data: Path, manifest: Manifest, changes: dict, fault: str
) -> None:
    with pytest.raises(UserError, match=fault):
        opened(data, replace(manifest, **changes)).open(0)


def test_a_split_whose_shards_hold_another_number_of_images_is_refused(
    data: Path, manifest: Manifest
) -> None:
    split = replace(manifest.splits["train"], images=54)
    with pytest.raises(UserError, match=r"split 'train' hold 53 samples by dataset\.json.* 54;"):
        opened(data, replace(manifest, splits={"train": split}))


def test_every_flipped_byte_of_a_shard_or_its_index_is_found_by_its_hash(
    data: Path, manifest: Manifest
) -> None:
    path, shard = shard_path(data, 1), manifest.splits["train"].shards[1]
    verify_shard(path, shard)
    whole = path.read_bytes()
    for place in (0, 600, len(whole) // 2, len(whole) - 1):  # header, pixels, inside, padding
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        fault = rf"train-000001\.tar has SHA-256 .*says {shard.sha256}: .*Delete it"
        with pytest.raises(UserError, match=fault):
            verify_shard(path, shard)
    path.write_bytes(whole)
    index = path.with_suffix(".idx")
    content = index.read_bytes()
    for place in range(10, len(content), 977):
        index.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match="entries are not those of the shard's headers"):
            verify_shard(path, shard)


def mapped(data: Path) -> set[str]:
    """Names of the shards that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if str(data / "train") in line}


def test_shards_that_are_not_held_are_unmapped_and_opened_again_when_needed(
    data: Path, manifest: Manifest
) -> None:
    samples = opened(data, manifest)
    read(samples, ALL)
    assert len(mapped(data)) == 3
    samples.use_only([1], [2])
    assert mapped(data) == {"train-000001.tar"}
    assert_stored(samples, ALL, make_samples(size=(5, 8)))
    assert len(mapped(data)) == 3
    del samples
    assert mapped(data) == set()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def few_files() -> Iterator[int]:
    """A process that may open 60 more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = open_files() + 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield 60
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_set_of_more_shards_than_files_may_be_open_is_mapped_whole(
    tmp_path: Path, few_files: int
) -> None:
    """ImageNet has 1282 shards, most systems allow 1024 open files."""
    count = 3 * few_files
    written = make_samples(count, size=(4, 4))
    samples = opened(tmp_path, write_set(tmp_path, written, counts=[1] * count))
    files = open_files()
    assert_stored(samples, np.arange(count), written)
    assert len(mapped(tmp_path)) == count
    assert open_files() == files
