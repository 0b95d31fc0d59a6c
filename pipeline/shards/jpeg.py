"""JPEG bytes -> pixels, of files alone whose coded data are complete. libjpeg goes on where data
are damaged, and counts it as a warning. It reports the first warning only, so an image is accepted
once it decodes without any: what one finds harmless is repaired."""

import re

import numpy as np
import simplejpeg

SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd9\xff]", re.DOTALL)  # markers with a length
HUFFMAN_TABLES, SCAN, SEQUENTIAL = 0xC4, 0xDA, (0xC0, 0xC1)
END = b"\xff\xd9"
STRAY = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
PADDING = b"\x00\x7f"  # bytes that some encoders write behind the coded pixels
LOST = bytes(512)  # a sector of a disk, or the least that a download in pieces leaves out


def decode_jpeg(
    data: bytes, height: int, width: int, colours: str = "RGB"
) -> tuple[np.ndarray, str | None]:
    """Decode a JPEG at the smallest eighths of its size that have `height` and `width`: uint8 [h,
    w, channels], and the warning about what was harmless or None. Raises ValueError."""
    note = None
    while True:
        try:
            pixels = simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width)
        except ValueError as error:
            repaired = _repair(data, str(error))
            if repaired is None:
                raise
            data, note = repaired, note or str(error)
        else:
            if LOST in data and _has_lost_block(data):
                raise ValueError(f"{len(LOST)} bytes or more of the coded pixels are zeros")
            return pixels, note


def _segments(data: bytes) -> tuple[list[bytes], bytes]:
    """Return a JPEG's segments until the first scan's header, and all that follows."""
    segments, end = [], 2
    while match := SEGMENT.search(data, end):
        start = match.start()
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        segments.append(data[start:end])
        if segments[-1][1] == SCAN:
            break
    return segments, data[end:]


def _repair(data: bytes, warning: str) -> bytes | None:
    """Return a JPEG without the cause of a warning that concerns no pixel, or None. Such are bytes
    between the header's segments, padding before the end, an unknown version of JFIF, and a
    sequential scan that states the range of a progressive one."""
    segments, body = _segments(data)
    header = data[:2] + b"".join(segments)
    stray = STRAY.search(warning)
    if "JFIF revision" in warning:
        before, name, version = header.partition(b"JFIF\0")
        header = before + name + b"\1" + version[1:]
    elif "Invalid SOS parameters" in warning:
        header = header[:-3] + b"\x00\x3f\x00"
    elif stray and len(header) + len(body) == len(data):
        end = body.find(END)
        start = end - int(stray[1])
        if start >= 0 and not body[start:end].strip(PADDING):
            body = body[:start] + body[end:]
    repaired = header + body
    return repaired if repaired != data else None


def _has_lost_block(data: bytes) -> bool:
    """Return whether a sequential JPEG has zeros among its coded pixels that no picture gives. Zero
    bits are the first code of a table. Where that is a coefficient other than 0 in the brightness's
    table, LOST would set all of several blocks to it."""
    segments, body = _segments(data)
    first: dict[int, int] = {}  # the symbol of each Huffman table's first code
    for segment in segments:
        tables = segment[4:] if segment[1] == HUFFMAN_TABLES else b""
        while tables:
            first[tables[0]] = tables[17]
            tables = tables[17 + sum(tables[1:17]) :]
    table = segments[-1][6] & 15
    is_sequential = any(segment[1] in SEQUENTIAL for segment in segments)
    pixels = body.partition(END)[0]
    return is_sequential and LOST in pixels and first.get(0x10 | table, 0) & 15 > 0
