"""Kill the workers and the driver of a job on the tests' Ray."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import ray

from tests.e2e.commands import ROOT, environment


def workers(task: str) -> list[psutil.Process]:
    """Return the processes of this process's Ray that are in a task or actor of this name."""
    running = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ray::{task}" in " ".join(process.cmdline()):  # a worker's title
                running.append(process)
        except psutil.NoSuchProcess:
            continue
    return running


@contextmanager
def worker_killed(task: str, when: Callable[[], bool]) -> Iterator[list[int]]:
    """Kill a worker in a task of this name with SIGKILL once `when` holds. Yields the list that its
    process id is put into."""
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while not killed and not done.wait(0.002):
            for process in workers(task)[:1] if when() else ():
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        done.set()
        killer.join()


def kill_driver_when(condition: Callable[[], bool], module: str, *arguments: str) -> None:
    """Start a command on the tests' Ray and SIGKILL its driver alone once `condition` holds."""
    token = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment(**token, RAY_ADDRESS=ray.get_runtime_context().gcs_address),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 180
        while not condition():
            assert process.poll() is None, "the command ended too early"
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.002)
    finally:
        process.kill()
        print(process.communicate()[1])  # which pytest shows where the test fails
