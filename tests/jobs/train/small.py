"""A small training in this process: 2 warm-up and 2 adversarial epochs of 4 steps each."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from jobs.cli import flag, parse
from jobs.runs import METRICS_NAME
from jobs.train.config import PRESETS, TrainConfig
from jobs.train.log import TrainingLog
from jobs.train.state import state_numbers, state_tensors
from jobs.train.trainer import Trainer
from pipeline.loading.augmentation import Augmentation
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.order import Order
from pipeline.shards.format import read_manifest

CPU = torch.device("cpu")
State = tuple[dict[str, torch.Tensor], dict]


def config_for(data: Path | str, **changes: object) -> TrainConfig:
    """Parse a small training's flags and the changed ones; None leaves a flag out."""
    options: dict = {
        "data": data,
        "output": Path(data).parent / "run",
        "warmup_epochs": 2,
        "epochs": 2,
        "batch_size": 16,
        "net_width": 8,
        "bottleneck": 16,
        "target": 0.2,
    }
    flags = []
    for name, value in (options | changes).items():
        if isinstance(value, bool):
            flags.append(flag(name) if value else flag(f"no_{name}"))
        elif value is not None:
            flags += [flag(name), str(value)]
    return parse(TrainConfig, flags, "", PRESETS)


def new_trainer(config: TrainConfig, device: torch.device = CPU) -> Trainer:
    return Trainer(config, read_manifest(config.loading.data), device, ranks=1)


def batches_for(trainer: Trainer) -> Iterator[Batch]:
    """The batches from the trainer's position on."""
    settings, data = trainer.config.optimization, trainer.config.loading.data
    order = Order(batch_size=settings.batch_size, seed=settings.seed)
    loader = Loader(data, read_manifest(data), trainer.device)
    return loader.train(order, Augmentation(), start=trainer.position)


def train_steps(trainer: Trainer, steps: int) -> None:
    batches = batches_for(trainer)
    for _ in range(steps):
        trainer.train_step(batches)


def train_epochs(trainer: Trainer, epochs: int) -> None:
    train_steps(trainer, epochs * trainer.epoch_steps)


def train_logged(trainer: Trainer, run: Path, steps: int) -> list[dict]:
    """Train with a log in the folder, and return the lines of its metrics."""
    run.mkdir(exist_ok=True)
    trainer.log = TrainingLog(run, trainer.read_step)
    try:
        train_steps(trainer, steps)
    finally:
        trainer.log.close()
    return metrics(run)


def metrics(run: Path) -> list[dict]:
    return [json.loads(text) for text in (run / METRICS_NAME).read_text().splitlines()]


def weights(trainer: Trainer) -> torch.Tensor:
    nets = trainer.state.nets().values()
    return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two nets have the same weights to the last bit."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def state_of(trainer: Trainer) -> State:
    """All that a checkpoint keeps, but for times."""
    numbers = state_numbers(trainer.state)
    for name in ("interval", "epoch"):
        for time in ("seconds", "waiting", "first_batch"):
            del numbers[name][time]
    return state_tensors(trainer.state), numbers


def assert_same_state(trainer: Trainer, expected: State) -> None:
    tensors, numbers = state_of(trainer)
    assert numbers == expected[1]
    assert tensors.keys() == expected[0].keys()
    assert all(torch.equal(tensors[name], expected[0][name]) for name in tensors)


@contextmanager
def no_room() -> Iterator[None]:
    """No file of this process, its output too, may grow past 600 bytes: a write fails as on a full
    disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
