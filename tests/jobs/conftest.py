from pathlib import Path

import pytest
import torch

from jobs.models import ModelConfig, Nets, new_classifier, new_corruption, save_nets
from pipeline.shards import read_card


@pytest.fixture(scope="session")
def random_run(small_set: Path) -> Path:
    """A run folder with nets of random weights that fit `small_set`."""
    card = read_card(small_set)
    config = ModelConfig(
        classes=card.classes,
        class_names=card.class_names,
        height=card.height,
        width=card.width,
        net_width=8,
        bottleneck=16,
        mean=card.mean,
        std=card.std,
        superpixels=25,
        compactness=10.0,
    )
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
