"""Where a set lies, read and written: a local folder, or any URI that pyarrow's file systems open.

A place is written as the user wrote it: a path, `file://...`, `s3://bucket/folder`,
`gs://bucket/folder`. Credentials and endpoints come from the environment of their clients
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_REGION, GOOGLE_APPLICATION_CREDENTIALS, ...).
"""

import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar
from urllib.parse import parse_qs, quote, unquote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from pipeline.ahead import run_ahead
from pipeline.errors import UserError

Result = TypeVar("Result")

SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts, so one more attempt than waits
CONNECT_SECONDS = 5
SILENT_SECONDS = 10  # without a byte, after which a connection counts as lost
CHUNK = 1 << 22  # bytes of one request
STREAMS = 4  # requests at once: one connection seldom fills a network card
REFUSED = (  # what clients say where another attempt would end the same way
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "MISSING_AUTHENTICATION_TOKEN",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "OAuth2 access token",
    "HTTP status 400",  # what S3 answers a HEAD with an expired token
)


class MissingError(UserError):
    """Nothing lies at a place."""


class UnreachableError(UserError):
    """A place that did not answer, or refused: what lies there is unknown."""


def _is_uri(place: str | Path) -> bool:
    return isinstance(place, str) and SCHEME.match(place) is not None


def is_remote(place: str | Path) -> bool:
    """Whether a place is a URI other than file://, so that its files must be brought here."""
    return _is_uri(place) and urlsplit(str(place)).scheme != "file"


def local_path(place: str | Path) -> Path:
    """The path of a place that is not remote."""
    return Path(unquote(urlsplit(str(place)).path)) if _is_uri(place) else Path(place)


def absolute(place: str | Path) -> str:
    """The same place for processes in other working folders: paths made absolute, URIs as given."""
    return str(place) if is_remote(place) else str(local_path(place).resolve())


def join(place: str | Path, *names: str) -> str:
    """The place of a file or folder within `place`, one name per level."""
    if not _is_uri(place):
        return str(Path(place, *names))
    parts = urlsplit(str(place))
    path = "/".join([parts.path.rstrip("/"), *map(quote, names)])
    return urlunsplit(parts._replace(path=path))


def with_suffix(place: str | Path, suffix: str) -> str:
    """The place of the file beside `place` whose name ends in `suffix` instead, as in Path."""
    if not _is_uri(place):
        return str(Path(place).with_suffix(suffix))
    parts = urlsplit(str(place))
    return urlunsplit(parts._replace(path=str(PurePosixPath(parts.path).with_suffix(suffix))))


def name(place: str | Path) -> str:
    """The last name of a place."""
    return (
        unquote(PurePosixPath(urlsplit(str(place)).path).name)
        if _is_uri(place)
        else Path(place).name
    )


@lru_cache
def _s3(bucket: str, query: str) -> fs.S3FileSystem:
    options = {name: values[-1] for name, values in parse_qs(query).items()}
    endpoint = (
        options.pop("endpoint_override", None)
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
    )
    region = (
        options.pop("region", None)
        or os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
    )
    if region is None and endpoint is None:
        region = fs.resolve_s3_region(bucket)
    scheme = options.pop("scheme", None)
    if options:
        raise pa.ArrowInvalid(f"options {', '.join(options)} are unknown")
    return fs.S3FileSystem(
        region=region,
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


def _open(place: str | Path) -> tuple[fs.FileSystem, str]:
    """The file system of a place and the path in it."""
    if not is_remote(place):
        return fs.LocalFileSystem(), str(local_path(place))
    parts = urlsplit(str(place))
    if parts.password is not None:
        hidden = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        raise UserError(
            f"the address of {hidden} holds a password, which would be kept in run records; set "
            "credentials in the environment instead (AWS_ACCESS_KEY_ID, ...)."
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
            f"{place} cannot be opened ({_line(error)}); give a folder, or a URI of s3://, gs://, "
            "abfs:// or file://."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def attempt(place: str | Path, action: Callable[[], Result]) -> Result:
    """`action()`, which reads or writes `place`, tried again with growing waits where a connection
    is lost.

    Raises MissingError where nothing is there and UserError where access is denied, both at once,
    and UserError where the place cannot be reached. Other errors of the local disk stay OSErrors.
    """
    started = time.monotonic()
    for wait in (*WAITS, None):
        try:
            return action()
        except FileNotFoundError as error:
            raise MissingError(f"{place} is missing; check the address.") from error
        except OSError as error:
            detail = _line(error)
            if isinstance(error, PermissionError) or any(word in detail for word in REFUSED):
                raise UnreachableError(
                    f"access to {place} is denied ({detail}); give this user or these credentials "
                    "(AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ...) leave to use it."
                ) from error
            if "NO_SUCH_BUCKET" in detail:
                raise MissingError(f"the bucket of {place} does not exist.") from error
            if error.errno is not None or not is_remote(place):  # not said by a network client
                raise
            if wait is None:
                raise UnreachableError(
                    f"{place} cannot be reached ({detail}), tried {len(WAITS) + 1} times in "
                    f"{time.monotonic() - started:.0f} s; check the network and the endpoint "
                    "(AWS_ENDPOINT_URL, ...), then run the same command again."
                ) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def open_input(place: str | Path) -> pa.NativeFile:
    """A file for reading at random, as parquet needs it. Raises as `attempt`."""

    def open_file() -> pa.NativeFile:
        system, path = _open(place)
        return system.open_input_file(path)

    return attempt(place, open_file)


def chunks(place: str | Path) -> Iterator[bytes]:
    """A file's bytes in order, STREAMS pieces of up to CHUNK in memory. Raises the client's own
    errors, so that the caller decides what to begin again: iterate within `attempt`."""
    system, path = _open(place)
    with system.open_input_file(path) as file:
        starts = range(0, file.size(), CHUNK)
        read = partial(file.read_at, CHUNK)
        yield from run_ahead(read, starts, threads=STREAMS, depth=STREAMS)


def read_bytes(place: str | Path) -> bytes:
    """A whole small file. Raises as `attempt`."""
    return attempt(place, lambda: b"".join(chunks(place)))


def file_sizes(place: str | Path) -> dict[str, int]:
    """Size in bytes of each file in a folder, by name; empty where there is no such folder.

    One request for a thousand files. Raises as `attempt`.
    """

    def listing() -> dict[str, int]:
        system, path = _open(place)
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return {info.base_name: info.size for info in found if info.is_file}

    return attempt(place, listing)


def is_file(place: str | Path) -> bool:
    """Whether a file lies at a place. Raises as `attempt`."""

    def look() -> bool:
        system, path = _open(place)
        return system.get_file_info(path).type == fs.FileType.File

    return attempt(place, look)


def write_atomically(place: str | Path, data: bytes | memoryview) -> None:
    """Write `data` so that `place` is either absent, as before, or complete, even after a crash.

    The folder of a local file must exist. Raises as `attempt`.
    """
    if is_remote(place):
        memoryview(data)  # a TypeError here, not in the client's thread
        attempt(place, lambda: _upload(place, [data]))
        return
    with _replacing(local_path(place)) as file:
        file.write(data)


@contextmanager
def atomic_file(place: str | Path) -> Iterator[BinaryIO]:
    """A file to write and read whose content appears at `place`, as with `write_atomically`, once
    the block ends; nothing changes where it raises. A remote one is collected on the local disk."""
    if not is_remote(place):
        with _replacing(local_path(place)) as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        yield file

        def upload() -> None:
            file.seek(0)
            _upload(place, iter(lambda: file.read(CHUNK), b""))

        attempt(place, upload)


def _upload(place: str | Path, pieces: Iterable[bytes | memoryview]) -> None:
    """One object: these file systems show it whole when it is closed, or not at all."""
    system, path = _open(place)
    file = system.open_output_stream(path)
    for piece in pieces:
        file.write(piece)
    file.close()


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    # Random names: a task that Ray repeats on another node may have the first one's process number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(place: str | Path) -> None:
    """Delete a file that exists. Raises as `attempt`."""

    def delete() -> None:
        system, path = _open(place)
        system.delete_file(path)

    attempt(place, delete)


def remove_temporaries(folder: str | Path) -> None:
    """Delete what killed processes left in a local folder; remote ones leave nothing to see."""
    if not is_remote(folder):
        for path in local_path(folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)


def entries(place: str | Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder; none where there is no such folder.

    One request for a thousand of them. Raises as `attempt`.
    """

    def listing() -> list[fs.FileInfo]:
        system, path = _open(place)
        return system.get_file_info(fs.FileSelector(path, allow_not_found=True))

    found = attempt(place, listing)
    files = [info.base_name for info in found if info.is_file]
    return [x.base_name for x in found if x.type == fs.FileType.Directory], files
