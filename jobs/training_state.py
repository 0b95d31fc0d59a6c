"""Everything that changes during training, its checkpoint, and the learning-rate schedules."""

import copy
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from jobs.cli import option
from jobs.loading import LoadingConfig
from jobs.models import ModelConfig, Nets, new_classifier, new_corruption
from model.classifier import Classifier
from model.controller import ControllerState
from model.corruption import CorruptionNet

CHECKPOINT_NAME = "state.pt"
FAILURE_NAME = "failure.txt"
RAMP_STEPS = 50  # of the learning rates at the start of the adversarial phase
DECAY_SHARE = 0.3  # of the adversarial phase, at its end, in which they fall to 0
WARMUP_RAMP_SHARE = 0.1  # of the warm-up, in which the rate rises
WARMUP_WEIGHT_DECAY = 0.05
ADVERSARIAL_BETAS = (0.5, 0.999)


class TrainingError(Exception):
    """Training that cannot go on; the message names the cause and a remedy."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoadingConfig):
    """How to train; `docs/method.md` explains each choice."""

    output: Path = option(help="folder for checkpoints, metrics and the trained nets")
    workers: int = option(2, help="training processes, each with one GPU or one CPU core")
    device: str = option("auto", help="cpu, cuda, or auto: cuda where the cluster has GPUs")
    warmup_epochs: int = option(25, help="epochs of the classifier alone, on clean images")
    epochs: int = option(10, help="epochs of adversarial training after that")
    batch_size: int = option(64, help="images per step over all workers")
    seed: int = option(0, help="of weights, order, crops and mask samples")
    net_width: int = option(24, help="channels of the nets' first layers, a multiple of 8")
    bottleneck: int = option(256, help="units of the corruption net's fully connected layer")
    warmup_rate: float = option(1e-3, help="peak learning rate of the warm-up")
    corruption_rate: float = option(2e-3, help="learning rate of the corruption net")
    classifier_rate: float = option(1e-3, help="learning rate of the classifier, adversarial")
    clean_weight: float = option(
        1.0, help="weight of clean images in the classifier's adversarial loss (paper: 0)"
    )
    target: float | None = option(
        None, help="accuracy on masked images to hold, 0 to 1 (the paper's is 0.1)"
    )
    target_share: float = option(
        0.5, help="without --target: its place between chance and the clean accuracy, 0 to 1"
    )
    area_power: int = option(2, help="power of the masked area in the loss (paper: 1)")
    area_start: float = option(
        1.0, help="first weight of the area, as a multiple of the first corruption loss"
    )
    controller_rate: float = option(0.006, help="relative change of the area weight per step")
    averaging: float = option(0.99, help="decay of the corruption net's running average, per step")
    verify_shards: bool = option(
        False, help="first check every byte of a local set's train shards by SHA-256"
    )
    log_interval: int = option(20, help="steps between lines of the log")
    max_failures: int = option(
        2, help="deaths of workers to recover from, each from the last epoch"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = "a number above 0"
        checks = {
            "workers": (self.workers >= 1, "from 1"),
            "epochs": (self.epochs >= 1, "from 1"),
            "batch_size": (self.batch_size >= 1, "from 1"),
            "log_interval": (self.log_interval >= 1, "from 1"),
            "bottleneck": (self.bottleneck >= 1, "from 1"),
            "seed": (self.seed >= 0, "from 0"),
            "max_failures": (self.max_failures >= 0, "from 0"),
            "net_width": (self.net_width >= 8 and self.net_width % 8 == 0, "a multiple of 8"),
            "warmup_epochs": (
                self.warmup_epochs >= 1,
                "from 1: without a warmed-up classifier the masks collapse to nothing and the "
                "gate never lets it learn",
            ),
            "warmup_rate": (0 < self.warmup_rate < math.inf, positive),
            "corruption_rate": (0 < self.corruption_rate < math.inf, positive),
            "classifier_rate": (0 < self.classifier_rate < math.inf, positive),
            "area_start": (0 < self.area_start < math.inf, positive),
            "clean_weight": (0 <= self.clean_weight < math.inf, "a number from 0"),
            "target": (self.target is None or 0 < self.target < 1, "between 0 and 1"),
            "target_share": (0 < self.target_share < 1, "between 0 and 1"),
            "controller_rate": (0 < self.controller_rate < 1, "between 0 and 1"),
            "averaging": (0 <= self.averaging < 1, "from 0, below 1"),
            "area_power": (self.area_power in (1, 2), "1 or 2"),
            "device": (self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {getattr(self, name)} is out of range: {allowed}")


@dataclass
class TrainingState:
    """One rank's nets and everything else that a checkpoint must hold to go on as if never
    interrupted. Order, crops and mask samples are functions of the seed and the step, so the
    step is the loader's position too."""

    corruption: CorruptionNet
    corruption_average: CorruptionNet
    classifier: Classifier
    clean_classifier: Classifier
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    step: int = 0
    clean_accuracy: float = 0.0
    target: float = 0.0
    controller: ControllerState | None = None

    def nets(self) -> dict[str, nn.Module]:
        return {
            "corruption": self.corruption,
            "corruption_average": self.corruption_average,
            "classifier": self.classifier,
            "clean_classifier": self.clean_classifier,
        }


def new_state(config: TrainConfig, model: ModelConfig, device: torch.device) -> TrainingState:
    """The state before the first step: the same weights on every rank, from the seed."""
    torch.manual_seed(config.seed)
    # convolutions are faster on channels-last weights, on CPUs (1.13 x measured) as on GPUs
    corruption, classifier = new_corruption(model).to(device), new_classifier(model).to(device)
    for net in (corruption, classifier):
        convert_conv2d_weight_memory_format(net, torch.channels_last)
    state = TrainingState(
        corruption=corruption,
        corruption_average=copy.deepcopy(corruption).requires_grad_(False),
        classifier=classifier,
        clean_classifier=copy.deepcopy(classifier).requires_grad_(False),
    )
    state.optimizers["warmup"] = torch.optim.AdamW(
        classifier.parameters(), config.warmup_rate, weight_decay=WARMUP_WEIGHT_DECAY
    )
    for name, net, rate in (
        ("corruption", corruption, config.corruption_rate),
        ("classifier", classifier, config.classifier_rate),
    ):
        state.optimizers[name] = torch.optim.Adam(net.parameters(), rate, ADVERSARIAL_BETAS)
    return state


def finished_nets(state: TrainingState, model: ModelConfig) -> Nets:
    """The nets to evaluate with."""
    return Nets(
        config=model,
        corruption=state.corruption_average,
        classifier=state.classifier,
        clean_classifier=state.clean_classifier,
    )


def save_state(folder: Path, state: TrainingState) -> None:
    """Write a checkpoint into `folder`."""
    content: dict[str, Any] = {
        "nets": {name: net.state_dict() for name, net in state.nets().items()},
        "optimizers": {name: o.state_dict() for name, o in state.optimizers.items()},
        "step": state.step,
        "clean_accuracy": state.clean_accuracy,
        "target": state.target,
        "controller": asdict(state.controller) if state.controller else None,
    }
    torch.save(content, folder / CHECKPOINT_NAME)


def restore_state(folder: Path, state: TrainingState) -> None:
    """Fill a new state from a checkpoint, in place."""
    # Onto the CPU first: Adam's step counts stay there, where reading them waits for no GPU.
    content = torch.load(folder / CHECKPOINT_NAME, map_location="cpu", weights_only=True)
    for name, net in state.nets().items():
        net.load_state_dict(content["nets"][name])
    for name, optimizer in state.optimizers.items():
        optimizer.load_state_dict(content["optimizers"][name])
    state.step = content["step"]
    state.clean_accuracy = content["clean_accuracy"]
    state.target = content["target"]
    saved = content["controller"]
    state.controller = ControllerState(**saved) if saved else None


def warmup_factor(step: int, steps: int) -> float:
    """Share of the peak rate at `step` of the warm-up: a linear rise, then a cosine to 0."""
    ramp = max(1, round(steps * WARMUP_RAMP_SHARE))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def adversarial_factor(step: int, steps: int) -> float:
    """Share of the rates at `step` of the adversarial phase: up, level, linearly to 0."""
    rise = min(1.0, (step + 1) / RAMP_STEPS)
    fall = min(1.0, (steps - step) / (DECAY_SHARE * steps))
    return rise * fall


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
