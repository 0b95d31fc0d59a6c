"""What the benchmarks share: the machine they ran on, generated shards, and their result's file."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import ray
import torch

from jobs import cli
from pipeline.shards.make import Progress, preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.synthetic import SyntheticConfig, write_synthetic


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


def make_shards(folder: Path, images: SyntheticConfig, name: str = "shards", **flags: Any) -> Path:
    """Write generated images and their shards below the folder, by a Ray that ends with it. Returns
    the set's folder. flags: of jobs.preprocess."""
    write_synthetic(folder / "images", images)
    settings = {"superpixels": 196, **flags}
    source, output = folder / "images", folder / name
    ray.init(address="local", include_dashboard=False, logging_level="warning")
    preprocess(
        PreprocessConfig(source=str(source), output=str(output), **settings), quiet, cli.connect_ray
    )
    ray.shutdown()  # its processes would share the cores
    return output


def write_result(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a result as a dated JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.today().isoformat()}-{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")
