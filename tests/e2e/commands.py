"""Running the project's commands as a user would: separate processes in the checkout."""

import os
import subprocess
import sys
from pathlib import Path

from jobs import cli

ROOT = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    """The tests' environment without a Ray cluster of theirs, with this Python first in PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path} | changes


def words(**flags: object) -> list[str]:
    """Return flags and their values as the words of a command line."""
    return [word for name, value in flags.items() for word in (cli.flag(name), str(value))]


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
