"""One rank's training: the steps, the balance of the nets, and what the log says of them."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from jobs.networks import Network
from jobs.runs import ModelConfig, colour_statistics, load_net_tensors
from jobs.train.checkpoints import read_warmup
from jobs.train.collectives import reduce_step
from jobs.train.config import REMEDIES, TrainConfig
from jobs.train.graphs import Recordings, StepSettings, autocast, compute_step, net_inputs
from jobs.train.log import TrainingLog
from jobs.train.state import (
    ASKS,
    Interval,
    TrainingError,
    adversarial_factor,
    apply_gradients,
    new_state,
    pretrained_network,
    send,
    warmup_factor,
)
from model.collapse import TEXTS, CollapseState, watch
from model.controller import ControllerState, relative_target, update
from model.corruption import CorruptionNet
from model.masking import gumbel_difference, pixel_segments
from model.pretrained import PretrainedClassifier
from model.step import Inputs, Step, TrainingNets, first_sums
from pipeline.loading.loader import Batch
from pipeline.loading.order import Position, steps_per_epoch
from pipeline.shards.format import Manifest, split_of

LAG = 2  # steps after which the controller reads numbers: the host waits for no running step
NOT_FINITE_REMEDY = (
    "training stopped. Lower the learning rates "
    "(--corruption-rate, --classifier-rate, --warmup-rate) and use a new --output"
)
ADVERSARIAL_COST = 5  # an adversarial step over a warm-up step, until it is measured
WARNING_SHARE = 0.2  # of --collapse-steps, after which the log says what stops the run in the end


def model_config(
    config: TrainConfig, manifest: Manifest, network: Network | None = None
) -> ModelConfig:
    """Return the nets' shape for a data set, and how images are normalized: as the network's were
    in its training."""
    superpixels = manifest.configuration["superpixels"]
    colours = manifest if network is None else network
    return ModelConfig(
        classes=manifest.classes,
        class_names=manifest.class_names,
        height=manifest.height,
        width=manifest.width,
        mean=colours.mean,
        std=colours.std,
        superpixels=max(manifest.max_superpixels, superpixels),
        compactness=manifest.configuration["compactness"],
        **asdict(config.nets) | {"rule": config.nets.rule or "paper"},
    )


class Trainer:
    def __init__(
        self, config: TrainConfig, manifest: Manifest, device: torch.device, ranks: int
    ) -> None:
        self.config, self.device, self.ranks = config, device, ranks
        network = pretrained_network(config, manifest)
        self.model = model_config(config, manifest, network)
        settings = config.optimization
        images = split_of(manifest, "train").images
        self.epoch_steps = steps_per_epoch(images, settings.batch_size, ranks)
        warmup_epochs = 0 if settings.warmup_from else settings.warmup_epochs
        self.warmup_steps = warmup_epochs * self.epoch_steps
        self.steps = self.warmup_steps + settings.epochs * self.epoch_steps
        self.objective = config.objective.objective()
        self.state = new_state(config, self.model, device, network)
        nets = (self.state.corruption, self.state.classifier, self.state.clean_classifier)
        self.nets = TrainingNets(*nets)
        self.colours = colour_statistics(self.model, device)
        self.half = settings.precision == "bfloat16"
        compute = partial(compute_step, self.nets, self.colours)
        graphs = config.resources.graphs and device.type == "cuda"
        self.compute = Recordings(compute).compute if graphs else compute
        # A function and not an AveragedModel, whose count of updates a GPU would have to be asked.
        self.average = get_ema_multi_avg_fn(settings.averaging)
        self.noise = torch.Generator(device)
        self.loading = False  # whether the loader has given its first batch
        self.log: TrainingLog | None = None
        self.due: Callable[[], bool] = lambda: False  # whether this rank asks for a checkpoint
        # Whether a rank did, which all learn at the same step; and the last step that was kept.
        self.asked, self.kept = False, self.state.step
        self.reads_at_once = device.type == "cpu"  # on a GPU the host would wait for the step

    @property
    def position(self) -> Position:
        """Where the loader goes on."""
        epoch, step = divmod(self.state.step, self.epoch_steps)
        return Position(epoch=epoch, step=step)

    @property
    def warming_up(self) -> bool:
        """Whether the next step trains the classifier alone."""
        return self.state.step < self.warmup_steps

    @property
    def read_step(self) -> int:
        """The last step whose numbers the host has read."""
        return self.state.pending[0].step - 1 if self.state.pending else self.state.step

    @property
    def at_checkpoint(self) -> bool:
        """Whether the state is to be kept: every so many steps, at the end of an epoch, and where a
        rank asked for it."""
        intervals = (self.config.logging.checkpoint_interval, self.epoch_steps)
        return self.asked or any(self.state.step % interval == 0 for interval in intervals)

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Take the next step. At the end of an epoch nothing is pending."""
        state = self.state
        if state.step % self.epoch_steps == 0:
            state.epoch = Interval()
        batch = self._next_batch(batches)
        if self.warming_up:
            self.warmup_step(batch)
        else:
            self.adversarial_step(batch)
        state.step += 1
        if self.reads_at_once:
            self.asked |= state.pending[-1].read()[ASKS] > 0
        lag = 0 if state.step % self.epoch_steps == 0 else LAG - 1
        while len(state.pending) > lag:
            self._read()
        if state.step == self.warmup_steps:
            state.clean_classifier.load_state_dict(state.classifier.state_dict())
            state.collapse = CollapseState()
            self._begin_adversarial(state.epoch.means()["accuracy"])

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        state = self.state
        if state.interval.steps == 0 and not state.pending:
            state.interval = Interval()  # what lay between is not training time
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        state.interval.waiting += waited
        if not self.loading:
            self.loading, state.interval.first_batch = True, waited
        return batch

    def warmup_step(self, batch: Batch) -> None:
        """Train the classifier alone, on clean images; of a pretrained network its new head, and
        the corruption net by imitation. On a GPU nothing here waits for it."""
        state, config = self.state, self.config.optimization
        over_network = self.model.network is not None
        tensors = self.adversarial_tensors(batch) if over_network else (batch.images, batch.labels)
        settings = StepSettings(
            total=batch.total, half=self.half, objective=self.objective if over_network else None
        )
        step = self._reduce(self.compute(settings, tensors))
        factor = warmup_factor(state.step, self.warmup_steps)
        gradients, optimizer = step.classifier_gradients, state.optimizers["warmup"]
        apply_gradients(state.classifier, optimizer, gradients, config.warmup_rate * factor)
        gradients, optimizer = step.corruption_gradients, state.optimizers["corruption"]
        apply_gradients(state.corruption, optimizer, gradients, config.corruption_rate * factor)
        if over_network:
            self._average()
        state.pending.append(send(state.step + 1, batch, step.sums, joint=False))

    def adversarial_step(self, batch: Batch) -> None:
        """Train both nets, or the corruption net alone. On a GPU nothing here waits for it, but in
        the run's first such step, which reads the corruption loss without masks."""
        state, config = self.state, self.config.optimization
        tensors = self.adversarial_tensors(batch)
        if state.controller is None:
            state.controller = self._first_controller(tensors, batch.total)
        settings = StepSettings(
            total=batch.total,
            half=self.half,
            objective=self.objective,
            joint=state.controller.joint and self.model.co_trained != "none",
            probing=(state.step + 1) % self.config.logging.log_interval == 0,
        )
        area_weight = torch.full((), state.controller.area_weight, device=self.device)
        step = self._reduce(self.compute(settings, (*tensors, area_weight)))
        factor = adversarial_factor(state.step - self.warmup_steps, self.steps - self.warmup_steps)
        for net, name, gradients, rate in (
            (state.corruption, "corruption", step.corruption_gradients, config.corruption_rate),
            (state.classifier, "classifier", step.classifier_gradients, config.classifier_rate),
        ):
            apply_gradients(net, state.optimizers[name], gradients, rate * factor)
        self._average()
        state.pending.append(send(state.step + 1, batch, step.sums, settings.joint))

    def _reduce(self, step: Step) -> Step:
        """Add a step up over the ranks, with the number of those that ask for a checkpoint."""
        asks = torch.full((), float(self.due()), device=self.device)
        return reduce_step(replace(step, sums=step.sums | {ASKS: asks}), self.ranks)

    def _average(self) -> None:
        average = list(self.state.corruption_average.parameters())
        self.average(average, list(self.state.corruption.parameters()), None)

    def adversarial_tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return images, labels, what is masked as one, int64 [B, H, W], and this rank's part of
        the global batch's noise, which is the same for any number of ranks."""
        segments, superpixels = batch.segments, self.model.superpixels
        if not self.config.objective.superpixel_masks:
            segments, superpixels = pixel_segments(segments), self.model.height * self.model.width
        # torch's generator has one integer as its seed, unlike numpy's in order and augmentation
        self.noise.manual_seed(self.config.optimization.seed * 1_000_003 + self.state.step)
        noise = gumbel_difference((batch.total, superpixels), self.noise)
        own = noise[batch.offset : batch.offset + len(batch.labels)]
        return batch.images, batch.labels, segments, own

    def _first_controller(
        self, tensors: tuple[Tensor, Tensor, Tensor, Tensor], total: int
    ) -> ControllerState:
        """Return lambda in proportion to the corruption loss on the first batch without masks, that
        is, to the classifier's logits. (In proportion to that under the first random masks, masks
        ran off over everything.)"""
        images, labels, segments, noise = tensors
        with autocast(self.device, self.half):
            x = net_inputs(images, self.colours)
            batch = Inputs(x, segments, labels, noise, total)
            local = first_sums(self.nets, batch, self.objective)
        sums = reduce_step(Step(sums=local), self.ranks).sums
        loss, accuracy = float(sums["confusion"]) / total, float(sums["correct"]) / total
        if not loss > 0:
            raise TrainingError(
                f"the corruption loss without masks is {loss}: the warmed-up classifier scores all "
                "classes alike; look at the warm-up's loss in the log, and lower --warmup-rate or "
                "raise --warmup-epochs"
            )
        area_weight = self.config.balance.area_start * loss
        least = self.config.balance.area_least * area_weight
        return ControllerState(area_weight=area_weight, least=least, accuracy=accuracy)

    def take_warmup(self, run: str | Path) -> None:
        """Begin with the clean classifier of another run on the same set. Raises TrainingError
        where that run has none yet."""
        checkpoint = read_warmup(run)
        for net in (self.state.classifier, self.state.clean_classifier):
            load_net_tensors({"clean_classifier": net}, checkpoint.tensors)
        self._begin_adversarial(checkpoint.numbers["clean_accuracy"])

    def choose_trained(self) -> None:
        """Let those weights of a pretrained network train that do after the warm-up, once that is
        over."""
        if isinstance(self.state.classifier, PretrainedClassifier) and not self.warming_up:
            self.state.classifier.train_only(self.model.co_trained)

    def _begin_adversarial(self, clean_accuracy: float) -> None:
        """Set the target, and make the clean classifier the corruption nets' guide, if any."""
        state, balance = self.state, self.config.balance
        self.choose_trained()
        for net in (state.corruption, state.corruption_average):
            if isinstance(net, CorruptionNet) and net.guide is not None:
                net.guide.load_state_dict(state.clean_classifier.state_dict())
        state.clean_accuracy = clean_accuracy
        chance = 1 / len(self.model.classes)
        relative = relative_target(chance, clean_accuracy, balance.target_share)
        state.target = balance.target or relative

    def _read(self) -> None:
        """Take in the oldest pending step's numbers, which are the same on all ranks, so that all
        raise, or none."""
        state = self.state
        pending = state.pending.popleft()
        sums = pending.read()
        self.asked |= sums.pop(ASKS, 0) > 0 and pending.step > self.kept
        bad = ", ".join(name for name, value in sums.items() if not math.isfinite(value))
        if bad:
            raise TrainingError(
                f"{bad} became NaN or infinite at step {pending.step}; {NOT_FINITE_REMEDY}"
            )
        if state.controller is not None:
            state.controller = update(
                state.controller,
                sums["correct"],
                pending.total,
                target=state.target,
                rate=self.config.balance.controller_rate,
            )
        self._watch(pending.step, sums, pending.total, pending.joint)
        state.interval.add(sums, pending.total, pending.joint)
        state.epoch.add(sums, pending.total, pending.joint)
        borders = (self.warmup_steps, self.steps)  # an interval has steps of one phase
        if pending.step % self.config.logging.log_interval == 0 or pending.step in borders:
            self._write_interval(pending.step)

    def _watch(self, step: int, sums: dict[str, float], total: int, joint: bool) -> None:
        state, config = self.state, self.config.logging
        adversarial = "area" in sums
        state.collapse = watch(
            state.collapse,
            accuracy=sums["correct"] / total,
            count=total,
            classes=len(self.model.classes),
            target=state.target if adversarial else None,
            area=sums["area"] / total if adversarial else None,
            joint=joint if adversarial and self.model.co_trained != "none" else None,
        )
        signs = state.collapse.signs(config.collapse_steps)
        if signs and config.stop_on_collapse:
            raise TrainingError(
                f"{'; '.join(f'{TEXTS[name]}, {REMEDIES[name]}' for name in signs)}. It was so for "
                f"{config.collapse_steps} steps on end, up to step {step}. Use a new --output for "
                "other flags; --no-stop-on-collapse goes on all the same"
            )

    def check_weights(self) -> None:
        """Raise TrainingError where a weight is NaN or infinite, which no checkpoint must have."""
        for name, net in self.state.nets().items():
            if not torch.stack([p.isfinite().all() for p in net.parameters()]).all():
                raise TrainingError(
                    f"weights of {name} became NaN or infinite by step {self.state.step}; "
                    f"{NOT_FINITE_REMEDY}"
                )

    def _write_interval(self, step: int) -> None:
        interval, state = self.state.interval, self.state
        state.interval = Interval()
        if self.log is None:
            return
        seconds = interval.elapsed()
        warming_up = step <= self.warmup_steps
        rates = ("warmup",) if warming_up else ("corruption", "classifier")
        values: dict[str, Any] = {
            "step": step,
            "steps": self.steps,
            "epoch": (step - 1) // self.epoch_steps,
            "phase": "warmup" if warming_up else "adversarial",
            **interval.means(),
            **{f"{name}_rate": state.optimizers[name].param_groups[0]["lr"] for name in rates},
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
        if self.device.type == "cuda":
            values["gpu_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        warning_steps = round(WARNING_SHARE * self.config.logging.collapse_steps)
        for name in state.collapse.signs(warning_steps):
            self.log.notes.append(f"{TEXTS[name]}, {REMEDIES[name]}")
        self.log.write(values)

    def _eta(self, seconds_per_step: float) -> float:
        warmup_left = max(0, self.warmup_steps - self.state.step)
        adversarial_left = self.steps - max(self.state.step, self.warmup_steps)
        cost = ADVERSARIAL_COST if warmup_left else 1
        return seconds_per_step * (warmup_left + cost * adversarial_left)
