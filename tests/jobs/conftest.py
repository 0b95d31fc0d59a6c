from pathlib import Path

import pytest
import torch

from jobs.models import Nets, new_classifier, new_corruption, save_nets
from jobs.training import model_config
from jobs.training_state import TrainConfig
from pipeline.shards import read_card


@pytest.fixture(scope="session")
def random_run(small_set: Path) -> Path:
    """A run folder with nets of random weights that fit `small_set`."""
    card = read_card(small_set)
    asked = TrainConfig(data=str(small_set), output=Path("unused"), net_width=8, bottleneck=16)
    config = model_config(asked, card)
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
