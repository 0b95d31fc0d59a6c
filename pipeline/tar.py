"""Headers of tar archives: the 512 bytes before each member's content, packed and parsed."""

import tarfile
import zlib
from typing import Any, NamedTuple

import numpy as np

BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE  # bytes; an archive is whole records long
_BLANK = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
# Of a plain file's header: what stands between name, size and checksum, and its part of the sum.
_BEFORE_SIZE, _AFTER_SIZE, _AFTER_CHECKSUM = _BLANK[100:124], _BLANK[135:148], _BLANK[156:]
_SUM = sum(_BEFORE_SIZE + _AFTER_SIZE + _AFTER_CHECKSUM) + 8 * ord(" ")

# Some fields of a header, to read them of many headers at once.
HEADER = np.dtype(
    {"names": ["size", "magic"], "formats": ["S11", "S5"], "offsets": [124, 257], "itemsize": BLOCK}
)


class Header(NamedTuple):
    """A member's header. size: bytes of content; link: the target of a link."""

    name: str
    size: int
    kind: bytes
    link: str


def padded(size: Any) -> Any:
    """Return the bytes that content of `size` bytes takes, an int or an array: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def octal(size: int) -> bytes:
    """Return a size as a header states it."""
    return b"%011o" % size


def pack_header(name: bytes, size: int) -> bytes:
    """Return the USTAR header of a plain file, as tarfile writes it in a sixth of the time.

    name: at most 100 bytes.
    """
    start, digits = name.ljust(100, b"\0") + _BEFORE_SIZE, octal(size)
    checksum = b"%06o\0 " % (_SUM + sum(name) + sum(digits))
    return start + digits + _AFTER_SIZE + checksum + _AFTER_CHECKSUM


def parse_header(block: bytes) -> Header:
    """Read a header in any dialect of tar. Raises ValueError where the block is none."""
    if len(block) != BLOCK:
        raise ValueError(f"{len(block)} bytes")
    # Adler-32's low half is 1 plus the sum modulo 65521, at a tenth of the time of `sum`. The
    # checksum counts its own eight bytes as blanks.
    adler = zlib.adler32(block[156:], zlib.adler32(block[:148]))
    if ((adler & 0xFFFF) - 1 + 8 * ord(" ") - _number(block[148:156])) % 65521:
        raise ValueError("no header, by its checksum")
    name, link = text(block[:100]), text(block[157:257]) if block[157] else ""
    if block[345] and block[257:263] == b"ustar\0":
        name = f"{text(block[345:500])}/{name}"
    return Header(name, _number(block[124:136]), block[156:157], link)


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: base 256, for what octal digits cannot hold
        if field[0] != 0x80:
            raise ValueError("negative")
        return int.from_bytes(field[1:], "big")
    return int(field.rstrip(b"\0 ") or b"0", 8)


def text(field: bytes) -> str:
    """Return a header's text: up to the first zero, UTF-8 or escaped."""
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
