"""The state of a training, what a checkpoint keeps of it, and the learning-rate schedules."""

import copy
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from jobs.runs import (
    ModelConfig,
    Nets,
    load_net_tensors,
    net_tensors,
    new_classifier,
    new_corruption,
)
from jobs.train.config import TrainConfig
from jobs.train.graphs import memory_layout
from model.classifier import Classifier
from model.collapse import CollapseState
from model.controller import ControllerState
from model.corruption import CorruptionNet
from model.step import Gradients, trainable

if TYPE_CHECKING:
    from pipeline.loading.loader import Batch

RAMP_STEPS = 50  # of the learning rates at the start of the adversarial phase
DECAY_SHARE = 0.3  # of the adversarial phase, at its end, in which they fall to 0
WARMUP_RAMP_SHARE = 0.1  # of the warm-up, in which the rate rises
WARMUP_WEIGHT_DECAY = 0.05
ADVERSARIAL_BETAS = (0.5, 0.999)


class TrainingError(Exception):
    """Training that cannot go on; the message names the cause and a remedy."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A step's reduced sums on their way to the host."""

    step: int  # how many steps had been made with it
    total: int  # images in it, over all ranks
    joint: bool
    names: tuple[str, ...]
    values: Tensor
    ready: torch.cuda.Event | None = None
    batch: "Batch | None" = None  # whose GPU memory is reused once nothing refers to it

    def read(self) -> dict[str, float]:
        """Wait for the sums, and return them by name."""
        if self.ready is not None:
            self.ready.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; `restored` reads it."""
        return {"step": self.step, "total": self.total, "joint": self.joint, "sums": self.read()}


def restored(saved: Mapping[str, Any]) -> Pending:
    """Return a step whose numbers the host had not read when its checkpoint was written."""
    return Pending(
        step=saved["step"],
        total=saved["total"],
        joint=saved["joint"],
        names=tuple(saved["sums"]),
        values=torch.tensor(list(saved["sums"].values()), dtype=torch.float64),
    )


def send(step: int, batch: "Batch", sums: Mapping[str, Tensor], joint: bool) -> Pending:
    """Start a step's sums on their way to the host; on a GPU nothing waits for them."""
    names = tuple(sorted(sums))
    values = torch.stack([sums[name] for name in names])
    ready = None
    if values.is_cuda:
        values = values.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
    return Pending(
        step=step,
        total=batch.total,
        joint=joint,
        names=names,
        values=values,
        ready=ready,
        batch=batch,
    )


@dataclass(kw_only=True)
class Interval:
    """Sums over the steps of an interval. counts: over how many images each sum went. seconds,
    waiting, first_batch: of time, `seconds` only what passed before an interruption."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    images: int = 0
    steps: int = 0
    joint_steps: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    first_batch: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, sums: Mapping[str, float], total: int, joint: bool) -> None:
        """Take in a step."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + total
        self.images += total
        self.steps += 1
        self.joint_steps += joint

    def means(self) -> dict[str, float]:
        """Return each sum over its images; counts of right answers become accuracies."""
        names = {name: name.replace("correct", "accuracy") for name in self.sums}
        return {names[name]: value / self.counts[name] for name, value in self.sums.items()}

    def elapsed(self) -> float:
        """Return the seconds since it began, without those between an interruption and going on."""
        return self.seconds + time.perf_counter() - self.started

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the arguments that make the same interval again."""
        values = asdict(self) | {"seconds": self.elapsed()}
        del values["started"]
        return values


@dataclass
class TrainingState:
    """One rank's nets and everything else that a checkpoint must have to go on as if never
    interrupted. Order, crops and mask samples are functions of the seed and the step, so the
    step is the loader's position too. pending: steps whose numbers the host has not read.
    interval, epoch: what it has read since the last line of the log, and in this epoch."""

    corruption: CorruptionNet
    corruption_average: CorruptionNet
    classifier: Classifier
    clean_classifier: Classifier
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    step: int = 0
    clean_accuracy: float = 0.0
    target: float = 0.0
    controller: ControllerState | None = None
    collapse: CollapseState = field(default_factory=CollapseState)
    pending: deque[Pending] = field(default_factory=deque)
    interval: Interval = field(default_factory=Interval)
    epoch: Interval = field(default_factory=Interval)

    def nets(self) -> dict[str, nn.Module]:
        """Return the nets by name."""
        return {
            "corruption": self.corruption,
            "corruption_average": self.corruption_average,
            "classifier": self.classifier,
            "clean_classifier": self.clean_classifier,
        }


def new_state(config: TrainConfig, model: ModelConfig, device: torch.device) -> TrainingState:
    """Return the state before the first step: the same weights on every rank, from the seed."""
    settings = config.optimization
    torch.manual_seed(settings.seed)
    corruption, classifier = new_corruption(model).to(device), new_classifier(model).to(device)
    for net in (corruption, classifier):
        convert_conv2d_weight_memory_format(net, memory_layout(device))
    state = TrainingState(
        corruption=corruption,
        corruption_average=copy.deepcopy(corruption).requires_grad_(False),
        classifier=classifier,
        clean_classifier=copy.deepcopy(classifier).requires_grad_(False),
    )
    fused = device.type == "cuda"  # one kernel each
    state.optimizers["warmup"] = torch.optim.AdamW(
        classifier.parameters(),
        settings.warmup_rate,
        weight_decay=WARMUP_WEIGHT_DECAY,
        fused=fused,
    )
    for name, net, rate in (
        ("corruption", corruption, settings.corruption_rate),
        ("classifier", classifier, settings.classifier_rate),
    ):
        state.optimizers[name] = torch.optim.Adam(
            trainable(net), rate, ADVERSARIAL_BETAS, fused=fused
        )
    return state


def finished_nets(state: TrainingState, model: ModelConfig) -> Nets:
    """Return the nets to evaluate with."""
    return Nets(
        config=model,
        corruption=state.corruption_average,
        classifier=state.classifier,
        clean_classifier=state.clean_classifier,
    )


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Return the nets' weights and the optimizers' moments, OPTIMIZER.PARAMETER.MOMENT."""
    moments = {
        f"{name}.{number}.{key}": tensor
        for name, optimizer in _optimizers(state).items()
        for number, values in optimizer.state_dict()["state"].items()
        for key, tensor in values.items()
    }
    return net_tensors(state.nets()) | moments


def _optimizers(state: TrainingState) -> dict[str, torch.optim.Optimizer]:
    return {f"optimizer_{name}": optimizer for name, optimizer in state.optimizers.items()}


def state_numbers(state: TrainingState) -> dict[str, Any]:
    """Return everything else, for JSON; floats are read back to the same bits."""
    return {
        "step": state.step,
        "clean_accuracy": state.clean_accuracy,
        "target": state.target,
        "controller": asdict(state.controller) if state.controller else None,
        "collapse": asdict(state.collapse),
        "pending": [pending.saved() for pending in state.pending],
        "interval": state.interval.saved(),
        "epoch": state.epoch.saved(),
    }


def fill_state(
    state: TrainingState, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Fill a new state, in place, from what `state_tensors` and `state_numbers` gave."""
    load_net_tensors(state.nets(), tensors)
    for name, optimizer in _optimizers(state).items():
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = optimizer.param_groups[0]["params"]
        for key, tensor in tensors.items():
            if key.startswith(f"{name}."):
                _, number, moment = key.split(".")
                like = parameters[int(number)]
                if tensor.ndim:  # moments lie in memory as their weights do
                    tensor = torch.empty_like(like, device="cpu").copy_(tensor)
                moments.setdefault(int(number), {})[moment] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    controller = numbers["controller"]
    state.step = numbers["step"]
    state.clean_accuracy = numbers["clean_accuracy"]
    state.target = numbers["target"]
    state.controller = ControllerState(**controller) if controller else None
    state.collapse = CollapseState(**numbers["collapse"])
    state.pending = deque(restored(saved) for saved in numbers["pending"])
    state.interval = Interval(**numbers["interval"])
    state.epoch = Interval(**numbers["epoch"])


def warmup_factor(step: int, steps: int) -> float:
    """Return the share of the peak rate at `step` of the warm-up: up linearly, down as a cosine."""
    ramp = max(1, round(steps * WARMUP_RAMP_SHARE))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def adversarial_factor(step: int, steps: int) -> float:
    """Return the share of the rates at `step` of the adversarial phase: up, level, down to 0."""
    rise = min(1.0, (step + 1) / RAMP_STEPS)
    fall = min(1.0, (steps - step) / (DECAY_SHARE * steps))
    return rise * fall


def apply_gradients(
    net: nn.Module, optimizer: torch.optim.Optimizer, gradients: Gradients | None, rate: float
) -> None:
    """Take one optimizer step with the given, already reduced gradients, or none without them."""
    if gradients is None:
        return
    for parameter, gradient in zip(trainable(net), gradients, strict=True):
        if gradient.is_cuda:  # the one kernel for all wants gradients laid out as their weights
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
