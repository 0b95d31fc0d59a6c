"""`python -m jobs.localize`: boxes, overlay pictures and masks for images of any size. Boxes and
pictures are of each image as its EXIF turns it. OUTPUT/boxes.json has an entry per image, with the
reason where one failed. The same command again does only what is missing, failed or changed."""

import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from jobs import cli
from jobs.loading import choose_device
from jobs.localize.batches import (
    MASKS_NAME,
    MOST_THREADS,
    Entry,
    Job,
    LocalizeConfig,
    file_state,
    process_batch,
)
from pipeline import storage
from pipeline.ahead import run_ahead
from pipeline.errors import SHOWN, UserError
from pipeline.sources.listing import IMAGE_SUFFIXES

if TYPE_CHECKING:  # the flags are read without torch, which takes seconds to load
    from jobs.runs import Nets

FORMAT = 3
BOXES_NAME = "boxes.json"
PROGRESS_NAME = "progress.jsonl"
LONGEST_NAME = 255  # bytes of a file's name, on all common file systems
FEW = 20  # images: up to so many get a line each, more only a progress line


def find_images(arguments: Sequence[Path], output: Path) -> dict[Path, str]:
    """List the files named, and those under the folders named that have an image's suffix, in
    order, each once; hidden ones and those in `output` are left out. Returns their stems under
    their folders by path. Raises UserError for a folder without images."""
    images: dict[Path, tuple[Path, str]] = {}
    for argument in arguments:
        folder, paths = argument.parent, [argument]
        if os.path.isdir(argument):  # noqa: PTH112 - Path.is_dir raises where a name is too long
            folder, paths = argument, _search(argument, os.path.realpath(output))
        for path in paths:
            stem = str(path.relative_to(folder).with_suffix(""))
            images.setdefault(Path(os.path.realpath(path.parent), path.name), (path, stem))
    return dict(images.values())


def name_results(
    images: Mapping[Path, str], output: Path, latest: Mapping[Path, Entry]
) -> list[Job]:
    """Return the jobs over images, whose pictures have the images' stems as names. From the second
    one of the same name (letter case aside) on they are numbered. No picture replaces an image
    given, or one of another image with an entry in `latest`."""
    owners: dict[str, Path | None] = {
        entry[kind].lower(): path
        for path, entry in latest.items()
        for kind in ("overlay", "mask")
        if kind in entry
    }
    folder = os.path.realpath(output)
    owners |= {os.path.relpath(os.path.realpath(path), folder).lower(): None for path in images}
    jobs = []
    for path, stem in images.items():
        own = path.absolute()
        for number in itertools.count(1):
            name = _numbered(stem, number)
            job = Job(path=path, overlay=f"{name}.png", mask=f"{MASKS_NAME}/{name}.png")
            names = (job.overlay.lower(), job.mask.lower())
            if all(owners.get(name, own) == own for name in names):
                owners |= dict.fromkeys(names, own)
                jobs.append(job)
                break
    return jobs


def _numbered(stem: str, number: int) -> str:
    """Return a stem, from the second one on with a number, that is short enough for a file."""
    path = Path(stem)
    end = f"-{number}" if number > 1 else ""
    room = LONGEST_NAME - len(f"{end}.png")
    encoded = os.fsencode(path.name)
    if len(encoded) > room:
        path = path.with_name(encoded[:room].decode(errors="ignore"))  # without half a character
    return f"{path}{end}"


def _search(folder: Path, output: str) -> list[Path]:
    if os.path.realpath(folder) == output:
        raise UserError(f"--output {folder} is searched for images; use another --output.")
    images: list[Path] = []
    visited: set[str] = set()
    others: Counter[str] = Counter()

    def unreadable(error: OSError) -> None:
        images.append(Path(error.filename))  # to be reported like a file that cannot be read

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(parent)
        if real in visited or real == output:  # a link back to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            suffix = Path(name).suffix.lower()
            if name.startswith("."):  # macOS writes ._photo.jpg beside photo.jpg
                continue
            if suffix in IMAGE_SUFFIXES:
                images.append(Path(parent, name))
            else:
                others[suffix or "none"] += 1
    if not images:
        raise UserError(f"folder {folder} holds no image files ({', '.join(IMAGE_SUFFIXES)}).")
    if others:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(5))
        print(f"{folder}: files without an image's suffix are left out ({kinds})")
    return images


@contextmanager
def open_progress(
    output: Path, settings: dict[str, Any]
) -> Iterator[tuple[BinaryIO, dict[Path, Entry]]]:
    """Open OUTPUT/progress.jsonl: a line with the settings, then an entry per image as it was done.
    Yields the file, to append to, and the last entry of each image by its absolute path. The end of
    a line that an interruption cut is removed. Raises UserError for a file of other settings, and
    while another process has it open."""
    with (output / PROGRESS_NAME).open("a+b") as file:
        if not storage.lock(file):
            raise UserError(f"another jobs.localize writes to {output} now; use another --output.")
        file.seek(0)
        lines = [line for line in file if line.endswith(b"\n")]
        file.truncate(sum(map(len, lines)))
        if not lines:
            lines = [json.dumps(settings).encode() + b"\n"]
            file.write(lines[0])
        try:
            recorded, *entries = map(json.loads, lines)
            latest = {Path(x["image"]).absolute(): x for x in entries if x["status"]}
            changed = [name for name in settings if recorded.get(name) != settings[name]]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{output / PROGRESS_NAME} is damaged ({type(error).__name__}: "
                f"{str(error)[:SHOWN]}); remove it to start anew."
            ) from None
        if changed:
            raise UserError(
                f"{output} holds results of another {', '.join(changed)}; use a new --output, "
                "or the same flags to go on with those."
            )
        with storage.naming_full_disk(file.name):
            yield file, latest


def still_valid(
    latest: Mapping[Path, Entry], jobs: Sequence[Job], config: LocalizeConfig
) -> dict[Path, Entry]:
    """Return the entries that hold today, by image: its file is as it was, its pictures exist."""
    valid = {}
    for job in jobs:
        entry = latest.get(job.path.absolute(), {"status": "new"})
        asked = {"overlay": job.overlay} if config.overlays else {}
        asked |= {"mask": job.mask} if config.masks else {}
        drawn = asked.items() <= entry.items() and all(
            Path(config.output, name).is_file() for name in asked.values()
        )
        if entry["status"] == "ok" and drawn and _is_unchanged(job.path, entry):
            valid[job.path] = entry
    return valid


def _is_unchanged(path: Path, entry: Entry) -> bool:
    try:
        return file_state(path).items() <= entry.items()
    except OSError:
        return False


def report(entries: Sequence[Entry], each: bool) -> None:
    """Print why images failed, and with `each` a line for every other image too."""
    for entry in entries:
        # a name may hold bytes that are not UTF-8, which standard output would refuse
        image = os.fsencode(entry["image"]).decode(errors="replace")
        if entry["status"] != "ok":
            print(f"{image}: failed, {entry['error']}", file=sys.stderr)
        elif each:
            print(f"{image}: {entry['name']} {entry['score']:.0%}, box {entry['box']}")


def process(
    nets: "Nets", config: LocalizeConfig, jobs: Sequence[Job], progress: BinaryIO
) -> dict[Path, Entry]:
    """Locate the images, append an entry for each to the progress file, and return them. Each
    thread takes whole batches: decoding, superpixels, PNG and the nets release Python's lock."""
    threads = config.threads or min(len(os.sched_getaffinity(0)), MOST_THREADS)
    batches = [jobs[i : i + config.batch_size] for i in range(0, len(jobs), config.batch_size)]
    work = partial(process_batch, nets, config)
    done = run_ahead(work, batches, threads=threads, depth=2 * threads + 1)
    line, failed = cli.ProgressPrinter(), 0
    results: dict[Path, Entry] = {}
    for batch, entries in zip(batches, done, strict=True):
        for job, entry in zip(batch, entries, strict=True):
            progress.write(json.dumps(entry).encode() + b"\n")
            results[job.path] = entry
            failed += entry["status"] != "ok"
        progress.flush()
        report(entries, each=len(jobs) <= FEW)
        if len(jobs) > FEW:
            line.show(len(results), len(jobs), note=f"{failed} failed")
    return results


def read_nets(config: LocalizeConfig) -> "Nets":
    """Return the nets on the device of --device; on a GPU, kernels are deterministic ones."""
    import torch

    from jobs.locate import keep_freed_memory
    from jobs.shipped import open_nets

    keep_freed_memory()
    torch.set_num_threads(1)  # batches share the cores; and sums depend on the number of threads
    device = choose_device(config.device)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not
        torch.use_deterministic_algorithms(True)
    nets = open_nets(config.run, accurate=config.accurate)
    for net in (nets.corruption, nets.clean_classifier):
        net.to(device)
    return nets


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with its flags (`--help` lists them)."""
    config = cli.parse(LocalizeConfig, argv, __doc__ or "")
    nets = read_nets(config)
    if storage.is_file(config.output):
        raise UserError(f"--output {config.output} is a file; give a folder.")
    location = storage.absolute(config.output)
    with storage.working_folder(location, BOXES_NAME, resumes=True) as folder:
        write_boxes(config, folder, nets)


def write_boxes(config: LocalizeConfig, output: Path, nets: "Nets") -> None:
    """Write a local output folder, and print the outcome. Raises UserError where images failed."""
    from jobs.shipped import nets_hash

    location, config = config.output, replace(config, output=output)
    images = find_images(config.images, output)
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    model = nets_hash(config.run)
    rule = config.rule or nets.config.rule
    settings = {"format": FORMAT, "model_sha256": model, "rule": rule}
    settings["accurate"] = config.accurate
    with open_progress(output, settings) as (progress, latest):
        jobs = name_results(images, output, latest)
        results = still_valid(latest, jobs, config)
        if results:
            print(f"{len(results)} of {len(jobs)} images are done already")
        results |= process(nets, config, [job for job in jobs if job.path not in results], progress)
        entries = [results[job.path] for job in jobs]
        current = {job.path.absolute() for job in jobs}
        others = [entry for path, entry in latest.items() if path not in current]
        record = cli.record(replace(config, output=location))
        content = {**settings, **record, "images": others + entries}
        with storage.atomic_file(output / BOXES_NAME) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
    failed = sum(entry["status"] != "ok" for entry in entries)
    noted = sum("note" in entry for entry in entries)
    print(
        f"{len(jobs) - failed} of {len(jobs)} images located, "
        f"{f'{noted} of them with a note, ' if noted else ''}"
        f"{cli.duration(time.monotonic() - started)}: {storage.join(location, BOXES_NAME)}"
    )
    if failed:
        raise UserError(f"{failed} of {len(jobs)} images failed; {BOXES_NAME} has the reasons.")


if __name__ == "__main__":
    cli.run(main)
