"""Locate objects in image files: batches of them through the nets, pictures of the results."""

import errno
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.cli import check_bounds, option
from jobs.pictures import draw_overlay, encode_png, mask_picture
from model.localization import Rule
from pipeline.shards.images import ImageError, read_image
from pipeline.storage import write_atomically

if TYPE_CHECKING:  # the flags are read without torch, which takes seconds to load
    from jobs.locate import Located, Prepared
    from jobs.runs import Nets

Entry = dict[str, Any]  # of an image in boxes.json

MASKS_NAME = "masks"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
MOST_THREADS = 8  # by default: a thread may need 0.7 GB for an image of the largest size


@dataclass(frozen=True, kw_only=True)
class LocalizeConfig:
    """Which images, by which nets, and where the results go."""

    images: tuple[Path, ...] = option(
        help="image files, or folders that are searched for them", positional=True
    )
    run: Path | str | None = option(
        None,
        help="folder or URI of a finished jobs.train (default: the net that comes with the "
        "project)",
    )
    output: Path | str = option("boxes", help="folder or URI for boxes.json and the pictures")
    overlays: bool = option(
        True, help="write a PNG per image with the mask's colours, the box and the class over it"
    )
    masks: bool = option(
        True,
        help="write masks/: a grey PNG per image, of its size, 255 times the probability of being "
        "masked, or as --network's maps (threshold at 128 for what is masked more often than not)",
    )
    accurate: bool = option(
        False,
        help="average maps over all of the run's --sides and over mirror images, then look again "
        "at the part around the box, enlarged (nets over a pretrained network): 3.7 times slower, "
        "on photographs 73.0 percent of boxes right instead of 71.3 (docs/results.md)",
    )
    rule: Rule | None = option(None, help="how a box follows from a map (default: as the run says)")
    batch_size: int = option(
        8, low=1, help="images the nets see at once; a result may depend on it in its last digit"
    )
    threads: int | None = option(
        None,
        low=1,
        help=f"batches at work at once (default: one per CPU core, at most {MOST_THREADS})",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="auto: cuda where there is one")

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class Job:
    """An image file, and the names of its pictures within the output folder."""

    path: Path
    overlay: str
    mask: str


def file_state(path: Path) -> dict[str, int]:
    """Return what tells a file from a changed one: its bytes, and its time of change in ns. Raises
    OSError for what is no file: reading a pipe could wait for ever."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError("not a regular file")
    return {"bytes": state.st_size, "modified_ns": state.st_mtime_ns}


def process_batch(nets: "Nets", config: LocalizeConfig, jobs: Sequence[Job]) -> list[Entry]:
    """Locate up to `config.batch_size` files, write their pictures, and return an entry of
    boxes.json for each, in order; that of a file that cannot be used says why. Files are read again
    to be drawn, rather than kept in memory. Raises what would fail every other image too: UserError
    for nets without finite maps, OSError for the disk of the output."""
    from jobs.locate import facts, locate, prepare

    entries: list[Entry] = []
    prepared: dict[int, Prepared] = {}
    for i, job in enumerate(jobs):
        try:
            state = file_state(job.path)
            prepared[i] = prepare(nets.config, job.path.read_bytes())
            entries.append({"image": str(job.path), "status": "ok", **state})
        except (ImageError, OSError, MemoryError) as error:
            entries.append(_failure(job, error))
    if not prepared:
        return entries
    images = list(prepared.values())
    results = locate(nets, images, batch_size=config.batch_size, rule=config.rule)
    for i, result in zip(prepared, results, strict=True):
        try:
            pictures = _write_pictures(config, jobs[i], prepared[i], result)
        except (ValueError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            entries[i] = _failure(jobs[i], error)
            continue
        entries[i] |= facts(prepared[i], result) | pictures
    return entries


def _failure(job: Job, error: Exception) -> Entry:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    reason = reason or "too large for this machine's memory"
    return {"image": str(job.path), "status": "failed", "error": reason}


def _write_pictures(
    config: LocalizeConfig, job: Job, image: "Prepared", result: "Located"
) -> dict[str, str]:
    """Write the pictures asked for, and return their names within the output folder by kind."""
    pictures: dict[str, tuple[str, bytes]] = {}
    if config.overlays:
        data = job.path.read_bytes()
        pixels = read_image(data, image.height, image.width, as_shown=True).pixels
        _, name, score = result.top5[0]
        overlay = draw_overlay(pixels, result.map, result.box, f"{name} {score:.0%}")
        pictures["overlay"] = (job.overlay, encode_png(overlay))
    if config.masks:
        mask = mask_picture(result.map, image.height, image.width)
        pictures["mask"] = (job.mask, encode_png(mask))
    for name, data in pictures.values():
        path = Path(config.output, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    return {kind: name for kind, (name, _) in pictures.items()}
