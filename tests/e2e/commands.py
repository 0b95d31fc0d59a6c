"""Running the project's commands as a user would: separate processes in the checkout."""

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


def kill_when(condition: Callable[[], bool], *arguments: str, timeout: float = 180) -> None:
    """Start `python <arguments>` and SIGKILL it with all its children once `condition` holds."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + timeout
        while not condition():
            assert process.poll() is None, f"ended with {process.returncode} before the kill"
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
