"""The script for a GPU runs on a CPU in a tiny size, so that it cannot rot unnoticed."""

import json
from pathlib import Path

import pytest

from tests.e2e.commands import run


@pytest.mark.slow
def test_every_part_leaves_its_figures(tmp_path: Path) -> None:
    tiny = "--train-images 16 --val-images 16 --batch-sizes 8 --steps 1 --turns 1"
    flags = f"--device cpu --no-tests --seconds 0.01 --network-batch 1 {tiny} --output {tmp_path}"
    result = run("-m", "benchmarks.gpu", *flags.split())
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert content["preprocessing"]["images_per_second"] > 0
    rates = content["loading"]["images_per_second"]
    assert rates.keys() == {"loader, 8 a batch", "resident, 8 a batch"}
    assert content["steps"]["ratios"]["float32, 8 a step"]["joint: resident / unfed"] > 0
    assert content["evaluation"]["seconds_of_all_images"]["all maps, the usual tasks"] > 0
    assert content["network"]["over_bare_passes"]["inference"] > 0
    assert content["profile"]["dearest"]
