"""Killing a worker in the midst of a Ray task, for tests of what a job makes of it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def one_worker_killed(task: str, within: float = 60.0) -> Iterator[list[int]]:
    """Kills, with SIGKILL, the first worker of this process's Ray that is seen in a task of this
    name; yields the list that will hold its process id. A worker's title tells its task."""
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + within
        while not killed and not done.is_set() and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                try:
                    if f"ray::{task}" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        done.set()
        killer.join()
