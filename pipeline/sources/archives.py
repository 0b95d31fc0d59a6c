"""The members of tar archives as ranges of bytes, so that images are read where they lie.

Only headers are read: 512 bytes per member, wherever the archive is. `tarfile` would do the same
at ten times the time per member, and keeps an object for each of a million.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.sources.files import SourceFiles

BLOCK = 512
MAX_NAME = 1 << 16  # bytes of a long name or PAX header; a damaged size must not fill the memory
REGULAR = (b"0", b"\0", b"7")
GNU_NAME, GNU_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"
LINKS = (b"1", b"2")
MAX_PACKED = 1 << 26  # bytes of a file that is read as a whole
ADLER_BASE = 65521
AGAIN = "it was cut off or damaged: bring it here again."

Read = Callable[[int, int], bytes]  # offset, size -> bytes, fewer at the end


class Member(NamedTuple):
    """A file in an archive: its content is `size` bytes from `offset` on. link: what it points to
    where it is a link, which has no content."""

    name: str
    offset: int
    size: int
    link: str | None = None


def is_archive(name: str) -> bool:
    """Whether a file of this name is a tar that can be read in place."""
    return name.lower().endswith(".tar")


def is_packed(name: str) -> bool:
    """Whether a file of this name is a compressed tar, which can only be read from its start."""
    return name.lower().endswith((".tar.gz", ".tgz"))


def members(
    files: SourceFiles, path: str, start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """The files in the tar at bytes `start` to `end` of a source's file, in their order.

    Raises UserError, naming the byte, for a tar that is damaged or cut off.
    """
    stop = files.size(path) if end is None else end

    def read(offset: int, size: int) -> bytes:
        return files.read(path, offset, max(0, min(size, stop - offset)))

    return _members(read, files.place(path), start, stop)


def packed_files(files: SourceFiles, path: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a small tar, compressed or not, read once from its start.

    Raises UserError for one that is damaged or cut off.
    """
    place = files.place(path)
    size = files.size(path)
    raw = io.BufferedReader(_Range(files, path, size), 1 << 20)
    with gzip.GzipFile(fileobj=raw) if is_packed(path) else raw as stream:

        def read(offset: int, count: int) -> bytes:
            stream.seek(offset)
            return stream.read(count)

        try:
            for member in _members(read, place, 0, None):
                if member.size > MAX_PACKED:
                    raise UserError(f"{place} holds {member.name} of {member.size} bytes; {AGAIN}")
                content = read(member.offset, member.size)
                if len(content) < member.size:
                    raise EOFError(f"it ends within {member.name}")
                if member.link is None:
                    yield member.name, content
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{place} cannot be unpacked ({error}); {AGAIN}") from error


class _Range(io.RawIOBase):
    """A source's file as Python's readers want it."""

    def __init__(self, files: SourceFiles, path: str, size: int) -> None:
        self._files, self._path, self._size, self._position = files, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(0, self._size - self._position))
        data = self._files.read(self._path, self._position, wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _members(read: Read, place: str, start: int, end: int | None) -> Iterator[Member]:
    """end: where the tar ends at the latest; None where that shows only when it is read."""
    position, long_name, long_link, pax = start, None, None, dict[str, str]()
    while True:
        header = read(position, BLOCK)
        if header == bytes(BLOCK):  # the mark of a whole archive's end
            return
        if not header:
            raise UserError(f"{place} ends at byte {position} without an end mark; {AGAIN}")
        at = position
        size, kind = _check(header, place, position)
        if kind in (GNU_NAME, GNU_LINK, PAX, PAX_GLOBAL):
            if size > MAX_NAME:
                raise UserError(f"{place} has a name of {size} bytes at byte {at}; {AGAIN}")
            content = read(position + BLOCK, size)
            if kind == GNU_NAME:
                long_name = _text(content)
            elif kind == GNU_LINK:
                long_link = _text(content)
            elif kind == PAX:
                pax = _pax(content, place, at)
        if "size" in pax and kind not in (PAX, PAX_GLOBAL):
            size = int(pax["size"])
        content_start, position = position + BLOCK, position + BLOCK + -(-size // BLOCK) * BLOCK
        if end is not None and content_start + size > end:
            raise UserError(
                f"{place} ends at byte {end} within a member of {size} bytes at {at}; {AGAIN}"
            )
        if kind in (GNU_NAME, GNU_LINK, PAX, PAX_GLOBAL):
            continue
        if kind in REGULAR or kind in LINKS:
            name = pax.get("path") or long_name or _name(header)
            link = pax.get("linkpath") or long_link or _text(header[157:257])
            yield Member(name, content_start, size, link if kind in LINKS else None)
        elif kind not in b"3456":  # devices and folders hold nothing
            raise UserError(
                f"{place} has a member of the unknown kind {kind!r} at byte {at}; write it again "
                "with `tar --format=pax`."
            )
        long_name, long_link, pax = None, None, {}


def _check(header: bytes, place: str, at: int) -> tuple[int, bytes]:
    """Size and kind in a header, whose checksum must be right."""
    if len(header) == BLOCK:
        try:
            stated = int(header[148:156].rstrip(b"\0 ") or b"-1", 8)
            if (_sum(header) - _sum(header[148:156]) + 8 * 32 - stated) % ADLER_BASE == 0:
                return _number(header[124:136]), header[156:157]
        except ValueError:
            pass
    raise UserError(f"{place} has no tar header at byte {at}; {AGAIN}")


def _sum(data: bytes) -> int:
    """Of the bytes, modulo ADLER_BASE: the low half of Adler-32, less its start at 1; thirty times
    as fast as `sum`, and there is one for each of a million headers."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: base 256, for what octal digits cannot hold
        value = int.from_bytes(field[1:], "big")
        if field[0] != 0x80:
            raise ValueError("negative")
        return value
    return int(field.rstrip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefixed = header[345] and header[257:263] == b"ustar\0"
    return f"{_text(header[345:500])}/{name}" if prefixed else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(content: bytes, place: str, at: int) -> dict[str, str]:
    """Records `<length> <key>=<value>\\n`."""
    found = dict[str, str]()
    while content and content[0]:
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record, content = content[len(digits) + 1 : length], content[length:]
        key, separator, value = record.removesuffix(b"\n").partition(b"=")
        if not separator or (key == b"size" and not (value.isdigit() and len(value) < 19)):
            raise UserError(f"{place} has a damaged PAX header at byte {at}; {AGAIN}")
        found[_text(key)] = value.decode("utf-8", "surrogateescape")
    return found
