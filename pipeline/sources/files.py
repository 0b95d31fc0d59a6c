"""The files of a source, in a local folder or on object storage: names, and ranges of bytes."""

import errno
import os
import socket
import stat
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar, cast

import pyarrow as pa

from pipeline import storage
from pipeline.ahead import submit_ahead
from pipeline.errors import UserError
from pipeline.sources.listing import is_image

Item = TypeVar("Item")
Result = TypeVar("Result")
Range = tuple[str, int | None, int | None]  # path, offset and size in bytes; None: the whole file
Entries = tuple[list[str], list[str]]  # names of folders and of files

LIST_SUFFIXES = (".csv", ".parquet")
FILE_SUFFIXES = (*LIST_SUFFIXES, ".tar", ".tar.gz", ".tgz")  # of a URI that is no folder
# Of one file or folder, such as `lost+found`; those of a disk or network must end the job.
FAULTS_OF_A_FILE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
}
STREAMS = 32  # requests at once to object storage; each takes tens of milliseconds


class Contents(NamedTuple):
    """The sorted names in a folder, hidden ones too. others: names of what is neither file nor
    folder to read, each with the reason as `kind: why`; an empty name is the folder itself."""

    folders: list[str]
    files: list[str]
    others: list[tuple[str, str]]


class SourceFiles:
    """The files below `source`, a folder or URI, by paths relative to it with forward slashes. A
    source may also be one file, an archive or a list: it counts as a folder that holds only that
    file, and paths are relative to the folder where it lies. Absolute paths and URIs are read too,
    since a list may name them. only: the name of that file; None for a folder. used: the
    `path_hash` of each file that was read, or whose size was. A context manager, which closes the
    archives that it opened. Raises UnreachableError where the source is not there or is empty."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.remote = storage.is_remote(source)
        if self.remote:
            is_file = storage.name(source).lower().endswith(FILE_SUFFIXES)
        else:
            path = storage.local_path(source)
            is_file = path.is_file()
            if not is_file and (reason := _why_unseen(str(path))):
                raise storage.UnreachableError(
                    f"source {source} cannot be read on host {socket.gethostname()} ({reason}); "
                    "name a folder of images or archives, an archive or a list, and mount it on "
                    "every node."
                )
        self.only = storage.name(source) if is_file else None
        self._folder = storage.parent(source) if is_file else source
        self._root = "" if self.remote else str(storage.local_path(self._folder))
        self._contents: dict[str, tuple[str, str, list[tuple[str, str]]]] = {}
        self.used = array("q")
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
        Both are empty where the folder does not exist."""
        folders, files, _ = self.contents(path)
        return _without_hidden(folders), _without_hidden(files)

    def contents(self, path: str = "") -> Contents:
        """Return all that a folder holds, as it was when it was first asked for."""
        if path not in self._contents:
            folders, files, others = self._scan(path)
            # Joined: a list of a million names takes four times as much.
            self._contents[path] = "/".join(sorted(folders)), "/".join(sorted(files)), others
        names, files_text, others = self._contents[path]
        return Contents(_split(names), _split(files_text), others)

    def _scan(self, path: str) -> Contents:
        if self.only is not None:
            return Contents([], [] if path else [self.only], [])
        if self.remote:
            folders, sizes = storage.entries(self.location(path))
            return Contents(folders, [*sizes], [])
        contents, folder = Contents([], [], []), self._local(path)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        _sort_in(entry, folder, contents)
                    except OSError as error:
                        contents.others.append((entry.name, f"unreadable: {error.strerror}"))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            if error.errno not in FAULTS_OF_A_FILE:
                raise
            contents.others.append(("", f"unreadable: {error.strerror}"))
        return contents

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """Yield every folder from the root down, in sorted order, with the names of its files.
        Links are followed, and no folder comes twice."""
        visited: set[str] = set()

        def below(path: str) -> Iterator[tuple[str, list[str]]]:
            real = path if self.remote else os.path.realpath(self._local(path))
            if real in visited:
                return
            visited.add(real)
            folders, names = self.entries(path)
            yield path, names
            paths = [path_in(path, name) for name in folders]
            for child, _ in zip(paths, self.ahead(self.contents, paths), strict=True):
                yield from below(child)

        return below("")

    def ahead(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield `function(item)` for each item, in order; STREAMS at once on object storage."""
        return (call() for call in self._calls(function, items))

    def fetch(self, ranges: Iterable[Range]) -> Iterator[Callable[[], bytes]]:
        """Yield a function for each range that returns its bytes, or raises, as `read` does. On
        object storage STREAMS of them are requested before they are called."""
        return self._calls(lambda each: self.read(*each), ranges)

    def _calls(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Callable[[], Result]]:
        if self._pool is None:
            return (partial(function, item) for item in items)
        return (x.result for x in submit_ahead(self._pool, function, items, STREAMS))

    def size(self, path: str) -> int:
        """Return the size of a file in bytes, of an archive before it is read."""
        self.used.append(path_hash(path))
        return int(self._open(path).size())

    def read(self, path: str, offset: int | None = None, size: int | None = None) -> bytes:
        """Read a whole file, or `size` bytes of it from `offset` on. A file that is read in ranges
        stays open. Raises FileNotFoundError for a missing file, OSErrors of the disk, and UserError
        where storage cannot be reached or a file ends before the range."""
        if offset is None or size is None:
            self.used.append(path_hash(path))
            return self._read_whole(path)
        read = partial(self._open(path).read_at, size, offset)
        data = storage.attempt(self.location(path), read) if self.remote else read()
        if len(data) < size:
            raise UserError(
                f"{self.location(path)} has {len(data)} of {size} bytes at {offset}: it has "
                "changed since it was listed; run the same command again."
            )
        return data

    def open(self, path: str) -> BinaryIO:
        """Open a whole file; of a remote one a copy on the local disk. Raises as `read`."""
        self.used.append(path_hash(path))
        location = self.location(path)
        if not self.remote:
            return Path(self._local(path)).open("rb")
        with storage.naming_full_disk(tempfile.gettempdir()):
            file = tempfile.TemporaryFile()  # noqa: SIM115
            try:
                storage.copy_into(file, location)
            except storage.MissingError as error:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        file.seek(0)
        return cast(BinaryIO, file)

    def refuse_links(self, folders: Iterable[str]) -> None:
        """Raise UserError where two of these folders are one, by a link."""
        paths: dict[str, str] = {}
        for folder in () if self.remote else folders:
            if (first := paths.setdefault(os.path.realpath(self._local(folder)), folder)) != folder:
                raise UserError(
                    f"{self.location(first)} and {self.location(folder)} are the same folder by a "
                    "link, and their names are two classes; remove one of them."
                )

    def sees_folder_of(self, path: str) -> bool:
        """Return whether the folder of a file, also of one that is missing, holds anything on this
        host. True of object storage, which no host mounts."""
        if self.remote or "://" in path:
            return True
        return not _why_unseen(str(Path(os.path.realpath(self._local(path))).parent))

    def set_aside(self, paths: set[str]) -> None:
        """Take files that were read for nothing from those that are `used`."""
        hashes = {*map(path_hash, paths)}
        self.used = array("q", (x for x in self.used if x not in hashes))

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


def _why_unseen(folder: str) -> str:
    """Return why nothing is to be read in a local folder, an empty text where something is. What
    is not mounted on a host is an empty folder there, or none."""
    try:
        with os.scandir(folder) as entries:
            return "" if any(entries) else "it is an empty folder"
    except FileNotFoundError:
        return "it does not exist"
    except OSError as error:
        return str(error.strerror)


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe too, without waiting for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def is_list(name: str) -> bool:
    """Return whether a source of this name is a list of images."""
    return name.lower().endswith(LIST_SUFFIXES)


def path_in(folder: str, name: str) -> str:
    """Return the path of `name` in a folder of a source, whose root is the empty path."""
    return f"{folder}/{name}" if folder else name


def path_hash(path: str) -> int:
    """Return a hash of 64 bits, which differs between processes."""
    return hash(path.encode("utf-8", "backslashreplace"))  # as listings hold names not in UTF-8


def _sort_in(entry: "os.DirEntry[str]", folder: str, contents: Contents) -> None:
    """Add an entry of a local folder to the contents. Raises OSError for a link to itself."""
    if entry.is_dir():
        real = f"{os.path.realpath(entry.path)}/" if entry.is_symlink() else None
        if real and f"{os.path.realpath(folder)}/".startswith(real):
            contents.others.append((entry.name, "link: it leads to a folder above"))
        else:
            contents.folders.append(entry.name)
    elif entry.is_file():
        contents.files.append(entry.name)
    elif not entry.is_symlink() or Path(entry.path).exists():
        contents.others.append((entry.name, "pipe, socket or device: it has no end"))
    elif is_image(entry.name):  # an image that is missing, to be rejected
        contents.files.append(entry.name)
    else:
        contents.others.append((entry.name, "link: it leads to nothing"))


def _split(names: str) -> list[str]:
    return names.split("/") if names else []


def _without_hidden(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]
