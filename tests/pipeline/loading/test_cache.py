import errno
import os
import pwd
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline import storage
from pipeline.errors import UserError
from pipeline.loading import cache as cache_module
from pipeline.loading.cache import (
    DEFAULT_LIMIT,
    INDEX_BYTES,
    CacheConfig,
    ShardCache,
    check_use,
    default_folder,
)
from pipeline.shards.format import Manifest, Shard, index_shard, read_manifest
from pipeline.shards.plan import location_of
from tests import remote
from tests.remote import Proxy

ROOT = Path(__file__).parents[3]
USE_ALL = """
import sys
from pathlib import Path
from pipeline.loading.cache import CacheConfig, ShardCache
from pipeline.shards.format import read_manifest, sha256_file
data, folder = sys.argv[1:3]
manifest = read_manifest(data)
cache = ShardCache(data, manifest, "train", CacheConfig(folder=Path(folder)))
print("ready", flush=True)
sys.stdin.readline()
for number, shard in enumerate(manifest.splits["train"].shards):
    assert sha256_file(cache.path(number)) == shard.sha256
print("used", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WAITS", (0.01, 0.02))
    monkeypatch.setattr(cache_module, "ROOM_WAIT", 0.3)
    monkeypatch.setattr(cache_module, "ROOM_POLL", 0.02)


@dataclass(frozen=True)
class Small:
    """The small set, four train shards of which the last is small, and a cache folder for it."""

    data: str
    manifest: Manifest
    folder: Path

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.manifest.splits["train"].shards

    def cache(self, limit: int = 1 << 30, **others: Any) -> ShardCache:
        """Return a cache of this set, or of another `data` or `manifest`, in the folder."""
        settings: dict[str, Any] = {"data": self.data, "manifest": self.manifest} | others
        config = CacheConfig(folder=self.folder, limit_bytes=limit)
        return ShardCache(**settings, split="train", config=config)

    def space(self, *numbers: int) -> int:
        shards = [self.shards[number] for number in numbers]
        return sum(shard.bytes + INDEX_BYTES * shard.images for shard in shards)

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {"lock"}

    def cached(self) -> list[int]:
        """Return the numbers of the shards in the folder."""
        return [n for n, shard in enumerate(self.shards) if f"{shard.sha256}.tar" in self.names()]


@pytest.fixture
def small(small_set: Path, remote_set: str, proxy: Proxy, tmp_path: Path) -> Small:
    """Return the set through the proxy."""
    folder = tmp_path / "cache"
    folder.mkdir()
    return Small(remote.uri(proxy.endpoint, "small"), read_manifest(small_set), folder)


def wait_for(condition: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_local_set_is_used_in_place(small_set: Path, small: Small) -> None:
    for location in (small_set, str(small_set), f"file://{small_set}"):
        local = small.cache(1, data=location)
        local.prefetch([0, 1])
        local.check_limit(range(4))
        assert local.path(1) == small_set / "train" / "train-000001.tar"
        local.release(1)
    assert not small.names()


def test_remote_shards_and_their_indexes_arrive_as_they_were_written(
    small: Small, small_set: Path, proxy: Proxy
) -> None:
    shards = small.cache()
    for _ in range(2):
        for number, shard in enumerate(small.shards):
            original, path = small_set / "train" / shard.name, shards.path(number)
            assert path.read_bytes() == original.read_bytes()
            index = original.with_suffix(".idx").read_bytes()
            assert path.with_suffix(".idx").read_bytes() == index == index_shard(original)
    assert set(proxy.gets(".tar").values()) == {1}


def test_an_index_is_not_made_from_what_is_no_shard(small_set: Path, tmp_path: Path) -> None:
    whole = (small_set / "train" / "train-000000.tar").read_bytes()
    for content in (whole[:5000], b"x" * 2000, whole[:512] + b"y" * 2000):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar is no shard of samples"):
            index_shard(tmp_path / "a.tar")


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(data: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", USE_ALL, data, str(folder)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def send(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()


def receive(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_processes_fetch_each_shard_once_and_a_killed_one_leaves_nothing_wrong(
    small: Small, proxy: Proxy, processes: list["subprocess.Popen[str]"]
) -> None:
    processes += [start(small.data, small.folder) for _ in range(3)]
    assert [receive(process) for process in processes] == ["ready"] * 3
    proxy.delay = 0.5
    send(processes[0])
    wait_for(lambda: proxy.gets(".tar"))
    wait_for(lambda: any(name.endswith(".part") for name in small.names()))
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    assert small.cached() == []
    proxy.delay = 0.05
    before = sum(proxy.gets(".tar").values())
    for process in processes[1:]:
        send(process)
    assert [receive(process) for process in processes[1:]] == ["used"] * 2
    assert sum(proxy.gets(".tar").values()) == before + 4
    assert len(small.names()) == 8  # four shards, four indexes, no half file

    # both still use all four; once one has died the other's use still holds
    full = small.cache(small.space(0, 1, 2, 3))
    for process in processes[1:]:
        assert not any(full._evict(shard.sha256) for shard in small.shards)
        process.kill()
        process.wait()
    assert full._evict(small.shards[0].sha256) > 0


def test_a_server_lost_in_the_middle_is_an_error_and_a_restart_goes_on(
    small: Small, proxy: Proxy
) -> None:
    shards = small.cache()
    shards.path(0)
    proxy.fault = lambda method, name, before: (1000,) if method == "GET" else None
    with pytest.raises(UserError, match=r"train-000001\.tar.* cannot be reached .*3 times"):
        shards.path(1)
    assert proxy.gets("000001.tar") == {"train-000001.tar": 3}
    assert small.cached() == [0]
    assert not any(name.endswith(".part") for name in small.names())
    proxy.stop()
    with pytest.raises(UserError, match="cannot be reached"):
        shards.path(1)
    again = remote.Proxy(proxy.target)
    shards = small.cache(data=remote.uri(again.endpoint, "small"))
    assert shards.path(0).exists()
    assert shards.path(1).stat().st_size == small.shards[1].bytes
    assert again.gets(".tar") == {"train-000001.tar": 1}
    again.stop()


def test_a_connection_lost_once_costs_a_second_attempt(small: Small, proxy: Proxy) -> None:
    proxy.fault = lambda method, name, before: (5000,) if method == "GET" and not before else None
    assert small.cache().path(2).exists()
    assert proxy.gets(".tar") == {"train-000002.tar": 2}


def damaged(name: str, body: bytes, before: int) -> bytes:
    return body[:3000] + bytes([body[3000] ^ 1]) + body[3001:]


def test_a_damaged_shard_is_refused_naming_both_hashes(small: Small, proxy: Proxy) -> None:
    proxy.alter = damaged
    expected = small.shards[1].sha256
    with pytest.raises(UserError, match=rf"train-000001\.tar.* SHA-256 .*says {expected}"):
        small.cache().path(1)
    assert small.names() - {f"{expected}.idx"} == set()
    assert proxy.gets(".tar") == {"train-000001.tar": 2}


def test_damage_on_the_way_is_repaired_by_reading_again(small: Small, proxy: Proxy) -> None:
    proxy.alter = lambda name, body, before: body if before else damaged(name, body, before)
    assert small.cache().path(1).exists()


@pytest.mark.parametrize(
    ("content", "fault"),
    [(None, "is missing"), (b"ab", "has SHA"), (b"ab" * 10**6, "has SHA")],
)
def test_a_shard_of_another_size_or_none_is_refused(
    s3_endpoint: str, small_set: Path, small: Small, content: bytes | None, fault: str
) -> None:
    uri = remote.upload(small_set / "train", s3_endpoint, "other/train")
    system, path = remote.client(s3_endpoint), "sets/other/train/train-000000.tar"
    system.delete_file(path)
    if content is not None:
        with system.open_output_stream(path) as file:
            file.write(content)
    with pytest.raises(UserError, match=rf"train-000000\.tar.* {fault}.*[Uu]pload it again"):
        small.cache(data=uri.replace("other/train", "other")).path(0)
    assert small.cached() == []


def test_a_cached_file_cut_short_is_fetched_again(small: Small, proxy: Proxy) -> None:
    shards = small.cache()
    os.truncate(shards.path(0), 1000)
    assert shards.path(0).stat().st_size == small.shards[0].bytes


def test_the_least_recently_used_go_first_and_the_limit_holds_throughout(
    small: Small, proxy: Proxy
) -> None:
    limit = small.space(0, 1)
    shards = small.cache(limit)
    proxy.delay = 0.05
    largest, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not stop.is_set():
            sizes = 0
            for entry in os.scandir(small.folder):
                try:
                    sizes += entry.stat().st_size * (entry.name != "lock")
                except FileNotFoundError:
                    continue
            largest = max(largest, sizes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    numbers = []
    for number in (0, 1, 0, 2, 1, 2, 0):
        assert shards.path(number).exists()
        shards.release(number)
        numbers.append(small.cached())
    stop.set()
    watcher.join()
    assert numbers == [[0], [0, 1], [0, 1], [0, 2], [1, 2], [1, 2], [0, 2]]
    assert small.space(0) < largest <= limit


def test_what_was_deleted_by_hand_or_left_by_a_killed_process_is_counted_anew(small: Small) -> None:
    """A half file of shard 3 that no process works on, and the files of shard 0 gone."""
    limit = small.space(0, 1)
    shards = small.cache(limit)
    for path in (shards.path(0), shards.path(0).with_suffix(".idx")):
        path.unlink()
    (small.folder / f"{small.shards[3].sha256}.part").write_bytes(b"x" * 30_000)
    assert shards.path(1).exists()
    assert shards.path(2).exists()
    assert small.cached() == [1, 2]
    assert len(small.names()) == 4


def test_shards_in_use_are_never_evicted(small: Small) -> None:
    limit = small.space(0, 1)
    first, second = (small.cache(limit) for _ in range(2))
    first.path(0)
    second.path(1)
    second.path(0)
    first.release(0)
    with pytest.raises(UserError, match=r"no room for train-000002\.tar .* in use, its limit is"):
        first.path(2)
    assert small.cached() == [0, 1]
    second.close()
    first.path(2)
    assert small.cached() == [0, 2]  # of two unused ones, the one used last stays


def test_a_limit_below_what_is_needed_at_once_is_an_error_up_front(
    small: Small, proxy: Proxy
) -> None:
    with pytest.raises(UserError, match=r"limit of .* is too small: 1 shards .* needed"):
        small.cache(small.space(0) - 1)
    shards = small.cache(small.space(0, 1, 2))
    shards.check_limit([0, 1, 2, 1])
    with pytest.raises(UserError, match=r"4 shards .*/train.* are needed at once"):
        shards.check_limit(range(4))
    assert not proxy.gets(".tar")


def test_prefetching_fetches_what_fits_in_order_and_goes_on_when_room_is_made(
    small: Small, proxy: Proxy
) -> None:
    shards = small.cache(small.space(0, 1))
    order = [2, 1, 0, 3]
    shards.prefetch(order)
    wait_for(lambda: small.cached() == [1, 2])
    time.sleep(0.2)
    assert small.cached() == [1, 2]
    for position, number in enumerate(order):
        shards.path(number)
        shards.release(number)
        following = order[position + 1 : position + 3]
        wait_for(lambda following=following: set(following) <= set(small.cached()))
    assert proxy.gets(".tar") == {f"train-00000{number}.tar": 1 for number in order}


def test_a_failed_prefetch_is_met_by_the_one_who_needs_the_shard(
    small: Small, proxy: Proxy
) -> None:
    proxy.alter = damaged
    shards = small.cache()
    shards.prefetch([0])
    wait_for(lambda: proxy.gets("00.tar") == {"train-000000.tar": 2})
    with pytest.raises(UserError, match="damaged or replaced"):
        shards.path(0)


def test_a_full_disk_evicts_what_is_unused_and_is_then_an_error(small: Small) -> None:
    """A file system that holds two shards, under a limit that allows all."""
    size = f"size={small.space(0, 1) + 20_000}"
    mount = ["mount", "-t", "tmpfs", "-o", size, "aln", str(small.folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        shards = small.cache()
        shards.path(0)
        shards.release(0)
        shards.path(1)
        shards.path(2)
        assert small.cached() == [1, 2]
        with pytest.raises(
            UserError, match=r"the disk of .* is full.*train-000000.* another folder"
        ):
            shards.path(0)
        assert small.cached() == [1, 2]
        assert not any(name.endswith(".part") for name in small.names())
        shards.release(1)
        assert shards.path(0).exists()
    finally:
        subprocess.run(["umount", "-l", small.folder], check=True)


def test_a_disk_that_fills_up_while_writing_is_the_same_error(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"the disk of .* is full"):
        small.cache().path(0)
    assert small.cached() == []


def test_a_folder_that_cannot_be_made_names_the_flag(small: Small) -> None:
    (small.folder / "file").write_bytes(b"")
    with pytest.raises(UserError, match="give another one"):
        replace(small, folder=small.folder / "file" / "cache").cache()


def test_another_version_of_a_set_never_gets_the_old_shards(
    s3_endpoint: str, small_set: Path, small: Small
) -> None:
    """The same address and shard name, other content and manifest, one cache folder."""
    old = small.cache().path(0)
    other = small_set / "train" / "train-000001.tar"
    shards = list(small.shards)
    shards[0] = replace(shards[1], name=shards[0].name)
    split = replace(small.manifest.splits["train"], shards=tuple(shards))
    changed = replace(small.manifest, splits={"train": split})
    uri = remote.upload(small_set / "train", s3_endpoint, "changed/train")
    with remote.client(s3_endpoint).open_output_stream("sets/changed/train/train-000000.tar") as f:
        f.write(other.read_bytes())
    new = small.cache(data=uri.replace("changed/train", "changed"), manifest=changed).path(0)
    assert new != old
    assert new.read_bytes() == other.read_bytes() != old.read_bytes()


def test_a_cache_of_a_local_set_is_refused(tmp_path: Path) -> None:
    check_use("/data", None, DEFAULT_LIMIT)
    check_use("s3://bucket/data", tmp_path, 3.0)
    for folder, limit in ((tmp_path, DEFAULT_LIMIT), (None, 3.0)):
        with pytest.raises(UserError, match="/data is a local folder"):
            check_use("/data", folder, limit)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        default_folder()
    with pytest.raises(UserError, match=r"^~nobody-here/images names no user's home folder"):
        location_of("~nobody-here/images")
