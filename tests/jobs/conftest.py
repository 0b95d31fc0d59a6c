from pathlib import Path

import pytest
import torch

from jobs.runs import Nets, new_classifier, new_corruption, save_nets
from jobs.train.trainer import model_config
from pipeline.shards.format import read_manifest
from tests.jobs.train.small import config_for


def write_random_run(run: Path, data: Path, seed: int) -> None:
    """Write a run folder with nets of random weights that fit the shards."""
    config = model_config(config_for(data), read_manifest(data))
    torch.manual_seed(seed)
    nets = Nets(
        config=config,
        corruption=new_corruption(config),
        classifier=new_classifier(config),
        clean_classifier=new_classifier(config),
    )
    run.mkdir()
    save_nets(run, nets, {})


@pytest.fixture(scope="session")
def random_run(small_set: Path) -> Path:
    """A run folder with nets of random weights that fit `small_set`."""
    run = small_set.parent / "random-run"
    write_random_run(run, small_set, 0)
    return run
