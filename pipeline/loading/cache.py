"""Shards of a remote set, downloaded to this machine before use and shared by its processes.

    FOLDER/<sha256>.tar    a shard whose hash has been checked; .idx, computed from it, beside it
    FOLDER/<sha256>.part   a shard that is being downloaded, with its space already allocated
    FOLDER/lock            two bytes per shard to lock, at an offset from its hash: the processes
                           that use the shard share the first, the process that downloads it locks
                           the second, and evicting it takes both

Files are named by their content, so sets and versions never mix. Locks belong to open files and
end with their process, however it ends. The folder must be on a file system of this machine.
"""

import errno
import fcntl
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline import storage
from pipeline.errors import UserError
from pipeline.loading.order import AHEAD, Order, shards_at_once
from pipeline.shards.format import Manifest, Shard, index_shard, sha256_file, split_of

GIB = 1 << 30
DEFAULT_LIMIT = 100.0  # GiB
INDEX_BYTES = 320  # of a sample's line in the index, at most
HASH_ATTEMPTS = 2
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk or quota
ROOM_OFFSET = 1 << 62  # of the lock for counting and evicting
ROOM_POLL = 0.2  # seconds between looks whether other shards were released
ROOM_WAIT = 60.0  # seconds after which `path` gives up
CACHED = re.compile(r"[0-9a-f]{64}\.(tar|idx|part)")


class NoRoomError(UserError):
    """The limit is reached and every cached shard is in use."""


def default_folder() -> Path:
    """Return a folder in XDG_CACHE_HOME or ~/.cache. Raises UserError for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder for a cache of shards; set XDG_CACHE_HOME, or give a "
            "folder for it."
        ) from error
    return Path(base) / "adversarial-localization" / "shards"


def check_use(data: str | None, folder: Path | None, limit: float) -> None:
    """Raise UserError for a cache's folder or limit beside a local set, which needs none."""
    if data and not storage.is_remote(data) and (folder or limit != DEFAULT_LIMIT):
        raise UserError(f"{data} is a local folder, read in place; leave the cache's flags out.")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The cache. folder: None for each node's `default_folder`. limit_bytes: of all its files."""

    folder: Path | None = None
    limit_bytes: int = round(DEFAULT_LIMIT * GIB)


def _lock(descriptor: int, kind: int, offset: int, wait: bool = True) -> bool:
    """Set or drop (F_UNLCK) the lock of one byte. Return False where another process has it.
    Open-file-description locks: those of two openings of the file exclude each other even within a
    process, and any number of them needs one descriptor. See fcntl(2)."""
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    try:
        fcntl.fcntl(descriptor, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, offset, 1, 0))
    except OSError as error:
        if not wait and error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _use_offset(sha256: str) -> int:
    """Return the offset of the byte that a shard's users lock; its downloader locks the next."""
    return 2 * int(sha256[:15], 16)


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"


class ShardCache:
    """Gives the shards of one split as local files. Those of a remote set are copied to `folder`,
    which never exceeds `limit_bytes`: the least recently used shards that no process uses are
    evicted. A shard is in use from `path` until `release`. Not to be shared by threads."""

    def __init__(
        self, data: str | Path, manifest: Manifest, split: str, config: CacheConfig
    ) -> None:
        """Open the cache. Raises UserError for an unusable folder or a limit below one shard."""
        self._ahead: list[Shard] = []  # to prefetch, and to keep until they are used
        self._thread: threading.Thread | None = None
        self._mutex = threading.Lock()  # guards the two above
        self._use = -1  # descriptor that holds the shared locks
        folder = config.folder or default_folder()
        self.data, self.split, self.folder, self.limit = data, split, folder, config.limit_bytes
        self.shards = split_of(manifest, split).shards
        self.remote = storage.is_remote(data)
        if not self.remote:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._use = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} cannot be used ({error}); give another one."
            ) from error
        largest = max(self.shards, key=cached_bytes, default=None)
        _check_limit(data, split, [largest] if largest else [], self.limit)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Release all shards and stop prefetching."""
        with self._mutex:
            self._ahead = []
        if self._use >= 0:
            os.close(self._use)
            self._use = -1

    def check_limit(self, numbers: Collection[int]) -> None:
        """Raise UserError where shards that will be in use at once exceed the limit."""
        shards = [self.shards[number] for number in set(numbers)]
        _check_limit(self.data, self.split, shards, self.limit)

    def path(self, number: int) -> Path:
        """Return the local file of the split's shard `number`, its index beside it, once it exists
        and its SHA-256 is right. Raises UserError where it cannot be fetched."""
        shard = self.shards[number]
        if not self.remote:
            return storage.local_path(self.data) / self.split / shard.name
        with self._mutex:
            self._ahead = [other for other in self._ahead if other is not shard]
        deadline = time.monotonic() + ROOM_WAIT
        while True:
            _lock(self._use, fcntl.F_RDLCK, _use_offset(shard.sha256))
            if self._has(shard):
                break
            _lock(self._use, fcntl.F_UNLCK, _use_offset(shard.sha256))
            try:
                self._fetch(shard, kept=())
            except NoRoomError:  # others may be done with theirs soon
                if time.monotonic() > deadline:
                    raise
                time.sleep(ROOM_POLL)
        path = self._file(shard, "tar")
        now = time.time_ns()  # finer than the file system's own clock
        os.utime(path, ns=(now, now))
        return path

    def release(self, number: int) -> None:
        """End this process's use of a shard. Evicted, it takes space while something maps it."""
        if self.remote:
            _lock(self._use, fcntl.F_UNLCK, _use_offset(self.shards[number].sha256))

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start fetching these shards in the background, in order, in place of those of an earlier
        call. Shards in use and others of `numbers` are not evicted for them. A failure is not
        raised here: `path` will meet it again."""
        if not self.remote:
            return
        with self._mutex:
            self._ahead = [self.shards[number] for number in numbers]
            if self._thread is None:
                self._thread = threading.Thread(target=self._prefetch, daemon=True)
                self._thread.start()

    def _prefetch(self) -> None:
        failed: set[str] = set()
        while True:
            with self._mutex:
                waiting = (x for x in self._ahead if x.sha256 not in failed and not self._has(x))
                shard = next(waiting, None)
                if shard is None:
                    self._thread = None
                    return
                kept = {other.sha256 for other in self._ahead}
            try:
                self._fetch(shard, kept)
            except NoRoomError:
                time.sleep(ROOM_POLL)
            except (UserError, OSError):
                failed.add(shard.sha256)

    def _file(self, shard: Shard, extension: str) -> Path:
        return self.folder / f"{shard.sha256}.{extension}"

    def _has(self, shard: Shard) -> bool:
        """Return whether the shard is complete. Its hash was checked before it got its name."""
        try:
            size = self._file(shard, "tar").stat().st_size
        except FileNotFoundError:
            return False
        return size == shard.bytes and self._file(shard, "idx").exists()

    @contextmanager
    def _locked(self, *offsets: int, wait: bool = True) -> Iterator[bool]:
        """Lock these bytes while the context lasts; without `wait` yield whether it has them."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            yield all(_lock(descriptor, fcntl.F_WRLCK, offset, wait) for offset in offsets)
        finally:
            os.close(descriptor)  # and with it the locks

    def _fetch(self, shard: Shard, kept: Collection[str]) -> None:
        """Download the shard into the folder; of several processes one does, the others wait. kept:
        hashes of shards not to be evicted for it."""
        part, index = self._file(shard, "part"), self._file(shard, "idx")
        with self._locked(_use_offset(shard.sha256) + 1):
            if self._has(shard):
                return
            try:
                with part.open("wb") as file:
                    self._reserve(file, shard, kept)
                    self._download(file, shard)
                    os.fsync(file.fileno())
                with index.open("wb") as file:
                    file.write(index_shard(part))
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self._file(shard, "tar"))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise UserError(
                    f"the disk of the cache folder {self.folder} on host {socket.gethostname()} is "
                    f"full, and no unused shard is left to evict: {shard.name} needs "
                    f"{_gib(cached_bytes(shard))}. Free space or give another folder."
                ) from error
            finally:
                part.unlink(missing_ok=True)

    def _reserve(self, file: BinaryIO, shard: Shard, kept: Collection[str]) -> None:
        """Allocate the disk space of a shard; evict others to stay within the limit and disk."""
        needed = cached_bytes(shard)
        with self._locked(ROOM_OFFSET):
            used, unused = self._unused(kept)
            while used + needed > self.limit:
                if not unused:
                    raise NoRoomError(
                        f"no room for {shard.name} in the cache {self.folder}: shards of "
                        f"{_gib(used)} are in use, its limit is {_gib(self.limit)}; give a limit "
                        f"of at least {_gib(used + needed)}."
                    )
                used -= self._evict(unused.pop(0))
            while True:
                try:
                    os.posix_fallocate(file.fileno(), 0, shard.bytes)
                    break
                except OSError as error:
                    if error.errno not in FULL or not unused:
                        raise
                self._evict(unused.pop(0))
            with self._file(shard, "idx").open("wb") as index:
                index.truncate(INDEX_BYTES * shard.images)  # counted, filled later

    def _unused(self, kept: Collection[str]) -> tuple[int, list[str]]:
        """Return the bytes of all files in the cache, and the hashes of shards to evict. The least
        recently used comes first; shards that another process uses are among them."""
        used, last = 0, dict[str, int]()
        for entry in os.scandir(self.folder):
            if not CACHED.fullmatch(entry.name):
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # deleted just now
            sha256 = entry.name.split(".")[0]
            used += status.st_size
            last[sha256] = max(last.get(sha256, 0), status.st_mtime_ns)
        return used, sorted(last.keys() - set(kept), key=lambda sha256: (last[sha256], sha256))

    def _evict(self, sha256: str) -> int:
        """Delete the files of a shard; return the bytes freed, 0 where a process uses it."""
        use, freed = _use_offset(sha256), 0
        with self._locked(use + 1, use, wait=False) as is_unused:
            for path in self.folder.glob(f"{sha256}.*") if is_unused else ():
                freed += path.stat().st_size
                path.unlink()
        return freed

    def _download(self, file: BinaryIO, shard: Shard) -> None:
        location = storage.join(self.data, self.split, shard.name)
        for _ in range(HASH_ATTEMPTS):
            try:
                storage.copy_into(file, location)
            except storage.MissingError as error:
                raise UserError(f"{location} is missing; upload it again.") from error
            if (sha256 := sha256_file(Path(file.name))) == shard.sha256:
                return
        raise UserError(
            f"{location} has SHA-256 {sha256}, dataset.json says {shard.sha256} (read "
            f"{HASH_ATTEMPTS} times): it was damaged or replaced; upload it again."
        )


def _check_limit(data: str | Path, split: str, shards: Sequence[Shard], limit: int) -> None:
    needed = sum(cached_bytes(shard) for shard in shards)
    if storage.is_remote(data) and needed > limit:
        raise UserError(
            f"the cache's limit of {_gib(limit)} is too small: {len(shards)} shards of "
            f"{storage.join(data, split)} are needed at once, {_gib(needed)}; give a larger one, "
            "or copy the set to a local disk and use that."
        )


def check_window(
    data: str | Path, manifest: Manifest, limit: int, order: Order, ranks: int
) -> None:
    """Raise UserError where a cache of `limit` bytes is too small for training in this order. A
    rank may wait for its batch while another uses shards of the one before: both need room."""
    shards = split_of(manifest, "train").shards
    if order.window is None or order.window >= len(shards):
        return
    reach = order.batch_size * (1 + AHEAD if ranks > 1 else 1)
    count = shards_at_once([shard.images for shard in shards], order.window, reach)
    largest = sorted(shards, key=cached_bytes, reverse=True)[:count]
    _check_limit(data, "train", largest, limit)


def cached_bytes(shard: Shard) -> int:
    """Return the bytes that a shard and its index take in the cache."""
    return shard.bytes + INDEX_BYTES * shard.images
