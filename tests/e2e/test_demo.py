"""The demo: its command at its smallest, and a fifth of it to show that the method works."""

from pathlib import Path
from typing import Any

import pytest

from jobs.demo import generate
from jobs.evaluate import __main__ as evaluate
from jobs.preprocess import __main__ as preprocess
from jobs.train import __main__ as train
from pipeline.errors import UserError
from pipeline.evaluation.results import read_evaluation
from pipeline.synthetic import SyntheticConfig, write_synthetic
from tests.e2e.commands import run

FIFTH = "--net-width 16 --bottleneck 128 --batch-size 32 --warmup-epochs 10 --epochs 9 --workers 1"


def figures(evaluation: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of each map's box by the paper's rule."""
    rows = read_evaluation(evaluation).rows
    return {r.row.map: r.figures for r in rows if r.row.rule in ("paper", None)}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_masks_localize_better_than_cam_and_the_centred_box(tmp_path: Path) -> None:
    images, shards, model, evaluation = (
        str(tmp_path / name) for name in ("images", "shards", "run", "evaluation")
    )
    write_synthetic(tmp_path / "images", SyntheticConfig(train_images=2000, val_images=300))
    size = "--image-size 48 --superpixels 100"
    preprocess.main(["--source", images, "--output", shards, *size.split()])
    train.main(["--data", shards, "--output", model, *FIFTH.split()])
    evaluate.main(["--data", shards, "--run", model, "--output", evaluation])
    rows = figures(tmp_path / "evaluation")
    aln, cam, centred = (rows[name] for name in ("aln", "cam", "centred box"))
    assert aln["gt_known"] > cam["gt_known"] > centred["gt_known"]
    assert aln["max_box_acc"] > cam["max_box_acc"] + 0.2
    assert aln["auc_gap"] > cam["auc_gap"]


@pytest.mark.slow
def test_the_smallest_demo_runs_every_command(tmp_path: Path) -> None:
    sizes = "--train-images 64 --val-images 16 --warmup-epochs 1 --epochs 1 --workers 1"
    result = run("-m", "jobs.demo", "--output", str(tmp_path / "demo"), *sizes.split())
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "demo" / "evaluation-0" / "report.html").is_file()
    assert len(list((tmp_path / "demo" / "localized-0").glob("*.png"))) == 3


def test_a_demo_does_not_mix_its_images_with_others(tmp_path: Path) -> None:
    few = SyntheticConfig(train_images=8, val_images=2)
    generate(tmp_path / "images", few)
    names = sorted((tmp_path / "images").rglob("*"))
    generate(tmp_path / "images", few)
    assert sorted((tmp_path / "images").rglob("*")) == names
    with pytest.raises(UserError, match="train_images=8"):
        generate(tmp_path / "images", SyntheticConfig(train_images=9, val_images=2))
