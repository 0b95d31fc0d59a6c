"""The demo: a part of it, to show that the method works."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from jobs import demo
from pipeline.errors import UserError
from pipeline.evaluation.results import read_evaluation
from pipeline.synthetic import SyntheticConfig
from tests.e2e.commands import words

SMALLER = {  # than the demo's, so that it trains in a minute
    "preprocess": "--image-size 48 --superpixels 100",
    "train": "--net-width 16 --bottleneck 128 --batch-size 32",
}


def call_command(name: str, *arguments: Path, **flags: object) -> None:
    """Stand in for `run_command`: in this process and smaller."""
    main = importlib.import_module(f"jobs.{name}.__main__").main
    main([*words(**flags), *map(str, arguments), *SMALLER.get(name, "").split()])


def figures(evaluation: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of each map's box by the paper's rule."""
    rows = read_evaluation(evaluation).rows
    return {r.row.map: r.figures for r in rows if r.row.rule in ("paper", None)}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_the_demo_finds_objects_better_than_cam_and_the_centred_box(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run_command", call_command)
    size = {"train_images": 1400, "val_images": 240, "warmup_epochs": 10, "epochs": 8}
    demo.demo(demo.DemoConfig(output=tmp_path, workers=1, **size))
    rows = figures(tmp_path / "evaluation-0")
    aln, cam, centred = (rows[name] for name in ("aln", "cam", "centred box"))
    assert aln["gt_known"] > cam["gt_known"] > centred["gt_known"]
    assert aln["max_box_acc"] > cam["max_box_acc"] + 0.2
    assert aln["auc_gap"] > cam["auc_gap"]
    assert (tmp_path / "evaluation-0" / "report.html").is_file()
    assert len(list((tmp_path / "localized-0").glob("*.png"))) == 3


def test_a_command_of_the_demo_is_shown_and_its_failure_ends_the_demo(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"jobs\.report failed with exit code 1"):
        demo.run_command("report", tmp_path / "run", output=tmp_path / "out.html")
    printed = capfd.readouterr()
    command = f"$ python -m jobs.report --output {tmp_path}/out.html {tmp_path}/run"
    assert command in printed.out
    assert printed.err.startswith("error: ")


def test_a_demo_does_not_mix_its_images_with_others(tmp_path: Path) -> None:
    few = SyntheticConfig(train_images=8, val_images=2)
    demo.generate(tmp_path / "images", few)
    names = sorted((tmp_path / "images").rglob("*"))
    demo.generate(tmp_path / "images", few)
    assert sorted((tmp_path / "images").rglob("*")) == names
    with pytest.raises(UserError, match="train_images=8"):
        demo.generate(tmp_path / "images", SyntheticConfig(train_images=9, val_images=2))
