from pathlib import Path

import pytest
import torch

from jobs.runs import Nets, new_classifier, new_corruption, save_nets
from jobs.train.worker import model_config
from pipeline.shards.format import read_manifest
from tests.jobs.train.small import config_for


@pytest.fixture(scope="session")
def random_run(small_set: Path) -> Path:
    """A run folder with nets of random weights that fit `small_set`."""
    manifest = read_manifest(small_set)
    config = model_config(config_for(small_set), manifest)
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
