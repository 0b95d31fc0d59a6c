from pathlib import Path

import pytest
import torch

from jobs.runs import Nets, new_classifier, new_corruption, save_nets
from jobs.train.config import TrainConfig
from jobs.train.trainer import model_config
from pipeline.shards.format import read_manifest


@pytest.fixture(scope="session")
def random_run(small_set: Path) -> Path:
    """A run folder with nets of random weights that fit `small_set`."""
    manifest = read_manifest(small_set)
    asked = TrainConfig(data=str(small_set), output=Path("unused"), net_width=8, bottleneck=16)
    config = model_config(asked, manifest)
    torch.manual_seed(0)
    nets = Nets(
        config=config,
        corruption=new_corruption(config),
        classifier=new_classifier(config),
        clean_classifier=new_classifier(config),
    )
    run = small_set.parent / "random-run"
    run.mkdir()
    save_nets(run, nets, {})
    return run
