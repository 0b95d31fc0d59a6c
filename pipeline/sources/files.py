"""The files of a source, in a local folder or on object storage: names, and ranges of bytes."""

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import pyarrow as pa

from pipeline import storage
from pipeline.ahead import submit_ahead
from pipeline.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
Range = tuple[str, int | None, int | None]  # path, offset and size in bytes; None: the whole file
Entries = tuple[list[str], list[str]]  # names of folders and of files

LIST_SUFFIXES = (".csv", ".parquet")
FILE_SUFFIXES = (*LIST_SUFFIXES, ".tar", ".tar.gz", ".tgz")  # of a URI that is no folder
STREAMS = 32  # requests at once to object storage; each takes tens of milliseconds


class SourceFiles:
    """The files below `source`, a folder or URI, by paths relative to it with forward slashes.

    A source may also be one file, an archive or a list: it counts as a folder that holds only that
    file, and paths are relative to the folder where it lies. Absolute paths and URIs are read too,
    since a list may name them. only: the name of that file; None for a folder.

    A context manager, which closes the archives that it opened. Raises UserError where the source
    does not exist.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.remote = storage.is_remote(source)
        if self.remote:
            is_file = storage.name(source).lower().endswith(FILE_SUFFIXES)
        else:
            path = storage.local_path(source)
            is_file = path.is_file()
            if not is_file and not path.is_dir():
                raise UserError(
                    f"source {source} does not exist on this node; name a folder of images or "
                    "archives, an archive or a list, and mount it on every node."
                )
        self.only = storage.name(source) if is_file else None
        self._folder = storage.parent(source) if is_file else source
        self._root = "" if self.remote else str(storage.local_path(self._folder))
        self._opened: dict[str, pa.NativeFile] = {}
        self._opening = threading.Lock()
        may_be_remote = self.remote or is_list(self.only or "")
        self._pool = ThreadPoolExecutor(STREAMS) if may_be_remote else None

    def location(self, path: str = "") -> str:
        """Return the location of a file or folder; of the source itself by default."""
        if not path or path.startswith("/") or "://" in path:
            return path or self.source
        return storage.join(self._folder, *path.split("/"))

    def entries(self, path: str = "") -> Entries:
        """Return the sorted names of the folders and of the files in a folder, without hidden ones.

        Both are empty where the folder does not exist.
        """
        folders: list[str] = []
        names: list[str] = []
        if self.only is not None:
            return [], [] if path else [self.only]
        if self.remote:
            folders, names = map(list, storage.entries(self.location(path)))
        else:
            try:
                with os.scandir(self._local(path)) as entries:
                    for entry in entries:
                        (folders if entry.is_dir() else names).append(entry.name)
            except (FileNotFoundError, NotADirectoryError):
                pass
        return _sorted_without_hidden(folders), _sorted_without_hidden(names)

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """Yield every folder from the root down, in sorted order, with the names of its files.

        Links are followed, and no folder comes twice.
        """
        return self._walk("", self.entries(), set())

    def _walk(
        self, path: str, entries: Entries, visited: set[str]
    ) -> Iterator[tuple[str, list[str]]]:
        if not self.remote:
            real = os.path.realpath(self._local(path))
            if real in visited:  # a link back to a folder above
                return
            visited.add(real)
        folders, names = entries
        yield path, names
        children = [path_in(path, name) for name in folders]
        for child, entries in zip(children, self.ahead(self.entries, children), strict=True):
            yield from self._walk(child, entries, visited)

    def ahead(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield `function(item)` for each item, in order; STREAMS at once on object storage."""
        return (call() for call in self._calls(function, items))

    def fetch(self, ranges: Iterable[Range]) -> Iterator[Callable[[], bytes]]:
        """Yield a function for each range that returns its bytes, or raises, as `read` does.

        On object storage STREAMS of them are requested before they are called.
        """
        return self._calls(lambda each: self.read(*each), ranges)

    def _calls(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Callable[[], Result]]:
        if self._pool is None:
            return (partial(function, item) for item in items)
        return (x.result for x in submit_ahead(self._pool, function, items, STREAMS))

    def size(self, path: str) -> int:
        """Return the size of a file in bytes."""
        return int(self._open(path).size())

    def read(self, path: str, offset: int | None = None, size: int | None = None) -> bytes:
        """Read a whole file, or `size` bytes of it from `offset` on.

        A file that is read in ranges stays open. Raises FileNotFoundError for a whole file that is
        missing, other OSErrors as the local disk does, and UserError where object storage cannot
        be reached or a file ends before the range.
        """
        if offset is None or size is None:
            return self._read_whole(path)
        read = partial(self._open(path).read_at, size, offset)
        data = storage.attempt(self.location(path), read) if self.remote else read()
        if len(data) < size:
            raise UserError(
                f"{self.location(path)} has {len(data)} of {size} bytes at {offset}: it has "
                "changed since it was listed; run the same command again."
            )
        return data

    def read_optional(self, path: str) -> bytes:
        """Read a whole file; empty where it does not exist."""
        try:
            return self.read(path)
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def _read_whole(self, path: str) -> bytes:
        if not self.remote and "://" not in path:
            with open(self._local(path), "rb", 0, opener=_open_at_once) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError(errno.ENXIO, "it is a pipe or a device", path)
                return file.readall()
        try:
            return storage.read_bytes(self.location(path))
        except storage.MissingError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error

    def _local(self, path: str) -> str:
        if path.startswith("/"):
            return path
        return f"{self._root}/{path}" if path else self._root

    def _open(self, path: str) -> pa.NativeFile:
        """Return a file that stays open."""
        with self._opening:
            if path not in self._opened:
                self._opened[path] = storage.open_input(self.location(path))
            return self._opened[path]

    def __enter__(self) -> "SourceFiles":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for file in self._opened.values():
            file.close()
        self._opened.clear()


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe too, without waiting for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def is_list(name: str) -> bool:
    """Return whether a source of this name is a list of images."""
    return name.lower().endswith(LIST_SUFFIXES)


def path_in(folder: str, name: str) -> str:
    """Return the path of `name` in a folder of a source, whose root is the empty path."""
    return f"{folder}/{name}" if folder else name


def _sorted_without_hidden(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))
