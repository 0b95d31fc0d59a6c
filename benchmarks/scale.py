"""`python -m benchmarks.scale --folder NEW`: the preprocessing job on as many images as ILSVRC has.

A tar of 1000 tars with 1,281,167 small JPEGs is generated in the folder (2 GB) and goes through
`python -m jobs.preprocess` as a process of its own, whose memory is watched. Whatever grew with the
number of images would show: in the peak memory, or in the rate of the last tenth of the shards.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from benchmarks.machine import hardware
from jobs import cli
from pipeline.errors import UserError

POOL = 2048  # distinct images, which names and classes share
SIDE = 32
SAMPLE_SECONDS = 0.5  # between looks at the processes
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """How many images, and where they lie meanwhile."""

    folder: Path = cli.option(help="empty or new; emptied in the end")
    images: int = cli.option(1_281_167, help="generated")
    classes: int = cli.option(1000, help="they are spread over evenly")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


@dataclass(kw_only=True)
class Peak:
    """Largest resident memory so far, in bytes: of the driver and of any process of Ray's workers;
    the same when a tenth of the shards was there."""

    driver: int = 0
    worker: int = 0
    driver_at_a_tenth: int = 0
    worker_at_a_tenth: int = 0


def pool() -> list[bytes]:
    """Small JPEGs, each another picture."""
    found = []
    for seed in range(POOL):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        pixels = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        found.append(simplejpeg.encode_jpeg(pixels, 80))
    return found


def member(name: str, data: bytes) -> bytes:
    """A file in a tar: header, content and padding."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    padding = bytes(-len(data) % tarfile.BLOCKSIZE)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + padding


def write_archive(path: Path, images: int, classes: int) -> None:
    """ILSVRC2012_img_train.tar in miniature pictures: a tar of a tar per class."""
    pictures = pool()
    number = 0
    end = bytes(2 * tarfile.BLOCKSIZE)
    with path.open("wb") as file:
        for label in range(classes):
            wnid = f"n{label + 1:08d}"
            inner = io.BytesIO()
            for i in range(images * (label + 1) // classes - images * label // classes):
                inner.write(member(f"{wnid}_{i}.JPEG", pictures[number % POOL]))
                number += 1
            inner.write(end)
            file.write(member(f"{wnid}.tar", inner.getvalue()))
        file.write(end)
    assert number == images


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of every process."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                stat = (path / "stat").read_text()
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has ended
            found[int(path.name)] = (int(stat.rpartition(")")[2].split()[1]), command)
    return found


def descends(process: int, ancestor: int, table: dict[int, tuple[int, str]]) -> bool:
    """Whether a process is below another."""
    while process in table and process != ancestor:
        process = table[process][0]
    return process == ancestor


def peak_memory(process: int) -> int:
    """The largest resident memory that a process has had, in bytes; 0 where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def watch(process: "subprocess.Popen[str]", parts: Path, shards: int) -> Peak:
    """Follow the job to its end."""
    peak = Peak()
    while process.poll() is None:
        table = processes()
        peak.driver = max(peak.driver, peak_memory(process.pid))
        for number, (_, command) in table.items():
            if command.startswith("ray::") and descends(number, process.pid, table):
                peak.worker = max(peak.worker, peak_memory(number))
        if not peak.worker_at_a_tenth and len(list(parts.glob("*.parquet"))) >= shards // 10:
            peak.driver_at_a_tenth, peak.worker_at_a_tenth = peak.driver, peak.worker
        time.sleep(SAMPLE_SECONDS)
    return peak


def rates(parts: Path, images: int) -> list[float]:
    """Images per second over each tenth of the shards, from when each was committed."""
    times = np.sort([path.stat().st_mtime for path in parts.glob("*.parquet")])
    edges = np.linspace(0, len(times) - 1, 11).astype(int)
    per_shard = images / len(times)
    return (np.diff(edges) * per_shard / np.diff(times[edges])).tolist()


def main() -> None:
    config = cli.parse(ScaleConfig, None, __doc__ or "")
    source, output = config.folder / "source", config.folder / "shards"
    source.mkdir(parents=True)
    started = time.monotonic()
    write_archive(source / "ILSVRC2012_img_train.tar", config.images, config.classes)
    os.sync()  # what this left to write would be charged to the first shards
    generated = time.monotonic() - started
    print(f"{config.images} images generated in {generated:.0f} s", flush=True)
    command = [sys.executable, "-m", "jobs.preprocess", "--source", str(source)]
    command += ["--output", str(output), "--image-size", "32", "--superpixels", "16"]
    command += ["--image-format", "jpg"]
    log = config.folder / "log"
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, text=True)
        peak = watch(process, output / "train", config.images // 1000)
    total = time.monotonic() - started
    text = log.read_text()
    if process.returncode:
        raise UserError(f"the job ended with {process.returncode}: {text[-2000:]}")
    print(text)
    row = re.search(r"^train .* ([\d.]+)$", text, re.MULTILINE)
    assert row is not None
    speed = rates(output / "train", config.images)
    shards = len(list((output / "train").glob("*.tar")))
    workers = os.cpu_count() or 1
    in_tasks = float(row[1])
    making = sum(config.images / 10 / rate for rate in speed)
    started = time.monotonic()
    subprocess.run([*command[:3], "--verify", "--output", str(output)], check=True)
    content: dict[str, Any] = {
        "hardware": hardware(),
        "images": config.images,
        "classes": config.classes,
        "shards": shards,
        "images_per_second": config.images / making,
        "images_per_second_by_tenth": speed,
        "last_over_first_tenth": speed[-1] / speed[0],
        "seconds": {
            "job, from start to exit": total,
            "tasks, added up": in_tasks,
            "between two tasks of a worker, mean": ((workers * making - in_tasks) / shards),
            "verification": time.monotonic() - started,
        },
        "peak_rss_mib": {name: value / MIB for name, value in asdict(peak).items()},
    }
    print(json.dumps(content, indent=1))
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"{date.today().isoformat()}-preprocess-scale.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    shutil.rmtree(config.folder)
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
