"""Reading and writing files in a local folder, or under any URI that pyarrow's file systems open.
Credentials and endpoints come from the environment of their clients (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, AWS_REGION, GOOGLE_APPLICATION_CREDENTIALS, ...)."""

import errno
import fcntl
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, TypeVar
from urllib.parse import parse_qs, quote, unquote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from pipeline.ahead import run_ahead
from pipeline.errors import UserError

Result = TypeVar("Result")

SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
SECRET = re.compile("key|secret|token|passw|sig", re.IGNORECASE)  # names in a URI's query
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts, so one more attempt than waits
CONNECT_SECONDS = 5
SILENT_SECONDS = 10  # without a byte, before a connection counts as lost
CHUNK = 1 << 22  # bytes of one request
STREAMS = 4  # requests at once: one connection seldom fills a network card
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system has no hard links
REFUSED = (  # words of errors that another attempt would end with too
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "MISSING_AUTHENTICATION_TOKEN",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "OAuth2 access token",
    "HTTP status 400",  # S3's answer to a HEAD with an expired token
)


class MissingError(UserError):
    """Nothing lies at a location."""


class UnreachableError(UserError):
    """A location did not answer, or access was denied: its content is unknown."""


def _is_uri(location: str | Path) -> bool:
    return isinstance(location, str) and SCHEME.match(location) is not None


def is_remote(location: str | Path) -> bool:
    """Return whether a location is a URI other than file://, so that reading it is a transfer."""
    return _is_uri(location) and urlsplit(str(location)).scheme != "file"


def local_path(location: str | Path) -> Path:
    """Return the path of a location that is not remote."""
    return Path(unquote(urlsplit(str(location)).path)) if _is_uri(location) else Path(location)


def absolute(location: str | Path) -> str:
    """Return a location that holds in any working folder: an absolute path, or a URI as given."""
    return str(location) if is_remote(location) else str(local_path(location).resolve())


def join(location: str | Path, *names: str) -> str:
    """Return the location of a file or folder within `location`, one name per level."""
    levels = map(quote, names) if _is_uri(location) else names
    return _with_path(location, lambda path: path.joinpath(*levels))


def with_suffix(location: str | Path, suffix: str) -> str:
    """Return the location with another suffix, as Path.with_suffix does."""
    return _with_path(location, lambda path: path.with_suffix(suffix))


def parent(location: str | Path) -> str:
    """Return the location of the folder in which a file lies."""
    return _with_path(location, lambda path: path.parent)


def _with_path(location: str | Path, change: Callable[[PurePosixPath], PurePosixPath]) -> str:
    if not _is_uri(location):
        return str(change(PurePosixPath(location)))
    parts = urlsplit(str(location))
    return urlunsplit(parts._replace(path=str(change(PurePosixPath(parts.path)))))


def name(location: str | Path) -> str:
    """Return the last name of a location, unquoted."""
    if not _is_uri(location):
        return Path(location).name
    return unquote(PurePosixPath(urlsplit(str(location)).path).name)


def _s3(bucket: str, query: str) -> fs.S3FileSystem:
    """Return the client for a bucket; the URI's query goes before the environment."""
    options = {name: values[-1] for name, values in parse_qs(query).items()}

    def option(name: str, *variables: str) -> str | None:
        return next(filter(None, [options.pop(name, None), *map(os.environ.get, variables)]), None)

    endpoint = option("endpoint_override", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = option("region", "AWS_REGION", "AWS_DEFAULT_REGION")
    scheme = option("scheme")
    if options:
        raise pa.ArrowInvalid(f"options {', '.join(options)} are unknown")
    return _s3_client(bucket, endpoint, region, scheme)


@lru_cache
def _s3_client(
    bucket: str, endpoint: str | None, region: str | None, scheme: str | None
) -> fs.S3FileSystem:
    return fs.S3FileSystem(
        region=region or (None if endpoint else fs.resolve_s3_region(bucket)),
        endpoint_override=endpoint,
        scheme=scheme,
        # These two make a file that fails midway never appear: written at once, its first half
        # would; opened late, an empty one when the client gives up.
        background_writes=True,
        allow_delayed_open=False,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=SILENT_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # `attempt` has its own
    )


def _open(location: str | Path) -> tuple[fs.FileSystem, str]:
    """Return the file system of a location and the path in it."""
    if not is_remote(location):
        return fs.LocalFileSystem(), str(local_path(location))
    parts = urlsplit(str(location))
    if parts.password is not None or any(map(SECRET.search, parse_qs(parts.query))):
        hidden = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))
        raise UserError(
            f"the address of {hidden} holds a password or key, which would be kept in run records; "
            "set credentials in the environment instead (AWS_ACCESS_KEY_ID, ...)."
        )
    try:
        if parts.scheme == "s3":
            return _s3(parts.netloc, parts.query), parts.netloc + unquote(parts.path)
        if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
            query = f"{parts.query}&retry_limit_seconds={SILENT_SECONDS}".lstrip("&")
            parts = parts._replace(query=query)  # its client would go on for 15 minutes
        return fs.FileSystem.from_uri(urlunsplit(parts))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"{location} cannot be opened ({_line(error)}); give a folder, or a URI of s3://, "
            "gs://, abfs:// or file://."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def attempt(location: str | Path, action: Callable[[], Result]) -> Result:
    """Return `action()`, which reads or writes `location`; repeat it where a connection is lost.
    Raises MissingError where nothing lies there, and UnreachableError where access is denied or all
    attempts fail. Other errors of the local disk stay OSErrors."""
    started = time.monotonic()
    for wait in (*WAITS, None):
        try:
            return action()
        except FileNotFoundError as error:
            raise MissingError(f"{location} is missing; check the address.") from error
        except OSError as error:
            detail = _line(error)
            if isinstance(error, PermissionError) or any(word in detail for word in REFUSED):
                raise UnreachableError(
                    f"access to {location} is denied ({detail}); allow it to this user or these "
                    "credentials (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ...)."
                ) from error
            if "NO_SUCH_BUCKET" in detail:
                raise MissingError(f"the bucket of {location} does not exist.") from error
            if error.errno is not None or not is_remote(location):  # the disk's own error
                raise
            if wait is None:
                raise UnreachableError(
                    f"{location} cannot be reached ({detail}), tried {len(WAITS) + 1} times in "
                    f"{time.monotonic() - started:.0f} s; check the network and the endpoint "
                    "(AWS_ENDPOINT_URL, ...), then run the same command again."
                ) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _request(location: str | Path, action: Callable[[fs.FileSystem, str], Result]) -> Result:
    """Return `action(file system, path in it)`. Raises as `attempt`."""
    return attempt(location, lambda: action(*_open(location)))


def open_input(location: str | Path) -> pa.NativeFile:
    """Open a file for reading at random, as parquet needs it. Raises as `attempt`."""
    return _request(location, lambda system, path: system.open_input_file(path))


def chunks(location: str | Path) -> Iterator[bytes]:
    """Yield a file's bytes in order, STREAMS pieces of up to CHUNK in memory. Raises the client's
    own errors, since only the caller knows what to repeat: iterate within `attempt`."""
    system, path = _open(location)
    with system.open_input_file(path) as file:
        starts = range(0, file.size(), CHUNK)
        read = partial(file.read_at, CHUNK)
        yield from run_ahead(read, starts, threads=STREAMS, depth=STREAMS)


def copy_into(file: BinaryIO, location: str | Path) -> None:
    """Make the content of a file that is open that of a location. Raises as `attempt`."""

    def copy() -> None:
        file.seek(0)
        file.writelines(chunks(location))
        file.truncate()
        file.flush()

    attempt(location, copy)


def read_bytes(location: str | Path) -> bytes:
    """Read a whole small file. Raises as `attempt`."""
    return attempt(location, lambda: b"".join(chunks(location)))


def entries(location: str | Path) -> tuple[list[str], dict[str, int]]:
    """Return the names of the folders in a folder, and the sizes in bytes of its files by name.
    Both are empty where it does not exist. One request lists a thousand. Raises as `attempt`."""
    infos = _request(
        location,
        lambda system, path: system.get_file_info(fs.FileSelector(path, allow_not_found=True)),
    )
    folders = [info.base_name for info in infos if info.type == fs.FileType.Directory]
    return folders, {info.base_name: info.size for info in infos if info.is_file}


def is_file(location: str | Path) -> bool:
    """Return whether a file lies at a location. Raises as `attempt`."""
    info = _request(location, lambda system, path: system.get_file_info(path))
    return info.type == fs.FileType.File


def write_atomically(location: str | Path, data: bytes | memoryview) -> None:
    """Write `data` so that the file is either as before or complete, even after a crash. The folder
    of a local file must exist. Raises as `attempt`."""
    if is_remote(location):
        attempt(location, lambda: _upload(location, [data]))
    else:
        with atomic_file(location) as file:
            file.write(data)


@contextmanager
def atomic_file(location: str | Path, *, new: bool = False) -> Iterator[BinaryIO]:
    """Open a file to write and read whose content appears at `location` once the block ends.
    Nothing changes there where the block raises. A remote file is collected on the local disk.
    new: replace no local file; raises FileExistsError where another process was faster."""
    if is_remote(location):
        with naming_full_disk(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
            yield file

            _upload_file(location, file)
        return
    path = local_path(location)
    # Random names: a task that Ray repeats on another node may have the first one's process number.
    # Not of the whole name, which may be as long as names can be.
    temporary = path.with_name(f".{path.name[:32]}.{secrets.token_hex(4)}.tmp")
    try:
        with naming_full_disk(path), temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            _link(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Give a file a second name, which must be new, but on file systems without hard links."""
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        temporary.replace(path)


@contextmanager
def naming_full_disk(path: str | Path) -> Iterator[None]:
    """Add host and path to the error of a full disk, which the system raises without them."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            text = f"{error.strerror} on host {socket.gethostname()}"
            raise OSError(error.errno, text, str(path)) from error
        raise


@contextmanager
def locked_file(location: str | Path) -> Iterator[bool]:
    """Lock a local file as `lock` does, while the context lasts; it and its folder are made where
    there are none. Network file systems share such a lock between hosts, unlike a folder's. Nothing
    locks a URI."""
    if is_remote(location):
        yield True
        return
    make_folder(parent(location))
    with local_path(location).open("ab") as file:
        yield lock(file)


def lock(file: IO, *, shared: bool = False) -> bool:
    """Lock an open local file until it is closed; False where another process has it. shared: only
    look whether one has. Nothing is locked on network file systems without locks."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def _upload(location: str | Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write one object, which these file systems show whole once it is closed, or not at all."""
    system, path = _open(location)
    file = system.open_output_stream(path)
    for piece in pieces:
        file.write(piece)
    file.close()


def _upload_file(location: str | Path, file: BinaryIO) -> None:
    def upload() -> None:
        file.seek(0)
        _upload(location, iter(lambda: file.read(CHUNK), b""))

    attempt(location, upload)


def make_folder(location: str | Path) -> None:
    """Make a folder and those above it; object storage has none."""
    if not is_remote(location):
        local_path(location).mkdir(parents=True, exist_ok=True)


def remove_folder(location: str | Path) -> None:
    """Delete a folder with everything in it, where there is one. Raises as `attempt`."""
    with suppress(MissingError):
        _request(location, lambda system, path: system.delete_dir(path))


def file_states(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of each file below a local folder, by its name in there."""
    states = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".tmp":
            status = path.stat()
            states[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return states


def upload_changes(
    folder: Path, location: str, known: Mapping[str, tuple[int, int]], last: str = ""
) -> dict[str, tuple[int, int]]:
    """Upload the files below a local folder that are not as in `known`, the `file_states` of an
    earlier moment; the one named `last` once all others lie there. Returns today's. Raises as
    `attempt`."""

    def upload(name: str) -> None:
        with (folder / name).open("rb") as file:
            _upload_file(join(location, *Path(name).parts), file)

    states = file_states(folder)
    changed = [name for name in states if states[name] != known.get(name)]
    for _ in run_ahead(upload, [n for n in changed if n != last], threads=STREAMS, depth=STREAMS):
        pass
    if last in changed:
        upload(last)
    return states


def download(location: str, folder: Path) -> None:
    """Copy all files below a location into a local folder. Raises as `attempt`."""
    folders, files = entries(location)
    for name in files:
        data = read_bytes(join(location, name))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, data)
    for name in folders:
        download(join(location, name), folder / name)


@contextmanager
def working_folder(
    location: str, last: str, *, replaced: str = "", resumes: bool = False
) -> Iterator[Path]:
    """Give a local folder to write a location's files into: its own, or for a remote one a
    temporary one, which is uploaded when the block ends. last: the file that marks the others as
    whole; it is the first to go and the last to appear. replaced: a folder of the location to
    delete before. resumes: begin with what lies there, and upload what was written where the block
    raises, too."""
    if not is_remote(location):
        yield local_path(location)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if resumes:
            download(location, folder)
        known = file_states(folder)
        try:
            yield folder
        except BaseException:
            if resumes:
                upload_changes(folder, location, known)
            raise
        if not resumes:
            remove(join(location, last))
            if replaced:
                remove_folder(join(location, replaced))
        upload_changes(folder, location, known, last)


def remove(location: str | Path) -> None:
    """Delete a file, where there is one. Raises as `attempt`."""
    with suppress(MissingError):  # also of a second attempt, after a first that did it
        _request(location, lambda system, path: system.delete_file(path))


def remove_temporaries(folder: str | Path) -> None:
    """Delete what killed writers left in a local folder; on object storage they leave nothing."""
    if not is_remote(folder):
        for path in local_path(folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)
