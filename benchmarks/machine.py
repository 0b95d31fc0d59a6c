"""What the benchmarks share: the machine they ran on, and progress that nobody sees."""

import os
import platform
from pathlib import Path

import ray
import torch

from pipeline.shards.make import Progress


def hardware() -> dict[str, str | int]:
    """Return the machine and the versions that rates depend on, for a result's file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count() or 0,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
    }


def quiet(progress: Progress) -> None:
    """Show nothing: printing is not measured."""
