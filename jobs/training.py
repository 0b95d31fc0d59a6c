"""The training loop that every Ray Train worker runs, and its collectives.

Each net's gradients are sums over the rank's images divided by the global number of images, so
one sum over the ranks is the whole synchronization: gradients, losses and the accuracy that
drives the controller travel in one vector per step. The controller reads a step's numbers
`LAG` steps later, so the host never waits for the step that is running.
"""

import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.models import ModelConfig, colour_statistics, save_nets
from jobs.training_log import TrainingLog
from jobs.training_state import (
    FAILURE_NAME,
    TrainConfig,
    TrainingError,
    adversarial_factor,
    finished_nets,
    new_state,
    restore_state,
    save_state,
    set_rate,
    warmup_factor,
)
from model.adversarial import Step, adversarial_step, clean_step, normalize
from model.controller import ControllerConfig, ControllerState, relative_target, update
from model.masking import gumbel_difference
from pipeline.loader import Batch, train_batches
from pipeline.order import Position, steps_per_epoch
from pipeline.shards import Card, read_card, split_of, write_atomically

LAG = 2
NOT_FINITE_REMEDY = (
    "training stopped. The last checkpoint is sound: lower the learning rates "
    "(--corruption-rate, --classifier-rate, --warmup-rate) and use a new --output"
)
ADVERSARIAL_COST = 5  # an adversarial step over a warm-up step, until it is measured


def reduce_step(step: Step) -> Step:
    """Add up a step's gradients and sums over all ranks; every rank gets the same bits."""
    gradients = [*(step.corruption_gradients or ()), *(step.classifier_gradients or ())]
    tensors = [*gradients, *(step.sums[name] for name in sorted(step.sums))]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    reduced = [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
    cut = len(step.corruption_gradients or ())
    return Step(
        corruption_gradients=tuple(reduced[:cut]) if step.corruption_gradients else None,
        classifier_gradients=(
            tuple(reduced[cut : len(gradients)]) if step.classifier_gradients else None
        ),
        sums=dict(zip(sorted(step.sums), reduced[len(gradients) :], strict=True)),
    )


def apply_gradients(
    net: nn.Module, optimizer: torch.optim.Optimizer, gradients: tuple[Tensor, ...], rate: float
) -> None:
    """One optimizer step with the given, already reduced gradients."""
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient
    set_rate(optimizer, rate)
    optimizer.step()


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A step's reduced sums on their way to the host."""

    step: int  # how many steps had been made with it
    batch: Batch  # whose GPU memory DALI reuses once nothing refers to it
    names: list[str]
    values: Tensor
    ready: torch.cuda.Event | None
    joint: bool

    def read(self) -> dict[str, float]:
        if self.ready is not None:
            self.ready.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def _send(step: int, batch: Batch, sums: dict[str, Tensor], joint: bool) -> _Pending:
    names = sorted(sums)
    values = torch.stack([sums[name] for name in names])
    ready = None
    if values.is_cuda:
        values = values.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
    return _Pending(step=step, batch=batch, names=names, values=values, ready=ready, joint=joint)


class Interval:
    """Sums, images and seconds since the last line of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.images = self.steps = self.joint_steps = 0
        self.waiting = self.first_batch = 0.0
        self.started = time.perf_counter()

    def add(self, sums: dict[str, float], total: int, joint: bool) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.images += total
        self.steps += 1
        self.joint_steps += joint

    def means(self) -> dict[str, float]:
        values = {name: value / max(1, self.images) for name, value in self.sums.items()}
        values["accuracy"] = values.pop("correct", 0.0)
        return values


class Trainer:
    """One rank's training: the state, the schedule, and what the host has read so far."""

    def __init__(
        self, config: TrainConfig, model: ModelConfig, card: Card, device: torch.device, ranks: int
    ) -> None:
        self.config, self.model, self.device = config, model, device
        samples = split_of(card, "train").images
        self.epoch_steps = steps_per_epoch(samples, config.batch_size, ranks)
        self.warmup_steps = config.warmup_epochs * self.epoch_steps
        self.steps = self.warmup_steps + config.epochs * self.epoch_steps
        self.state = new_state(config, model, device)
        self.pending: deque[_Pending] = deque()
        self.interval = Interval()
        self.epoch = Interval()
        self.loading = False  # whether the loader has given its first batch
        self.log: TrainingLog | None = None
        self.noise = torch.Generator(device)
        self.colours = colour_statistics(model, device)

    @property
    def position(self) -> Position:
        epoch, step = divmod(self.state.step, self.epoch_steps)
        return Position(epoch=epoch, step=step)

    @property
    def warming_up(self) -> bool:
        return self.state.step < self.warmup_steps

    def train_epoch(self, batches: Iterator[Batch]) -> None:
        """All steps up to the next epoch; afterwards nothing is pending."""
        self.epoch = Interval()
        if self.interval.steps == 0:
            self.interval = Interval()  # the barrier between epochs is not training time
        for _ in range(self.epoch_steps):
            start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - start
            self.interval.waiting += waited
            if not self.loading:
                self.loading, self.interval.first_batch = True, waited
            if self.warming_up:
                self._warmup_step(batch)
            else:
                self._adversarial_step(batch)
            self.state.step += 1
            while len(self.pending) > LAG - 1:
                self._read()
        while self.pending:
            self._read()
        if self.state.step == self.warmup_steps:
            self._finish_warmup()

    def _inputs(self, batch: Batch) -> Tensor:
        images = normalize(batch.images, *self.colours)
        return images.contiguous(memory_format=torch.channels_last)

    def _warmup_step(self, batch: Batch) -> None:
        state, config = self.state, self.config
        step = reduce_step(
            clean_step(state.classifier, self._inputs(batch), batch.labels, batch.total)
        )
        assert step.classifier_gradients is not None
        rate = config.warmup_rate * warmup_factor(state.step, self.warmup_steps)
        optimizer = state.optimizers["warmup"]
        apply_gradients(state.classifier, optimizer, step.classifier_gradients, rate)
        self.pending.append(_send(state.step + 1, batch, step.sums, joint=False))

    def _finish_warmup(self) -> None:
        """Keep the clean classifier; set the target from its accuracy in its last epoch."""
        state, config = self.state, self.config
        state.clean_classifier.load_state_dict(state.classifier.state_dict())
        state.clean_accuracy = self.epoch.means()["accuracy"]
        chance = 1 / len(self.model.classes)
        relative = relative_target(chance, state.clean_accuracy, config.target_share)
        state.target = config.target if config.target is not None else relative

    def _mask_noise(self, batch: Batch) -> Tensor:
        """This rank's part of the global batch's noise, the same for any number of ranks."""
        self.noise.manual_seed(self.config.seed * 1_000_003 + self.state.step)
        noise = gumbel_difference((batch.total, self.model.superpixels), self.noise)
        return noise[batch.offset : batch.offset + len(batch.labels)]

    def _gradients(self, batch: Batch, *, joint: bool, area_weight: float) -> Step:
        step = adversarial_step(
            self.state.corruption,
            self.state.classifier,
            self._inputs(batch),
            batch.segments,
            batch.labels,
            self._mask_noise(batch),
            total=batch.total,
            joint=joint,
            area_weight=area_weight,
            area_power=self.config.area_power,
            clean_weight=self.config.clean_weight,
        )
        return reduce_step(step)

    def _first_controller(self, batch: Batch) -> ControllerState:
        """lambda in proportion to the first corruption loss, which depends on the classifier."""
        sums = self._gradients(batch, joint=False, area_weight=0.0).sums
        loss, accuracy = (
            float(sums[name]) / batch.total for name in ("corruption_loss", "correct")
        )
        if not loss > 0:
            raise TrainingError(
                f"the first corruption loss is {loss}: the warmed-up classifier scores all "
                "classes alike or not at all; look at the warm-up's loss in the log, and lower "
                "--warmup-rate or raise --warmup-epochs"
            )
        return ControllerState(area_weight=self.config.area_start * loss, accuracy=accuracy)

    def _adversarial_step(self, batch: Batch) -> None:
        state, config = self.state, self.config
        if state.controller is None:
            state.controller = self._first_controller(batch)
        joint = state.controller.joint
        step = self._gradients(batch, joint=joint, area_weight=state.controller.area_weight)
        factor = adversarial_factor(state.step - self.warmup_steps, self.steps - self.warmup_steps)
        assert step.corruption_gradients is not None
        apply_gradients(
            state.corruption,
            state.optimizers["corruption"],
            step.corruption_gradients,
            config.corruption_rate * factor,
        )
        if step.classifier_gradients is not None:
            apply_gradients(
                state.classifier,
                state.optimizers["classifier"],
                step.classifier_gradients,
                config.classifier_rate * factor,
            )
        with torch.no_grad():
            pairs = zip(
                state.corruption_average.parameters(), state.corruption.parameters(), strict=True
            )
            for average, parameter in pairs:
                average.lerp_(parameter, 1 - config.averaging)
        self.pending.append(_send(state.step + 1, batch, step.sums, joint))

    def _read(self) -> None:
        """Take in the oldest pending step's numbers: the controller, the log, the NaN check.

        All ranks hold the same reduced numbers, so all raise, or none.
        """
        pending = self.pending.popleft()
        sums = pending.read()
        bad = [name for name, value in sums.items() if not abs(value) < float("inf")]
        if bad:
            raise TrainingError(
                f"{', '.join(bad)} became NaN or infinite at step {pending.step}; "
                f"{NOT_FINITE_REMEDY}"
            )
        if self.state.controller is not None:
            controller = ControllerConfig(
                target=self.state.target, rate=self.config.controller_rate
            )
            self.state.controller = update(
                self.state.controller, controller, sums["correct"], pending.batch.total
            )
        self.interval.add(sums, pending.batch.total, pending.joint)
        self.epoch.add(sums, pending.batch.total, pending.joint)
        borders = (self.warmup_steps, self.steps)  # an interval holds steps of one phase
        if pending.step % self.config.log_interval == 0 or pending.step in borders:
            self._write_interval(pending.step)

    def check_weights(self) -> None:
        """Raise TrainingError where a weight is NaN or infinite, which the next step's losses
        would show, but a checkpoint must not hold. All ranks have the same weights."""
        for name, net in self.state.nets().items():
            sound = torch.stack([p.isfinite().all() for p in net.parameters()]).all()
            if not sound:
                raise TrainingError(
                    f"weights of {name} became NaN or infinite by step {self.state.step}; "
                    f"{NOT_FINITE_REMEDY}"
                )

    def _eta(self, seconds_per_step: float) -> float:
        warmup_left = max(0, self.warmup_steps - self.state.step)
        adversarial_left = self.steps - max(self.state.step, self.warmup_steps)
        cost = ADVERSARIAL_COST if warmup_left else 1
        return seconds_per_step * (warmup_left + cost * adversarial_left)

    def _write_interval(self, step: int) -> None:
        interval, state = self.interval, self.state
        self.interval = Interval()
        if self.log is None:
            return
        seconds = time.perf_counter() - interval.started
        values: dict[str, Any] = {
            "step": step,
            "steps": self.steps,
            "epoch": (step - 1) // self.epoch_steps,
            "phase": "warmup" if step <= self.warmup_steps else "adversarial",
            **interval.means(),
            "images_per_second": interval.images / seconds,
            "seconds": seconds,
            "waiting": interval.waiting / seconds,
            "first_batch_seconds": interval.first_batch,
            "eta_seconds": self._eta(seconds / interval.steps),
        }
        if state.controller is not None:
            values |= {
                "target": state.target,
                "area_weight": state.controller.area_weight,
                "joint_share": interval.joint_steps / interval.steps,
            }
        self.log.write(values)


def model_config(config: TrainConfig, card: Card) -> ModelConfig:
    """The nets' shape for a data set."""
    superpixels = card.configuration["superpixels"]
    return ModelConfig(
        classes=card.classes,
        class_names=card.class_names,
        height=card.height,
        width=card.width,
        net_width=config.net_width,
        bottleneck=config.bottleneck,
        mean=card.mean,
        std=card.std,
        superpixels=max(card.max_superpixels, superpixels),
        compactness=card.configuration["compactness"],
    )


def _report(trainer: Trainer, rank: int) -> None:
    """Ray Train's barrier at the end of an epoch; rank 0 hands in the checkpoint."""
    metrics = {"epoch": trainer.position.epoch, "step": trainer.state.step}
    if rank:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder), trainer.state)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def train_worker(settings: dict[str, Any]) -> None:
    """Ray Train's worker function. settings: "config" (TrainConfig), "record" (see jobs.cli).

    A TrainingError, which all ranks meet at the same step, ends the run without another attempt:
    its message is left in RUN/failure.txt. Anything else is a failure to recover from.
    """
    config: TrainConfig = settings["config"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    try:
        _train(config, settings["record"], rank, context.get_world_size())
    except TrainingError as error:
        if rank == 0:
            write_atomically(config.output / FAILURE_NAME, str(error).encode())


def _train(config: TrainConfig, record: dict[str, Any], rank: int, ranks: int) -> None:
    device = ray.train.torch.get_device()
    card = read_card(config.data)
    model = model_config(config, card)
    trainer = Trainer(config, model, card, device, ranks)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            restore_state(Path(folder), trainer.state)
    if rank == 0:
        trainer.log = TrainingLog(config.output, trainer.state.step)
    batches = train_batches(
        config.data,
        card,
        batch_size=config.batch_size,
        rank=rank,
        ranks=ranks,
        seed=config.seed,
        start=trainer.position,
        augmentation=config.augmentation(),
        device=device,
        window=config.window(card),
        cache_folder=config.cache_folder(),
        cache_bytes=config.cache_bytes(),
    )
    while trainer.state.step < trainer.steps:
        trainer.train_epoch(batches)
        trainer.check_weights()
        _report(trainer, rank)
    if trainer.log is not None:
        trainer.log.close()
        save_nets(config.output, finished_nets(trainer.state, model), record)
