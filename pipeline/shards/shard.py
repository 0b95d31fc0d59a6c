"""One shard: listed images -> samples -> a tar with its index and record."""

import errno
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.shards.format import Sample, ShardPacker, write_shard
from pipeline.shards.images import ImageError, read_image
from pipeline.shards.ledger import OK, REJECTED, LedgerRow, ShardFacts, write_record
from pipeline.shards.plan import PreprocessConfig, ShardTask
from pipeline.shards.superpixels import superpixels
from pipeline.sources.annotations import fit_boxes
from pipeline.sources.files import FAULTS_OF_A_FILE, SourceFiles


def make_shard(
    task: ShardTask, images: pa.Table, source: str, output: str, config: PreprocessConfig
) -> ShardFacts:
    """Make one shard of the listed `images`, its index and, last, its record, whose facts are
    returned. Needs no Ray, and may be repeated. Raises OSError where this host sees no image."""
    from pipeline.shards.pixels import moments  # compiled code, which a driver does not need

    record = task.record(output)
    if not storage.is_remote(output):
        storage.local_path(record).parent.mkdir(parents=True, exist_ok=True)
    packer, rows = ShardPacker(config.image_format), []
    sums = np.zeros((2, 3), np.int64)
    entries, faults = images.to_pylist(), list[OSError]()
    with SourceFiles(source) as files:
        fetched = files.fetch((x["path"], x["offset"], x["size"]) for x in entries)
        for number, (image, fetch) in enumerate(zip(entries, fetched, strict=True)):
            row, sample = make_sample(task, number, image, fetch, config, faults)
            if sample is not None:
                row |= {"shard": f"{task.name}.tar", "position": packer.images}
                packer.add(sample)
                sums += moments(sample.image)
            rows.append(row)
        _check_host(files, entries, faults)
    # Readers of tars dislike empty ones.
    tar = storage.with_suffix(record, ".tar")
    shard = write_shard(tar, packer) if packer.images else None
    facts = ShardFacts(
        shard=shard,
        index_bytes=len(packer.index()) if shard else 0,
        pixels=packer.images * config.height * config.width,
        sums=tuple(sums[0].tolist()),
        squares=tuple(sums[1].tolist()),
    )
    write_record(record, rows, facts)
    return facts


def make_sample(
    task: ShardTask,
    number: int,
    image: dict[str, Any],
    fetch: Callable[[], bytes],
    config: PreprocessConfig,
    faults: list[OSError],
) -> tuple[LedgerRow, Sample | None]:
    """Make the sample of a shard's listed image `number`, whose bytes `fetch` returns. Returns its
    ledger row too, but for `shard` and `position`; no sample where it is rejected. The error of a
    file that cannot be read is added to `faults`."""
    row_number = task.first_row + number
    row: LedgerRow = {
        "row": row_number,
        "split": task.split,
        "key": f"{task.split}-{row_number:08d}",
        **{name: image[name] for name in ("id", "path", "wnid", "label", "note")},
    }
    try:
        decoded = read_image(_content(image, fetch, faults), config.height, config.width)
    except ImageError as error:
        return row | {"status": REJECTED, "reason": str(error)}, None
    segments = superpixels(decoded.pixels, config.superpixels, config.compactness)
    box_size = (image["box_width"], image["box_height"]) if image["box_width"] else None
    boxes, box_note = fit_boxes(image["boxes"], box_size, decoded.width, decoded.height)
    notes = (decoded.note, image["note"], box_note)
    row |= {
        "status": OK,
        "note": "; ".join(note for note in notes if note) or None,
        "width": decoded.width,
        "height": decoded.height,
        "superpixels": int(segments.max()) + 1,
        "boxes": boxes,
    }
    sample = Sample(
        key=row["key"],
        row=row_number,
        label=row["label"],
        image=decoded.pixels,
        segments=segments,
        meta={name: row[name] for name in ("id", "wnid", "width", "height", "boxes")},
    )
    return row, sample


def _content(image: dict[str, Any], fetch: Callable[[], bytes], faults: list[OSError]) -> bytes:
    """Return a listed image's bytes. Raises ImageError where its file is the problem."""
    if image["problem"]:
        raise ImageError(image["problem"])
    try:
        return fetch()
    except OSError as error:
        if error.errno not in FAULTS_OF_A_FILE:
            raise
        faults.append(error)
        raise ImageError(f"unreadable file: {error.strerror}") from error


def _check_host(files: SourceFiles, images: list[dict[str, Any]], faults: list[OSError]) -> None:
    """Raise OSError where the host is the problem, not the files, as without a mount or a ticket:
    none of several files can be read, and they are not permitted or their folders are not seen."""
    tried = [image["path"] for image in images if not image["problem"]]
    if not len(faults) == len(tried) > 1:
        return
    first = next((x for x in faults if x.errno in (errno.EACCES, errno.EPERM)), None)
    if first or not any(map(files.sees_folder_of, tried)):
        fault = first or faults[0]
        text = f"{fault.strerror} on host {socket.gethostname()}, as each image of the shard"
        raise OSError(fault.errno, text, fault.filename)
