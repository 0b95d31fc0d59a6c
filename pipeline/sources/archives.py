"""The members of tar archives as ranges of bytes, so that images are read from the archive itself.
Only headers are read: 512 bytes per member, wherever the archive is. `tarfile` would do the same at
ten times the time per member, and keeps an object for each of a million."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.sources.files import SourceFiles
from pipeline.tar import BLOCK, padded, parse_header, text

REGULAR, LINKS = (b"0", b"\0", b"7"), (b"1", b"2")
OTHERS = (b"3", b"4", b"5", b"6")  # devices, folders and pipes, which have no content
GNU_NAME, GNU_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"
EXTENSIONS = (GNU_NAME, GNU_LINK, PAX, PAX_GLOBAL)  # what the next member's header cannot hold
MAX_EXTENSION = 1 << 16  # bytes; a damaged size must not fill the memory
MAX_PACKED = 1 << 26  # bytes of a file that is read as a whole
END_MARK = bytes(BLOCK)
GZIP = b"\x1f\x8b"
PACKERS = {GZIP: "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK": "zip"}

Read = Callable[[int, int], bytes]  # offset, size -> bytes, fewer at the end


class Member(NamedTuple):
    """A file in an archive: `size` bytes from `offset` on. link: a link's target, else None."""

    name: str
    offset: int
    size: int
    link: str | None = None


def is_archive(name: str) -> bool:
    """Return whether a file of this name is a tar whose members can be read as ranges."""
    return name.lower().endswith(".tar")


def is_packed(name: str) -> bool:
    """Return whether a file of this name is a compressed tar, which is read from its start only."""
    return name.lower().endswith((".tar.gz", ".tgz"))


def members(
    files: SourceFiles, path: str, start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """Yield the files in the tar at bytes `start` to `end` of a source's file, in their order.
    Raises UserError, naming the byte, for a tar that is damaged or cut off."""
    stop = files.size(path) if end is None else end

    def read(offset: int, size: int) -> bytes:
        return files.read(path, offset, max(0, min(size, stop - offset)))

    return _members(read, files.location(path), start, stop)


def packed_files(files: SourceFiles, path: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file in a small tar, compressed or not, in one pass. Raises
    UserError for a tar that is damaged or cut off."""
    location, data = files.location(path), files.read(path)
    packed = io.BytesIO(data)
    with gzip.GzipFile(fileobj=packed) if data.startswith(GZIP) else packed as stream:

        def read(offset: int, count: int) -> bytes:
            stream.seek(offset)
            return stream.read(count)

        try:
            for member in _members(read, location, 0, None):
                if member.size > MAX_PACKED:
                    raise _damage(location, f"holds {member.name} of {member.size} bytes")
                content = read(member.offset, member.size)
                if len(content) < member.size:
                    raise EOFError(f"it ends within {member.name}")
                if member.link is None:
                    yield member.name, content
        except (OSError, EOFError, zlib.error) as error:
            raise _damage(location, f"cannot be unpacked ({error})") from error


def _damage(location: str, fact: str) -> UserError:
    return UserError(f"{location} {fact}; it was cut off or damaged: copy it again.")


def _members(read: Read, location: str, start: int, end: int | None) -> Iterator[Member]:
    """Yield the members of the tar from byte `start` on. end: the byte that content must not reach
    beyond; None where the length is not known."""
    at = start
    extended: dict[str, str] = {}  # fields of the next member, by their PAX keywords
    while True:
        block = read(at, BLOCK)
        if block == END_MARK:  # perhaps not the last one: archives are joined by `cat`
            at = _after_zeros(read, at)
            block = read(at, BLOCK)
            if not block:
                return
        if not block:
            raise _damage(location, f"ends at byte {at} without an end mark")
        try:
            name, size, kind, link = parse_header(block)
        except ValueError as error:
            packer = next((x for x in PACKERS if block.startswith(x)), None)
            if packer and at == start:
                raise UserError(
                    f"{location} is packed by {PACKERS[packer]}, whatever its name; unpack it, "
                    "since images are read in place."
                ) from error
            raise _damage(location, f"has no tar header at byte {at}") from error
        offset, extends = at + BLOCK, kind in EXTENSIONS
        if "size" in extended and not extends:
            size = int(extended["size"])
        if extends and size > MAX_EXTENSION:
            raise _damage(location, f"has a name of {size} bytes at byte {at}")
        if end is not None and offset + size > end:
            raise _damage(location, f"ends at byte {end} within a member of {size} bytes at {at}")
        if extends:
            content = read(offset, size)
            try:
                extended |= _extension(kind, content)
            except ValueError as error:
                raise _damage(location, f"has a damaged PAX header at byte {at}") from error
        else:
            if kind in REGULAR:
                yield Member(extended.get("path") or name, offset, size)
            elif kind in LINKS:
                link = extended.get("linkpath") or link
                yield Member(extended.get("path") or name, offset, size, link)
            elif kind not in OTHERS:
                raise UserError(
                    f"{location} has a member of the unknown kind {kind!r} at byte {at}; write it "
                    "again with `tar --format=pax`."
                )
            extended = {}
        at = offset + padded(size)


def _after_zeros(read: Read, at: int) -> int:
    """Return the byte of the first block from `at` on that is not zeros, else of the end."""
    while (chunk := read(at, MAX_EXTENSION)) and not chunk.strip(b"\0"):
        at += len(chunk)
    return at + (len(chunk) - len(chunk.lstrip(b"\0"))) // BLOCK * BLOCK


def _extension(kind: bytes, content: bytes) -> dict[str, str]:
    """Return the fields that the content of an extension gives the next member.

    Raises ValueError for PAX records other than `<length> <key>=<value>\\n`.
    """
    if kind in (GNU_NAME, GNU_LINK):
        return {"path" if kind == GNU_NAME else "linkpath": text(content)}
    fields = dict[str, str]()
    while kind == PAX and content and content[0]:  # global ones name no member
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record, content = content[len(digits) + 1 : length], content[length:]
        key, separator, value = record.removesuffix(b"\n").partition(b"=")
        if not separator or (key == b"size" and not (value.isdigit() and len(value) < 19)):
            raise ValueError(record)
        fields[text(key)] = value.decode("utf-8", "surrogateescape")
    return fields
