"""`python -m benchmarks.serving`: requests per second, latency and memory of a running jobs.serve.

Start `python -m jobs.serve` on this machine first. Memory is the resident size of it and of all
processes that it started, its Ray too, without pages that they share.
"""

import http.client
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import psutil

from benchmarks.machine import hardware
from jobs import cli
from jobs.pictures import encode_jpeg
from pipeline.synthetic import SyntheticConfig, draw_image

IMAGES = 20  # different ones, in turn
PARTS = 10  # after each of which memory is read: growth with every request would show


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """How many requests are sent, and where."""

    requests: int = cli.option(10_000, low=1, help="images sent in all")
    at_once: int = cli.option(200, low=1, help="requests under way at any time")
    side: int = cli.option(400, low=64, help="sides of the images")
    port: int = cli.option(8000, low=1, high=65535, help="of jobs.serve on this machine")

    def __post_init__(self) -> None:
        cli.check_bounds(self)


def memory() -> float:
    """Return the MiB that jobs.serve and the processes below it have for themselves."""
    total = 0
    for process in psutil.process_iter(["cmdline"]):
        if "jobs.serve" in (process.info["cmdline"] or ()):
            for part in (process, *process.children(recursive=True)):
                with suppress(psutil.Error):  # it has just ended
                    total += part.memory_full_info().uss
    return total / 2**20


def send(config: ServingConfig, image: bytes) -> tuple[int, float]:
    """Return status code and seconds of a request."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("localhost", config.port, timeout=120)
    connection.request("POST", "/localize?mask=1", image)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with its flags (`--help` lists them)."""
    config = cli.parse(ServingConfig, argv, __doc__ or "")
    drawing = SyntheticConfig(min_side=config.side, max_side=config.side)
    images = [encode_jpeg(draw_image(drawing, "val", i)[0]) for i in range(IMAGES)]
    send(config, images[0])
    memories, answers, started = [memory()], [], time.perf_counter()
    with ThreadPoolExecutor(config.at_once) as pool:
        for answer in pool.map(lambda i: send(config, images[i % IMAGES]), range(config.requests)):
            answers.append(answer)
            if len(answers) * PARTS // config.requests >= len(memories):
                memories.append(memory())
    seconds = time.perf_counter() - started
    times = [taken for status, taken in answers if status == 200] or [np.nan]
    p50, p99 = np.percentile(times, [50, 99])
    codes = dict(Counter(status for status, _ in answers))
    print(hardware())
    print(f"{config.requests} requests, {config.at_once} at once, {len(times) / seconds:.1f}/s")
    print(f"status codes {codes}; p50 {p50:.2f} s, p99 {p99:.2f} s")
    print(f"MiB before and after each {1 / PARTS:.0%}:", *(f"{size:.0f}" for size in memories))


if __name__ == "__main__":
    cli.run(main)
