"""`python -m jobs.localize`: boxes, overlay pictures and masks for images of any size.

Boxes and pictures refer to the pixels as stored in the file, without EXIF rotation, as in ILSVRC.
OUTPUT/boxes.json has an entry per image, with the reason where one failed. The same command given
again does only what is missing, has failed or has changed.
"""

import fcntl
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from jobs import cli
from jobs.localize.batches import (
    MASKS_NAME,
    MOST_THREADS,
    Job,
    LocalizeConfig,
    file_state,
    process_batch,
)
from jobs.runs import MODEL_NAME, Nets, load_nets
from pipeline.errors import UserError
from pipeline.shards.format import sha256_file
from pipeline.sources.listing import IMAGE_SUFFIXES

FORMAT = 2
BOXES_NAME = "boxes.json"
PROGRESS_NAME = "progress.jsonl"
FEW = 20  # images: up to so many get a line each, more only a progress line


def find_images(arguments: Sequence[Path], output: Path) -> list[Job]:
    """The files named, and those under the folders named that have an image's suffix, in order,
    each once; hidden ones and those in `output` are left out.

    Results have the place and stem of their image under its folder, numbered from the second one
    of the same name (letter case aside) on. Raises UserError for a folder without images, and
    where results would replace images; what cannot be read is reported when it is its turn.
    """
    used: set[str] = set()
    seen: set[Path] = set()
    jobs: list[Job] = []
    named = {path.resolve() for path in arguments if not path.is_dir()}
    real_output = output.resolve()
    for argument in arguments:
        is_folder = argument.is_dir()
        for path in _search(argument, real_output) if is_folder else [argument]:
            if path.absolute() in seen:
                continue
            seen.add(path.absolute())
            place = path.relative_to(argument) if is_folder else Path(path.name)
            stem = str(place.with_suffix(""))
            names, number = (f"{stem}.png", f"{MASKS_NAME}/{stem}.png"), 1
            while used & {name.lower() for name in names}:
                number += 1
                names = (f"{stem}-{number}.png", f"{MASKS_NAME}/{stem}-{number}.png")
            used |= {name.lower() for name in names}
            for name in names:
                if real_output / name in named:
                    raise UserError(
                        f"{output / name} would replace an image given; choose another --output."
                    )
            jobs.append(Job(path=path, overlay=names[0], mask=names[1]))
    return jobs


def _search(folder: Path, output: Path) -> list[Path]:
    if folder.resolve() == output:
        raise UserError(f"--output {folder} is searched for images; use another --output.")
    found, visited = [], set()
    others: Counter[str] = Counter()

    def unreadable(error: OSError) -> None:
        found.append(Path(error.filename))  # to be reported like a file that cannot be read

    for place, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = Path(place).resolve()
        if real in visited or real == output:  # a link back to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith("."):  # macOS writes ._photo.jpg beside photo.jpg
                continue
            suffix = Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                found.append(Path(place, name))
            else:
                others[suffix or "none"] += 1
    if not found:
        raise UserError(f"folder {folder} holds no image files ({', '.join(IMAGE_SUFFIXES)}).")
    if others:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(5))
        print(f"{folder}: files without an image's suffix are left out ({kinds})")
    return found


@contextmanager
def open_progress(output: Path, settings: dict[str, Any]) -> Iterator[BinaryIO]:
    """OUTPUT/progress.jsonl, open to be read and appended to: a line with the settings, then an
    entry per image as it was done. The end of a line that an interruption cut is removed.

    Raises UserError for a file of other settings, and while another process holds it.
    """
    with (output / PROGRESS_NAME).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another jobs.localize writes to {output} now; use another --output."
            ) from None
        file.seek(0)
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(whole)
        file.seek(0)
        if not whole:
            file.write(json.dumps(settings).encode() + b"\n")
        else:
            before = _parse(file.readline(), output)
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed:
                raise UserError(
                    f"{output} holds results of another {', '.join(changed)}; use a new --output, "
                    "or the same flags to go on with those."
                )
        yield file


def _parse(line: bytes, output: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(line)
    except ValueError:
        raise UserError(
            f"{output / PROGRESS_NAME} is damaged: {line[:40]!r} is no entry; remove that line, or "
            "the file to start anew."
        ) from None
    return content


def finished(file: BinaryIO, jobs: Sequence[Job], config: LocalizeConfig) -> dict[str, int]:
    """Position in progress.jsonl of each image's entry that still holds, by the image: it was
    located, the file is as it was, and the pictures asked for are there and its own."""
    wanted = {str(job.path): job for job in jobs}
    entries: dict[str, int] = {}
    owners: dict[str, str] = {}
    file.seek(0)
    file.readline()
    position = file.tell()
    for line in file:
        entry = _parse(line, config.output)
        image = entry["image"]
        entries.pop(image, None)
        for kind in ("overlay", "mask"):
            if kind in entry:
                owners[entry[kind]] = image
        if image in wanted and _holds(entry, wanted[image], config):
            entries[image] = position
        position += len(line)
    return {
        image: position
        for image, position in entries.items()
        if (not config.overlays or owners.get(wanted[image].overlay) == image)
        and (not config.masks or owners.get(wanted[image].mask) == image)
    }


def _holds(entry: dict[str, Any], job: Job, config: LocalizeConfig) -> bool:
    if entry["status"] != "ok":
        return False
    try:
        state = file_state(job.path)
    except OSError:
        return False
    return (
        state.items() <= entry.items()
        and _has(entry, "overlay", config.overlays, job.overlay, config.output)
        and _has(entry, "mask", config.masks, job.mask, config.output)
    )


def _has(entry: dict[str, Any], kind: str, asked: bool, name: str, output: Path) -> bool:
    return not asked or (entry.get(kind) == name and (output / name).is_file())


def batches_done(
    nets: Nets, config: LocalizeConfig, jobs: Sequence[Job]
) -> Iterator[list[dict[str, Any]]]:
    """`process_batch` over all jobs, in order; a few batches per thread are under way, so that
    memory does not grow with the number of images.

    Each thread takes whole batches: decoding, superpixels, PNG and the nets release Python's lock.
    """
    threads = config.threads or min(len(os.sched_getaffinity(0)), MOST_THREADS)
    pool = ThreadPoolExecutor(threads)
    running: deque[Future[list[dict[str, Any]]]] = deque()
    try:
        for first in range(0, len(jobs), config.batch_size):
            part = jobs[first : first + config.batch_size]
            running.append(pool.submit(process_batch, nets, config, part))
            if len(running) > 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def write_boxes(
    config: LocalizeConfig, settings: dict[str, Any], file: BinaryIO, positions: Sequence[int]
) -> None:
    """OUTPUT/boxes.json from the entries at these positions of progress.jsonl: atomically, and
    without holding them all in memory."""
    content = {**settings, **cli.record(config), "images": []}
    start, _, end = (json.dumps(content, indent=1) + "\n").encode().rpartition(b"[]")
    partial = config.output / f".{BOXES_NAME}.{os.getpid()}.tmp"
    try:
        with partial.open("wb") as boxes:
            boxes.write(start + b"[")
            for i, position in enumerate(positions):
                file.seek(position)
                boxes.write((b",\n  " if i else b"\n  ") + file.readline().rstrip(b"\n"))
            boxes.write(b"\n ]" + end)
            boxes.flush()
            os.fsync(boxes.fileno())
        partial.replace(config.output / BOXES_NAME)
    finally:
        partial.unlink(missing_ok=True)


def report(entries: Sequence[dict[str, Any]], each: bool) -> None:
    """Print why images failed, and with `each` a line for every other image too."""
    for entry in entries:
        # a name may hold bytes that are not UTF-8, which standard output would refuse
        image = os.fsencode(entry["image"]).decode(errors="replace")
        if entry["status"] != "ok":
            print(f"{image}: failed, {entry['error']}", file=sys.stderr)
        elif each:
            print(f"{image}: {entry['name']} {entry['score']:.0%}, box {entry['box']}")


def choose_device(name: str) -> torch.device:
    """The device of --device. Raises UserError for cuda where there is none. On a GPU, kernels
    are set to deterministic ones."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu or auto.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not
    torch.use_deterministic_algorithms(True)
    return torch.device("cuda")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job with command-line flags (`--help` lists them)."""
    config = cli.parse(LocalizeConfig, argv, __doc__ or "")
    torch.set_num_threads(1)  # batches share the cores; and sums depend on the number of threads
    device = choose_device(config.device)
    nets = load_nets(config.run)
    for net in (nets.corruption, nets.clean_classifier):
        net.to(device)
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"--output {config.output} is a file; give a folder.")
    jobs = find_images(config.images, config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    model = sha256_file(config.run / MODEL_NAME)
    settings = {"format": FORMAT, "model_sha256": model, "rule": config.rule}
    with open_progress(config.output, settings) as file:
        positions = finished(file, jobs, config)
        left = [job for job in jobs if str(job.path) not in positions]
        if positions:
            print(f"{len(positions)} of {len(jobs)} images are done already")
        started, done, failed = time.monotonic(), 0, 0
        line = cli.ProgressPrinter()
        for entries in batches_done(nets, config, left):
            for entry in entries:
                positions[entry["image"]] = file.seek(0, os.SEEK_END)
                file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            done += len(entries)
            failed += sum(entry["status"] != "ok" for entry in entries)
            report(entries, each=len(left) <= FEW)
            if len(left) > FEW:
                line.show(done, len(left), note=f"{failed} failed")
        write_boxes(config, settings, file, [positions[str(job.path)] for job in jobs])
    print(
        f"{len(jobs) - failed} of {len(jobs)} images located, "
        f"{cli.duration(time.monotonic() - started)}: {config.output / BOXES_NAME}"
    )
    if failed:
        raise UserError(
            f"{failed} of {len(jobs)} images failed; their reasons are above and in {BOXES_NAME}."
        )


if __name__ == "__main__":
    cli.run(main)
