"""Running the project's commands as a user would: separate processes in the checkout."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    """The tests' environment without a Ray cluster of theirs, with this Python first in PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path} | changes


def run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python <arguments>` to its end, output captured."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """`python <arguments>` in a process group of its own, without output."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], timeout: float = 180
) -> None:
    """Return once `condition` holds, while the process runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} too early"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.1)


def descendants(ancestor: int) -> dict[int, str]:
    """The command lines of a process's children and theirs, by process id."""
    parents, lines = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            lines[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    below: dict[int, str] = {}
    for process, line in lines.items():
        above = process
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor and process != ancestor:
            below[process] = line
    return below


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the process with all its descendants, where they still run. Ray's workers are in
    groups of their own, and would go on for a moment."""
    for number in (*descendants(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def kill_when(condition: Callable[[], bool], *arguments: str, timeout: float = 180) -> None:
    """Start `python <arguments>` and SIGKILL it with all its children once `condition` holds."""
    process = start(*arguments)
    try:
        wait_until(condition, process, timeout)
    finally:
        end(process)
