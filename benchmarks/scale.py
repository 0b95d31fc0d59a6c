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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from benchmarks.machine import hardware, write_result
from jobs import cli
from pipeline.errors import UserError
from pipeline.tar import BLOCK, pack_header, padded

POOL = 2048  # distinct images, which names and classes share
SIDE = 32
SAMPLE_SECONDS = 0.5  # between looks at the processes


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """How many images, and where they lie meanwhile."""

    folder: Path = cli.option(help="empty or new; emptied in the end")
    images: int = cli.option(1_281_167, help="generated")
    classes: int = cli.option(1000, help="they are spread over evenly")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


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
    return pack_header(name.encode(), len(data)) + data + bytes(padded(len(data)) - len(data))


def write_archive(path: Path, images: int, classes: int) -> None:
    """ILSVRC2012_img_train.tar in miniature pictures: a tar of a tar per class."""
    pictures = pool()
    number = 0
    end = bytes(2 * BLOCK)
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


def peak_memory(process: Path) -> int:
    """The largest resident memory that a process has had, in MiB; 0 where it has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    except OSError:
        return 0
    return int(found[1]) // 1024 if found else 0


def is_worker(process: Path) -> bool:
    """Whether a process is a worker of some Ray on this machine."""
    try:
        return (process / "cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def watch(process: "subprocess.Popen[str]") -> dict[str, int]:
    """Follow the job to its end. Returns the largest memory of the driver and of any worker."""
    peak = {"driver": 0, "worker": 0}
    while process.poll() is None:
        workers = filter(is_worker, Path("/proc").glob("[0-9]*"))
        peak["worker"] = max([peak["worker"], *map(peak_memory, workers)])
        peak["driver"] = max(peak["driver"], peak_memory(Path(f"/proc/{process.pid}")))
        time.sleep(SAMPLE_SECONDS)
    return peak


def rates(records: Path, images: int) -> list[float]:
    """Images per second over each tenth of the shards, from when each was committed."""
    times = np.sort([path.stat().st_mtime for path in records.glob("*.parquet")])
    edges = np.linspace(0, len(times) - 1, 11).astype(int)
    per_shard = images / len(times)
    return (np.diff(edges) * per_shard / np.diff(times[edges])).tolist()


def main() -> None:
    config = cli.parse(ScaleConfig, None, __doc__ or "")
    source, output = config.folder / "source", config.folder / "shards"
    source.mkdir(parents=True)
    write_archive(source / "ILSVRC2012_img_train.tar", config.images, config.classes)
    os.sync()  # what this left to write would be charged to the first shards
    command = [sys.executable, "-m", "jobs.preprocess", "--source", str(source)]
    command += ["--output", str(output), "--image-size", "32", "--superpixels", "16"]
    command += ["--image-format", "jpg"]
    log = config.folder / "log"
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, text=True)
        peak = watch(process)
    total = time.monotonic() - started
    text = log.read_text()
    if process.returncode:
        raise UserError(f"the job ended with {process.returncode}: {text[-2000:]}")
    print(text)
    speed = rates(output / "train", config.images)
    started = time.monotonic()
    subprocess.run([*command[:3], "--verify", "--output", str(output)], check=True)
    content: dict[str, Any] = {
        "hardware": hardware(),
        "images": config.images,
        "classes": config.classes,
        "images_per_second_by_tenth": speed,
        "last_over_first_tenth": speed[-1] / speed[0],
        "seconds": {"job": total, "verification": time.monotonic() - started},
        "peak_rss_mib": peak,
    }
    print(json.dumps(content, indent=1))
    write_result(config.output, "preprocess-scale", content)
    shutil.rmtree(config.folder)


if __name__ == "__main__":
    cli.run(main)
