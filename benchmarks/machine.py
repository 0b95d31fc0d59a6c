"""What the benchmarks share: the machine they ran on, silent progress, and their result's file."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

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


def write_result(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a result as a dated JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.today().isoformat()}-{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")
