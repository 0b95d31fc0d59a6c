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

from jobs.networks import Network, load_network
from jobs.runs import ModelConfig, Nets, load_net_tensors, net_tensors, new_nets
from jobs.shipped import shipped_decoder
from jobs.train.config import TrainConfig
from jobs.train.graphs import memory_layout
from model.collapse import CollapseState
from model.controller import ControllerState
from model.corruption import CorruptionNet
from model.decoder import FeatureCorruptionNet
from model.pretrained import PretrainedClassifier
from model.saliency import AnyClassifier
from model.step import Gradients, trainable
from pipeline.shards.format import Manifest

if TYPE_CHECKING:  # the driver imports no DALI
    from pipeline.loading.loader import Batch

RAMP_STEPS = 50  # of the learning rates at the start of the adversarial phase
DECAY_SHARE = 0.3  # of the adversarial phase, at its end, in which they fall to 0
WARMUP_RAMP_SHARE = 0.1  # of the warm-up, in which the rate rises
WARMUP_WEIGHT_DECAY = 0.05
ASKS = "asks"  # among a step's sums: the ranks that ask for a checkpoint
ADVERSARIAL_BETAS = (0.5, 0.999)


class TrainingError(Exception):
    """Training that cannot go on; the message names the cause and a remedy."""


@dataclass(frozen=True)
class Pending:
    """A step's reduced sums on their way to the host. step: its number, from 1. total: images in
    it, over all ranks. batch: kept, since its GPU memory is reused once nothing refers to it."""

    step: int
    total: int
    joint: bool
    names: tuple[str, ...]
    values: Tensor
    ready: torch.cuda.Event | None = None
    batch: "Batch | None" = None

    def read(self) -> dict[str, float]:
        """Wait for the sums, and return them by name."""
        if self.ready is not None:
            self.ready.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        sums = {name: value for name, value in self.read().items() if name != ASKS}
        return {"step": self.step, "total": self.total, "joint": self.joint, "sums": sums}


def send(step: int, batch: "Batch", sums: Mapping[str, Tensor], joint: bool) -> Pending:
    """Start a step's sums on their way to the host; on a GPU nothing waits for them."""
    names = tuple(sorted(sums))
    values = torch.stack([sums[name] for name in names])
    ready = None
    if values.is_cuda:
        values = values.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
    return Pending(step, batch.total, joint, names, values, ready, batch)


@dataclass(kw_only=True)
class Interval:
    """Sums over the steps of an interval, and `counts` of the images in each sum. seconds: of time
    before an interruption; waiting, first_batch: in seconds, too."""

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
        return {
            name.replace("correct", "accuracy"): value / self.counts[name]
            for name, value in self.sums.items()
        }

    def elapsed(self) -> float:
        """Return its seconds, without those between an interruption and going on."""
        return self.seconds + time.perf_counter() - self.started

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the arguments that make the same interval again."""
        values = asdict(self) | {"seconds": self.elapsed()}
        return {name: value for name, value in values.items() if name != "started"}


@dataclass
class TrainingState:
    """One rank's nets and everything else that a checkpoint must have to go on as if never
    interrupted: order, crops and mask samples are functions of the seed and the step. pending:
    steps whose numbers the host has not read. interval, epoch: what it has read since the last
    line of the log, and in this epoch."""

    corruption: CorruptionNet | FeatureCorruptionNet
    corruption_average: CorruptionNet | FeatureCorruptionNet
    classifier: AnyClassifier
    clean_classifier: AnyClassifier
    optimizers: dict[str, torch.optim.Optimizer]
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
        return {name: net for name, net in vars(self).items() if isinstance(net, nn.Module)}


def pretrained_network(config: TrainConfig, manifest: Manifest) -> Network | None:
    """Return the network that the nets are over, with its weights. Raises UserError."""
    nets = config.nets
    if nets.network is None:
        return None
    return load_network(
        nets.network,
        manifest.classes,
        manifest.class_names,
        weights=config.optimization.network_weights,
        size=nets.sides[-1],
    )


def new_state(
    config: TrainConfig, model: ModelConfig, device: torch.device, network: Network | None = None
) -> TrainingState:
    """Return the state before the first step: the same weights on every rank, from the seed.

    network: with its weights, where the nets are over one. Its new head, if it has one, is all of
    it that the warm-up trains.
    """
    settings = config.optimization
    torch.manual_seed(settings.seed)
    nets = new_nets(model, None if network is None else network.classifier)
    if settings.start_from and isinstance(nets.corruption, FeatureCorruptionNet):
        decoder = nets.corruption.decoder
        decoder.load_state_dict(shipped_decoder(model.network, model.decoder_width))
    for net in nets.modules().values():
        convert_conv2d_weight_memory_format(net.to(device), memory_layout(device))
    fused = device.type == "cuda"  # one kernel each
    corruption, classifier = nets.corruption, nets.classifier
    nets.clean_classifier.requires_grad_(False)
    adversarial = {
        name: torch.optim.Adam(_weights(net), rate, ADVERSARIAL_BETAS, fused=fused)
        for name, net, rate in (
            ("corruption", corruption, settings.corruption_rate),
            ("classifier", classifier, settings.classifier_rate),
        )
    }
    if network is not None and isinstance(classifier, PretrainedClassifier):
        classifier.train_only("head" if network.new_classes else "none")
    warmup = torch.optim.AdamW(
        _weights(classifier), settings.warmup_rate, weight_decay=WARMUP_WEIGHT_DECAY, fused=fused
    )
    return TrainingState(
        corruption=corruption,
        corruption_average=copy.deepcopy(corruption).requires_grad_(False),
        classifier=classifier,
        clean_classifier=nets.clean_classifier,
        optimizers={"warmup": warmup, **adversarial},
    )


def _weights(net: nn.Module) -> list[Tensor]:
    return [*trainable(net)] or [torch.zeros(0)]  # an optimizer wants at least one


def finished_nets(state: TrainingState, model: ModelConfig) -> Nets:
    """Return the nets to evaluate with."""
    return Nets(model, state.corruption_average, state.classifier, state.clean_classifier)


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Return the nets' weights and optimizers' moments, optimizer_NAME.PARAMETER.MOMENT."""
    moments = {
        f"optimizer_{name}.{number}.{key}": tensor
        for name, optimizer in state.optimizers.items()
        for number, values in optimizer.state_dict()["state"].items()
        for key, tensor in values.items()
    }
    return net_tensors(state.nets()) | moments


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
    for name, optimizer in state.optimizers.items():
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = optimizer.param_groups[0]["params"]
        for key, tensor in tensors.items():
            if key.startswith(f"optimizer_{name}."):
                _, number, moment = key.split(".")
                if tensor.ndim:  # moments lie in memory as their weights do
                    weight = parameters[int(number)]
                    tensor = torch.empty_like(weight, device="cpu").copy_(tensor)
                moments.setdefault(int(number), {})[moment] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    controller = numbers["controller"]
    state.step = numbers["step"]
    state.clean_accuracy = numbers["clean_accuracy"]
    state.target = numbers["target"]
    state.controller = ControllerState(**controller) if controller else None
    state.collapse = CollapseState(**numbers["collapse"])
    for saved in numbers["pending"]:
        values = torch.tensor(list(saved["sums"].values()), dtype=torch.float64)
        own = (saved["step"], saved["total"], saved["joint"], tuple(saved["sums"]))
        state.pending.append(Pending(*own, values))
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
    return min(1.0, (step + 1) / RAMP_STEPS) * min(1.0, (steps - step) / (DECAY_SHARE * steps))


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
