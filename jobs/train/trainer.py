"""The training loop that every Ray Train worker runs, and its collectives.

Each net's gradients are sums over the rank's images divided by the global number of images, so
one sum over the ranks is the whole synchronization: gradients, losses and the accuracy that
drives the controller travel in one vector per step. The controller reads a step's numbers
`LAG` steps later, so the host never waits for the step that is running.
"""

import hashlib
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from jobs.pictures import encode_png
from jobs.runs import DamagedError, ModelConfig, colour_statistics, load_net_tensors, save_nets
from jobs.train.checkpoints import read_checkpoint, write_checkpoint
from jobs.train.config import TrainConfig
from jobs.train.examples import Examples, draw_examples, load_examples
from jobs.train.graphs import Recordings
from jobs.train.log import MlflowLog, TrainingLog
from jobs.train.state import (
    Interval,
    TrainingError,
    TrainingState,
    adversarial_factor,
    fill_state,
    finished_nets,
    memory_layout,
    new_state,
    send,
    set_rate,
    state_numbers,
    state_tensors,
    warmup_factor,
)
from model.collapse import TEXTS, CollapseState, watch
from model.controller import ControllerConfig, ControllerState, relative_target, update
from model.evidence import evidence
from model.losses import confusion_loss
from model.masking import gumbel_difference, normalize, pixel_segments
from model.step import Step, adversarial_step, clean_step, trainable
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.order import Order, Position, steps_per_epoch
from pipeline.shards.format import Manifest, read_manifest, split_of

LAG = 2
NOT_FINITE_REMEDY = (
    "training stopped. The last checkpoint is sound: lower the learning rates "
    "(--corruption-rate, --classifier-rate, --warmup-rate) and use a new --output"
)
ADVERSARIAL_COST = 5  # an adversarial step over a warm-up step, until it is measured
WARNING_SHARE = 0.2  # of --collapse-steps, after which the log says what stops the run in the end


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
    for parameter, gradient in zip(trainable(net), gradients, strict=True):
        if gradient.is_cuda:  # the one kernel for all wants gradients laid out as their weights
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
    set_rate(optimizer, rate)
    optimizer.step()


class Trainer:
    """One rank's training: the state, the schedule, and what the host has read so far."""

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        manifest: Manifest,
        device: torch.device,
        ranks: int,
    ) -> None:
        self.config, self.model, self.device = config, model, device
        samples = split_of(manifest, "train").images
        self.epoch_steps = steps_per_epoch(samples, config.batch_size, ranks)
        warmup_epochs = 0 if config.warmup_from else config.warmup_epochs
        self.warmup_steps = warmup_epochs * self.epoch_steps
        self.steps = self.warmup_steps + config.epochs * self.epoch_steps
        self.state = new_state(config, model, device)
        self.loading = False  # whether the loader has given its first batch
        self.log: TrainingLog | None = None
        self.examples: Examples | None = None
        self.noise = torch.Generator(device)
        self.colours = colour_statistics(model, device)
        self.recordings = Recordings() if config.graphs and device.type == "cuda" else None
        if config.compile:
            # both losses go back through the classifier's one graph, which must outlive the first
            functorch_config.donated_buffer = False
            self.state.corruption.compile()
            self.state.classifier.compile()

    @property
    def position(self) -> Position:
        epoch, step = divmod(self.state.step, self.epoch_steps)
        return Position(epoch=epoch, step=step)

    @property
    def warming_up(self) -> bool:
        return self.state.step < self.warmup_steps

    @property
    def read_step(self) -> int:
        """The last step whose numbers the host has read."""
        return self.state.pending[0].step - 1 if self.state.pending else self.state.step

    @property
    def at_checkpoint(self) -> bool:
        """Whether the state is to be kept: every so many steps, and at the end of an epoch."""
        step = self.state.step
        return step % self.config.checkpoint_interval == 0 or step % self.epoch_steps == 0

    def train_step(self, batches: Iterator[Batch]) -> None:
        """The next step. At the end of an epoch nothing is pending."""
        state = self.state
        if state.step % self.epoch_steps == 0:
            state.epoch = Interval()
        if state.interval.steps == 0 and not state.pending:
            state.interval = Interval()  # what lay between is not training time
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        state.interval.waiting += waited
        if not self.loading:
            self.loading, state.interval.first_batch = True, waited
        if self.warming_up:
            self.warmup_step(batch)
        else:
            self.adversarial_step(batch)
        state.step += 1
        end = state.step % self.epoch_steps == 0
        while len(state.pending) > (0 if end else LAG - 1):
            self._read()
        if state.step == self.warmup_steps:
            self._finish_warmup()

    def _inputs(self, images: Tensor) -> Tensor:
        layout = memory_layout(self.device)
        return normalize(images, *self.colours).contiguous(memory_format=layout)

    def _compute(
        self, kind: Hashable, work: Callable[..., Step], inputs: tuple[Tensor, ...]
    ) -> Step:
        """This rank's `work(*inputs)`, added up over all ranks. kind: see `Recordings.compute`."""
        local = self.recordings.compute(kind, work, inputs) if self.recordings else work(*inputs)
        return reduce_step(local)

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def warmup_step(self, batch: Batch) -> None:
        """The classifier alone, on clean images. On a GPU nothing here waits for it."""
        state, config = self.state, self.config

        def work(images: Tensor, labels: Tensor) -> Step:
            with self._autocast():
                return clean_step(state.classifier, self._inputs(images), labels, batch.total)

        step = self._compute(("warm-up", batch.total), work, (batch.images, batch.labels))
        assert step.classifier_gradients is not None
        rate = config.warmup_rate * warmup_factor(state.step, self.warmup_steps)
        optimizer = state.optimizers["warmup"]
        apply_gradients(state.classifier, optimizer, step.classifier_gradients, rate)
        state.pending.append(send(state.step + 1, batch, step.sums, joint=False))

    def _finish_warmup(self) -> None:
        """Keep the clean classifier and its accuracy in its last epoch."""
        state = self.state
        state.clean_classifier.load_state_dict(state.classifier.state_dict())
        self._show_clean_classifier()
        state.clean_accuracy = state.epoch.means()["accuracy"]
        state.collapse = CollapseState()
        self._set_target()

    def take_warmup(self, run: Path) -> None:
        """Begin with the clean classifier of another run on the same set. Raises TrainingError
        where that run holds none yet."""
        try:
            checkpoint = read_checkpoint(run)
        except DamagedError as error:
            raise TrainingError(str(error)) from error
        if checkpoint is None or not checkpoint.numbers["clean_accuracy"]:
            raise TrainingError(
                f"--warmup-from {run} holds no checkpoint past its warm-up: there is no clean "
                "classifier to begin with. Let that run get further, or leave the flag out"
            )
        for net in (self.state.classifier, self.state.clean_classifier):
            load_net_tensors({"clean_classifier": net}, checkpoint.tensors)
        self._show_clean_classifier()
        self.state.clean_accuracy = checkpoint.numbers["clean_accuracy"]
        self._set_target()

    def _show_clean_classifier(self) -> None:
        """Make it the guide of the corruption nets, where they have one."""
        for net in (self.state.corruption, self.state.corruption_average):
            if net.guide is not None:
                net.guide.load_state_dict(self.state.clean_classifier.state_dict())

    def _set_target(self) -> None:
        state, config = self.state, self.config
        chance = 1 / len(self.model.classes)
        relative = relative_target(chance, state.clean_accuracy, config.target_share)
        state.target = config.target if config.target is not None else relative

    def _segments(self, batch: Batch) -> tuple[Tensor, int]:
        """What is masked as one, int64 [B, H, W], and how many labels there may be."""
        if self.config.superpixel_masks:
            return batch.segments, self.model.superpixels
        return pixel_segments(batch.segments), self.model.height * self.model.width

    def _mask_noise(self, batch: Batch, superpixels: int) -> Tensor:
        """This rank's part of the global batch's noise, the same for any number of ranks."""
        self.noise.manual_seed(self.config.seed * 1_000_003 + self.state.step)
        noise = gumbel_difference((batch.total, superpixels), self.noise)
        return noise[batch.offset : batch.offset + len(batch.labels)]

    def _gradients(
        self, batch: Batch, *, joint: bool, area_weight: float, probe: bool = False
    ) -> Step:
        state, config = self.state, self.config
        segments, superpixels = self._segments(batch)

        def work(
            images: Tensor, segments: Tensor, labels: Tensor, noise: Tensor, weight: Tensor
        ) -> Step:
            with self._autocast():
                x = self._inputs(images)
                found = None
                if config.imitation_weight:
                    found = evidence(state.clean_classifier, x, labels, segments, superpixels)
                return adversarial_step(
                    state.corruption,
                    state.classifier,
                    x,
                    segments,
                    labels,
                    noise,
                    total=batch.total,
                    joint=joint,
                    area_weight=weight,
                    area_power=config.area_power,
                    clean_weight=config.clean_weight,
                    confusion=config.confusion,
                    complement_weight=config.complement_weight,
                    soft=not config.gumbel_noise,
                    evidence=found,
                    imitation_weight=config.imitation_weight,
                    clean_classifier=state.clean_classifier if probe else None,
                )

        noise = self._mask_noise(batch, superpixels)
        weight = torch.full((), area_weight, device=self.device)
        inputs = (batch.images, segments, batch.labels, noise, weight)
        return self._compute(("adversarial", batch.total, joint, probe), work, inputs)

    def _first_controller(self, batch: Batch) -> ControllerState:
        """lambda in proportion to the corruption loss on the first batch without masks.

        That loss says how large the classifier's logits are. Under the first random masks the true
        class may already seem improbable, and a lambda in proportion to that let masks run off
        over everything.
        """
        sums = self._gradients(batch, joint=False, area_weight=0.0).sums
        accuracy = float(sums["correct"]) / batch.total
        with torch.no_grad(), self._autocast():
            images = self._inputs(batch.images)
            logits = self.state.classifier(images).to(images.dtype)
            confused = confusion_loss(logits, batch.labels, self.config.confusion).sum()
        local = Step(
            corruption_gradients=None, classifier_gradients=None, sums={"confusion": confused}
        )
        loss = float(reduce_step(local).sums["confusion"]) / batch.total
        if not loss > 0:
            raise TrainingError(
                f"the corruption loss without masks is {loss}: the warmed-up classifier scores all "
                "classes alike or not at all; look at the warm-up's loss in the log, and lower "
                "--warmup-rate or raise --warmup-epochs"
            )
        return ControllerState(area_weight=self.config.area_start * loss, accuracy=accuracy)

    def adversarial_step(self, batch: Batch) -> None:
        """Both nets, or the corruption net alone. On a GPU nothing here waits for it, but in the
        run's first such step, which reads the corruption loss without masks."""
        state, config = self.state, self.config
        if state.controller is None:
            state.controller = self._first_controller(batch)
        joint = state.controller.joint and config.train_classifier
        step = self._gradients(
            batch,
            joint=joint,
            area_weight=state.controller.area_weight,
            probe=(state.step + 1) % config.log_interval == 0,
        )
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
            averages: list[Tensor] = list(state.corruption_average.parameters())
            torch._foreach_lerp_(
                averages, list(state.corruption.parameters()), 1 - config.averaging
            )
        state.pending.append(send(state.step + 1, batch, step.sums, joint))

    def _read(self) -> None:
        """Take in the oldest pending step's numbers: the controller, the log, the checks.

        All ranks hold the same reduced numbers, so all raise, or none.
        """
        state = self.state
        pending = state.pending.popleft()
        sums = pending.read()
        bad = [name for name, value in sums.items() if not abs(value) < float("inf")]
        if bad:
            raise TrainingError(
                f"{', '.join(bad)} became NaN or infinite at step {pending.step}; "
                f"{NOT_FINITE_REMEDY}"
            )
        if state.controller is not None:
            controller = ControllerConfig(target=state.target, rate=self.config.controller_rate)
            state.controller = update(state.controller, controller, sums["correct"], pending.total)
        self._watch(pending.step, sums, pending.total, pending.joint)
        state.interval.add(sums, pending.total, pending.joint)
        state.epoch.add(sums, pending.total, pending.joint)
        borders = (self.warmup_steps, self.steps)  # an interval holds steps of one phase
        if pending.step % self.config.log_interval == 0 or pending.step in borders:
            self._write_interval(pending.step)

    def _watch(self, step: int, sums: dict[str, float], total: int, joint: bool) -> None:
        state, config = self.state, self.config
        adversarial = "area" in sums
        state.collapse = watch(
            state.collapse,
            accuracy=sums["correct"] / total,
            count=total,
            classes=len(self.model.classes),
            target=state.target if adversarial else None,
            area=sums["area"] / total if adversarial else None,
            joint=joint if adversarial and config.train_classifier else None,
        )
        signs = state.collapse.signs(config.collapse_steps)
        if signs and config.stop_on_collapse:
            raise TrainingError(
                f"{'; '.join(TEXTS[name] for name in signs)}. It was so for "
                f"{config.collapse_steps} steps on end, up to step {step}. Use a new --output for "
                "other flags; --no-stop-on-collapse goes on all the same"
            )

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
        for name in state.collapse.signs(round(WARNING_SHARE * self.config.collapse_steps)):
            self.log.note(TEXTS[name])
        self.log.write(values)

    def draw_examples(self) -> None:
        """Keep what the averaged corruption net makes of the example images now."""
        if self.log is None or self.examples is None or self.warming_up:
            return
        picture = draw_examples(self.examples, self.state.corruption_average, self.model)
        self.log.picture(self.state.step, picture, encode_png(picture))


def model_config(config: TrainConfig, manifest: Manifest) -> ModelConfig:
    """The nets' shape for a data set."""
    superpixels = manifest.configuration["superpixels"]
    return ModelConfig(
        classes=manifest.classes,
        class_names=manifest.class_names,
        height=manifest.height,
        width=manifest.width,
        net_width=config.net_width,
        residual_blocks=config.residual_blocks,
        guide=config.guide,
        bottleneck=config.bottleneck,
        mean=manifest.mean,
        std=manifest.std,
        superpixels=max(manifest.max_superpixels, superpixels),
        compactness=manifest.configuration["compactness"],
        logit_limit=config.logit_limit,
    )


def resume(trainer: Trainer) -> list[str]:
    """Go on from the newest sound checkpoint of the run, where there is one; returns what is to be
    said of it. All ranks read the same files. Raises TrainingError where all are damaged."""
    try:
        checkpoint = read_checkpoint(trainer.config.output)
    except DamagedError as error:
        raise TrainingError(str(error)) from error
    if checkpoint is None:
        return []
    fill_state(trainer.state, checkpoint.tensors, checkpoint.numbers)
    notes = [f"went on from the checkpoint of step {trainer.state.step}"]
    return [*(f"damaged checkpoint not used: {text}" for text in checkpoint.damaged), *notes]


def _describe(rank: int, state: TrainingState, digest: str) -> str:
    controller = state.controller
    balance = (
        f"lambda {controller.area_weight!r}, accuracy {controller.accuracy!r}, "
        f"{'joint' if controller.joint else 'corruption only'}"
        if controller is not None
        else "no controller yet"
    )
    return f"rank {rank}: step {state.step}, {balance}, weights {digest[:12]}"


def check_ranks(state: TrainingState, device: torch.device) -> None:
    """Raise TrainingError, on every rank, where controllers or weights differ in any bit.

    A hash of both is reduced to its smallest and largest value over the ranks; only where these
    differ are the states sent, to be shown.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    found = hashlib.sha256()
    for net in state.nets().values():
        for parameter in net.parameters():
            found.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    digest = found.hexdigest()
    controller = asdict(state.controller) if state.controller else None
    found.update(repr((state.step, state.target, controller, state.collapse)).encode())
    number = int.from_bytes(found.digest()[:7], "big")
    bounds = torch.tensor([number, -number], device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MIN)
    lowest, highest = bounds.tolist()
    if lowest == -highest:
        return
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, _describe(dist.get_rank(), state, digest))
    raise TrainingError(
        f"the workers no longer hold the same state ({'; '.join(texts)}): training them further "
        "would mix different nets. The last checkpoint is sound, the same command goes on from "
        "it; if it happens again, a GPU or a node computes wrongly"
    )


def on_first_rank(action: Callable[[], None], what: str, device: torch.device) -> None:
    """Let rank 0 write something. Where it cannot, every rank raises TrainingError."""
    failed: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failed[0] = f"{what} cannot be written: {error.strerror or error} ({error.filename})"
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(failed, src=0, device=device)
    if failed[0] is not None:
        raise TrainingError(
            f"{failed[0]}. Make room on the disk; the same command goes on from the last checkpoint"
        )


def checkpoint(trainer: Trainer) -> None:
    """Check that the state is finite and the same on all ranks, then let rank 0 keep it."""
    state, config = trainer.state, trainer.config
    trainer.check_weights()
    check_ranks(state, trainer.device)

    def write() -> None:
        tensors, numbers = state_tensors(state), state_numbers(state)
        write_checkpoint(config.output, state.step, tensors, numbers, config.keep_checkpoints)
        trainer.draw_examples()

    on_first_rank(write, f"the checkpoint of step {state.step}", trainer.device)


def train_worker(settings: dict[str, Any]) -> str | None:
    """Ray Train's worker function. settings: "config" (TrainConfig), "record" (see jobs.cli).

    A TrainingError, which all ranks meet at the same step, ends the run without another attempt:
    its message is returned. Anything else is a failure to recover from.
    """
    context = ray.train.get_context()
    try:
        _train(
            settings["config"],
            settings["record"],
            context.get_world_rank(),
            context.get_world_size(),
        )
    except TrainingError as error:
        return str(error)
    return None


def _open_log(trainer: Trainer, manifest: Manifest, notes: list[str]) -> None:
    config, mlflow = trainer.config, None
    if config.mlflow is not None:
        mlflow = MlflowLog(config.mlflow, config.output, asdict(config))
    trainer.log = TrainingLog(config.output, trainer.read_step, gauges=True, mlflow=mlflow)
    for text in notes:
        trainer.log.note(text)
    trainer.examples = load_examples(config, manifest, trainer.device)


def _train(config: TrainConfig, record: dict[str, Any], rank: int, ranks: int) -> None:
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    manifest = read_manifest(config.data)
    model = model_config(config, manifest)
    trainer = Trainer(config, model, manifest, device, ranks)
    notes = resume(trainer)
    if config.warmup_from is not None and not notes:
        trainer.take_warmup(config.warmup_from)
        notes = [f"began with the clean classifier of {config.warmup_from}"]
    check_ranks(trainer.state, device)
    if rank == 0:
        _open_log(trainer, manifest, notes)
    loader = Loader(config.data, manifest, device, config.cache_config())
    order = Order(batch_size=config.batch_size, seed=config.seed, window=config.window(manifest))
    batches = loader.train(
        order, config.augmentation(), start=trainer.position, rank=rank, ranks=ranks
    )
    while trainer.state.step < trainer.steps:
        trainer.train_step(batches)
        if trainer.at_checkpoint:
            checkpoint(trainer)
    if trainer.log is not None:
        trainer.log.close()
    nets = finished_nets(trainer.state, model)
    on_first_rank(lambda: save_nets(config.output, nets, record), "the trained nets", device)
