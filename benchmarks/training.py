"""`python -m benchmarks.training`: what a training step costs, alone, fed, and on two workers.

Every comparison is made side by side in one run, in turns, each process pinned to one core, and
reported as a ratio of medians, by the clock and by processor time, which leaves out waiting, also
that of one worker for another.

Default nets at 64 px, 196 superpixels, --batch-size images a step over all workers; adversarial
steps joint with clean images, the dearest, unless named otherwise. The peer is DDP: both nets
wrapped, the same method and loader; the classifier must be run a second time, outside the
corruption net's graph, so that each wrapper sees one backward pass.

On a machine with a GPU, `--device cuda` measures one process in bfloat16: the step alone and fed,
its kernels replayed or launched one by one. Nothing is pinned there.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import hardware, make_shards, write_result
from jobs import cli
from jobs.train.config import PRESETS, TrainConfig
from jobs.train.trainer import Trainer
from model.controller import ControllerState
from model.losses import area_penalty, classification_loss, correct, corruption_loss
from model.masking import (
    apply_mask,
    bernoulli_straight_through,
    gumbel_difference,
    mask_probability,
    normalize,
    paint,
)
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.order import Order
from pipeline.loading.resident import Resident
from pipeline.shards.format import read_manifest
from pipeline.synthetic import SyntheticConfig

CPU_TIME = ", by CPU time"
PHASES = ("warm-up", "corruption only", "joint")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How much to measure, and where the result goes."""

    images: int = cli.option(1024, help="generated train images, a multiple of the batch size")
    steps: int = cli.option(4, help="steps in a turn")
    batch_size: int = cli.option(64, help="images per step over all workers")
    turns: int = cli.option(5, low=1, help="how often each of the compared is measured")
    device: str = cli.option("cpu", help="cpu or cuda")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


def endless(data: Path, *flags: str) -> TrainConfig:
    """Return the configuration of a training that stays in either phase for ever."""
    fixed = {
        "data": data,
        "output": data.with_name("run"),
        "warmup_epochs": 10_000,
        "epochs": 10_000,
        "log_interval": 10**6,
        "target": 1 - 1e-9,
    }
    given = [text for name, value in fixed.items() for text in (cli.flag(name), str(value))]
    return cli.parse(TrainConfig, [*given, *flags], "", PRESETS, {"network": "photos"})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all measurements share."""

    config: BenchConfig
    folder: Path  # of the generated images and their shards

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    def trainer(self, *flags: str, ranks: int = 1) -> Trainer:
        """Return a trainer that stays in either phase for ever. flags: of jobs.train."""
        data = self.folder / "shards"
        config = endless(data, "--batch-size", str(self.config.batch_size), *flags)
        return Trainer(config, read_manifest(data), self.device, ranks)

    def batches(self, rank: int = 0, ranks: int = 1, *, resident: bool = False) -> Iterator[Batch]:
        """Return the loader's batches, or the same from a set that stays in the device's memory."""
        trainer = self.trainer(ranks=ranks)
        loading = trainer.config.loading
        loader = Loader(loading.data, read_manifest(loading.data), self.device)
        order = Order(batch_size=self.config.batch_size)
        return (Resident.read(loader) if resident else loader).train(
            order, loading.augmentation(), start=trainer.position, rank=rank, ranks=ranks
        )


def in_turns(works: Mapping[str, Callable[[], Any]], images: int, turns: int) -> dict[str, float]:
    """Return the images per second of each work, which handles `images`: the median over
    `turns`, after one that is not counted; under NAME + CPU_TIME by processor time."""
    seconds: dict[str, list[float]] = {name + kind: [] for name in works for kind in ("", CPU_TIME)}
    for turn in range(turns + 1):
        for name, work in works.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start, used = time.perf_counter(), time.process_time()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
                seconds[name + CPU_TIME].append(time.process_time() - used)
    return {name: images / statistics.median(values) for name, values in seconds.items()}


def make_steps(trainer: Trainer, phase: str, batches: Iterator[Batch], steps: int) -> None:
    """Make whole steps of a training, as `Trainer.train_step` does, in the given phase."""
    state = trainer.state
    for _ in range(steps):
        batch = next(batches)
        if phase == "warm-up":
            trainer.warmup_step(batch)
        else:
            joint = phase == "joint"
            state.controller = ControllerState(area_weight=1.0, accuracy=0.5, joint=joint)
            trainer.adversarial_step(batch)
        state.step += 1
        while len(state.pending) > 1:
            state.pending.popleft().read()
    while state.pending:
        state.pending.popleft().read()


def fed_and_unfed(setting: Setting, *flags: str) -> dict[str, float]:
    """Measure each phase with one batch that lies on the device, with batches from the loader,
    which shares the core, and with those of a set in the device's memory. On a GPU also with
    kernels launched one by one. flags: of jobs.train."""
    batches = setting.batches()
    same = repeat(next(batches))
    gpu = setting.device.type == "cuda"
    kinds = {"unfed": (flags, same), "fed": (flags, batches)}
    kinds["resident"] = (flags, setting.batches(resident=True))
    if gpu:
        kinds["unfed, one by one"] = ((*flags, "--no-graphs"), same)

    steps = setting.config.steps
    rates: dict[str, float] = {}
    for phase in PHASES:
        works = {
            f"{phase}, {name}": partial(make_steps, setting.trainer(*given), phase, source, steps)
            for name, (given, source) in kinds.items()
        }
        rates |= in_turns(works, steps * setting.config.batch_size, setting.config.turns)
    return rates


class Peer:
    """Both nets in DDP wrappers with optimizers of their own."""

    def __init__(self, trainer: Trainer) -> None:
        nets = trainer.nets
        self.colours, self.superpixels = trainer.colours, trainer.model.superpixels
        self.corruption = DistributedDataParallel(nets.corruption)
        self.classifier = DistributedDataParallel(nets.classifier)
        self.optimizers = [
            torch.optim.Adam(net.parameters(), 1e-3) for net in (self.corruption, self.classifier)
        ]

    def inputs(self, images: Tensor) -> Tensor:
        x = normalize(images, *self.colours)
        return x.contiguous(memory_format=torch.channels_last)

    def mask(self, x: Tensor, segments: Tensor) -> Tensor:
        probability = mask_probability(self.corruption, x, segments, self.superpixels)
        noise = gumbel_difference(tuple(probability.shape), torch.default_generator)
        return paint(bernoulli_straight_through(probability, noise), segments)

    def classifier_loss(self, masked: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        both = self.classifier(torch.cat([masked, x]))  # a wrapper may be called once
        return classification_loss(both, labels.repeat(2)).mean()

    def wrapped_step(self, batch: Batch) -> Tensor:
        """Take a step of the same method with one backward pass per net."""
        x = self.inputs(batch.images)
        for parameter in self.classifier.parameters():
            parameter.requires_grad_(False)
        mask = self.mask(x, batch.segments)
        masked = apply_mask(x, mask)
        logits = self.classifier.module(masked)
        loss = (corruption_loss(logits) + area_penalty(mask, 2)).mean()
        self.optimizers[0].zero_grad()
        loss.backward()
        self.optimizers[0].step()
        for parameter in self.classifier.parameters():
            parameter.requires_grad_(True)
        self.optimizers[1].zero_grad()
        self.classifier_loss(masked.detach(), x, batch.labels).backward()
        self.optimizers[1].step()
        right = correct(logits, batch.labels).sum()
        dist.all_reduce(right)
        return right


def _enter(rank: int, ranks: int, setting: Setting) -> None:
    """Be one worker on one core: ours and DDP in turns; rank 0 writes down the rates."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    folder, steps, batch_size = setting.folder, setting.config.steps, setting.config.batch_size
    meet = f"file://{folder}/meet-{ranks}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    ours = setting.trainer(ranks=ranks)
    wrapped = Peer(setting.trainer(ranks=ranks))
    batches = setting.batches(rank, ranks)
    one_step: dict[str, Callable[[], Any]] = {
        "ours, warm-up": lambda: make_steps(ours, "warm-up", batches, steps),
        "ours, joint": lambda: make_steps(ours, "joint", batches, steps),
        "DDP, joint": lambda: [wrapped.wrapped_step(next(batches)) for _ in range(steps)],
    }

    def together(work: Callable[[], Any]) -> None:
        dist.barrier()
        work()
        dist.barrier()

    works = {name: partial(together, work) for name, work in one_step.items()}
    rates = in_turns(works, steps * batch_size, setting.config.turns)
    if rank == 0:
        (folder / f"rates-{ranks}.json").write_text(json.dumps(rates))
    dist.destroy_process_group()


def worker_rates(setting: Setting) -> dict[str, float]:
    """Measure ours and DDP on one and two workers of one core each, of one global batch."""
    rates: dict[str, float] = {}
    for ranks in (1, 2):
        mp.start_processes(_enter, (ranks, setting), nprocs=ranks, start_method="spawn")
        measured = json.loads((setting.folder / f"rates-{ranks}.json").read_text())
        for name, rate in measured.items():
            what, kind, _ = name.partition(CPU_TIME)
            rates[f"{what}, workers: {ranks}{kind}"] = rate
    return rates


def ratios(rates: dict[str, float]) -> dict[str, float]:
    """Return the ratios that docs/results.md names, by the clock and by processor time."""
    pairs = {}
    for phase in PHASES:
        unfed = f"{phase}, unfed"
        pairs[f"{phase}: fed / unfed"] = (f"{phase}, fed", unfed)
        pairs[f"{phase}: resident / unfed"] = (f"{phase}, resident", unfed)
        pairs[f"{phase}: replayed / one by one"] = (unfed, f"{unfed}, one by one")
    for name in ("ours, warm-up", "ours, joint", "DDP, joint"):
        pairs[f"{name}: 2 workers / 1"] = (f"{name}, workers: 2", f"{name}, workers: 1")
    for ranks in (1, 2):
        ours, theirs = (f"{name}, joint, workers: {ranks}" for name in ("ours", "DDP"))
        pairs[f"ours / DDP, workers: {ranks}"] = (ours, theirs)
    return {
        name + kind: rates[above + kind] / rates[below + kind]
        for kind in ("", CPU_TIME)
        for name, (above, below) in pairs.items()
        if above in rates and below in rates
    }


def main() -> None:
    config = cli.parse(BenchConfig, None, __doc__ or "")
    cores, load = os.sched_getaffinity(0), os.getloadavg()[0]  # others' work distorts
    gpu = config.device == "cuda"
    with tempfile.TemporaryDirectory() as name:
        setting = Setting(config=config, folder=Path(name))
        make_shards(setting.folder, SyntheticConfig(train_images=config.images, val_images=0))
        rates = {} if gpu else worker_rates(setting)
        if not gpu:
            os.sched_setaffinity(0, {min(cores)})  # the loader's thread too
            torch.set_num_threads(1)
        rates |= fed_and_unfed(setting, *(("--precision", "bfloat16") if gpu else ()))
    compared = ratios(rates)
    print(cli.table(["what", "images/s"], [[k, f"{v:.0f}"] for k, v in rates.items()]))
    print(cli.table(["ratio", ""], [[k, f"{v:.3f}"] for k, v in compared.items()]))
    content = {
        "hardware": hardware(),
        "load_average_before": load,
        "batch_size": config.batch_size,
        "images_per_second": rates,
        "ratios": compared,
    }
    kind = f"{config.batch_size}{'-gpu' if gpu else ''}"
    write_result(config.output, f"training-{kind}", content)


if __name__ == "__main__":
    cli.run(main)
