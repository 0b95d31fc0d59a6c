"""`python -m benchmarks.training`: what a training step costs, alone, fed, and on two workers.

Every comparison is made side by side in one run, in turns, each process pinned to one core, and
reported as a ratio of medians, by the clock and by processor time. The latter says what the work
itself costs on a machine that others use too; it leaves out waiting, also that of one worker for
another, so for workers it is an upper bound, and the processes of the plain peer's loader.

Default nets at 64 px, 196 superpixels, --batch-size images a step over all workers; adversarial
steps joint with clean images, the dearest, unless named otherwise. The peers are:

- DDP: both nets wrapped, the same method and loader; the classifier must be run a second time,
  outside the corruption net's graph, so that each wrapper sees one backward pass;
- plain: as this method is usually written at first. DDP, a forward and a backward pass over both
  nets for either loss, the accuracy read at once, a DataLoader that decodes JPEG files and cuts
  superpixels on the fly.

Shares of peak: the floating-point operations of convolutions and matrix products per second, over
those of a large matrix product or convolution in the same precision in the same run.

On a machine with a GPU, `--device cuda` measures one process: the step alone and fed, in either
precision, its kernels replayed or launched one by one; and it profiles joint steps. Nothing is
pinned there.
"""

import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import hardware, quiet
from jobs import cli
from jobs.train.config import NetsConfig, TrainConfig
from jobs.train.graphs import Recordings, autocast
from jobs.train.trainer import Trainer
from jobs.train.worker import model_config
from model.controller import ControllerState
from model.losses import (
    Objective,
    area_penalty,
    classification_loss,
    correct,
    corruption_loss,
)
from model.masking import (
    apply_mask,
    bernoulli_straight_through,
    gumbel_difference,
    mask_probability,
    normalize,
    paint,
)
from model.step import Inputs, Step, adversarial_step, clean_step
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.order import Order
from pipeline.shards.format import read_manifest
from pipeline.shards.make import preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.shards.superpixels import superpixels
from pipeline.synthetic import SyntheticConfig, write_synthetic

SUPERPIXELS = 196
ROUNDS = 5  # turns that each of the compared takes
CPU_TIME = ", by CPU time"
PHASES = ("warm-up", "corruption only", "joint")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How much to measure, and where the result goes."""

    images: int = cli.option(1024, help="generated train images, a multiple of the batch size")
    steps: int = cli.option(4, help="steps in a turn")
    batch_size: int = cli.option(64, help="images per step over all workers")
    device: str = cli.option("cpu", help="cpu or cuda")
    net_width: int = cli.option(NetsConfig.net_width, help="channels of the nets' first layers")
    residual_blocks: int = cli.option(
        NetsConfig.residual_blocks, help="of the classifier, as in jobs.train"
    )
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


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
        fixed = {
            "data": self.folder / "shards",
            "output": self.folder / "no-run",
            "batch_size": self.config.batch_size,
            "net_width": self.config.net_width,
            "residual_blocks": self.config.residual_blocks,
            "warmup_epochs": 10_000,
            "epochs": 10_000,
            "log_interval": 10**6,
            "target": 1 - 1e-9,
        }
        given = [text for name, value in fixed.items() for text in (cli.flag(name), str(value))]
        config = cli.parse(TrainConfig, [*given, *flags], "")
        manifest = read_manifest(config.loading.data)
        return Trainer(config, model_config(config, manifest), manifest, self.device, ranks)

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Return the loader's batches."""
        trainer = self.trainer(ranks=ranks)
        loading = trainer.config.loading
        loader = Loader(loading.data, read_manifest(loading.data), self.device)
        order = Order(batch_size=self.config.batch_size)
        return loader.train(
            order, loading.augmentation(), start=trainer.position, rank=rank, ranks=ranks
        )


def in_turns(works: dict[str, Callable[[], Any]], images: int) -> dict[str, float]:
    """Images per second of each work, which handles `images`: the median over rounds in which all
    take turns, after one that is not counted. Under NAME + CPU_TIME the same by the processor
    time of this process, which other work on the machine hardly touches."""
    seconds: dict[str, list[float]] = {name + kind: [] for name in works for kind in ("", CPU_TIME)}
    for round_number in range(ROUNDS + 1):
        for name, work in works.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start, used = time.perf_counter(), time.process_time()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number:
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
            state.controller = ControllerState(
                area_weight=1.0, accuracy=0.5, joint=phase == "joint"
            )
            trainer.adversarial_step(batch)
        state.step += 1
        while len(state.pending) > 1:
            state.pending.popleft().read()
    while state.pending:
        state.pending.popleft().read()


def forget_memory(device: torch.device) -> None:
    """Let `most_memory` count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def most_memory(device: torch.device) -> float:
    """The most memory since `forget_memory`, in MiB: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def operations_per_image(setting: Setting) -> dict[str, float]:
    """Return the floating-point operations of a step of each phase, of convolutions and matrix
    products."""
    trainer, batch = setting.trainer("--no-graphs"), next(setting.batches())
    operations = {}
    for phase in PHASES:
        with FlopCounterMode(display=False) as counter:
            make_steps(trainer, phase, repeat(batch), 1)
        operations[phase] = counter.get_total_flops() / setting.config.batch_size
    return operations


def peaks(device: torch.device) -> dict[str, float]:
    """Floating-point operations per second of a large matrix product or a large convolution,
    whichever is faster: on a CPU they come from different libraries."""
    gpu = device.type == "cuda"
    side, channels, calls = (8192, 256, 10) if gpu else (2048, 64, 1)  # a GPU has more to fill
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.rand((side, side), device=device).to(dtype)
        x = torch.rand((64, channels, 64, 64), device=device).to(dtype)
        kernel = torch.rand((channels, channels, 3, 3), device=device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)

        def product(a: Tensor = a) -> None:
            for _ in range(calls):
                torch.matmul(a, a)

        def convolution(x: Tensor = x, kernel: Tensor = kernel) -> None:
            for _ in range(calls):
                functional.conv2d(x, kernel, padding=1)

        operations = {
            "product": calls * 2 * a.numel() * side,
            "convolution": calls * 2 * x.numel() * channels * 9,
        }
        rates = in_turns({"product": product, "convolution": convolution}, 1)
        name = str(dtype).removeprefix("torch.")
        found[name] = max(rates[work] * operations[work] for work in operations)
    return found


def shares_of_peak(
    rates: dict[str, float], operations: dict[str, float], peak: dict[str, float]
) -> dict[str, float]:
    """Of each rate of one process by the clock, the share of the peak of its precision."""
    return {
        name: rate * operations[name.partition(", ")[0]] / peak[precision]
        for name, rate in rates.items()
        for precision in ["bfloat16" if "bfloat16" in name else "float32"]
        if name.partition(", ")[0] in operations and not name.endswith(CPU_TIME)
    }


def fed_and_unfed(setting: Setting) -> tuple[dict[str, float], dict[str, float]]:
    """Measure each phase with one batch that lies on the device, and with batches from the loader,
    which shares the core: rates, and the most memory by phase. On a GPU also in bfloat16, and with
    kernels launched one by one."""
    batches = setting.batches()
    same = repeat(next(batches))
    kinds: dict[str, tuple[tuple[str, ...], Iterator[Batch]]] = {
        "unfed": ((), same),
        "fed": ((), batches),
    }
    if setting.device.type == "cuda":
        half = ("--precision", "bfloat16")
        kinds |= {
            "unfed, one by one": (("--no-graphs",), same),
            "unfed, bfloat16": (half, same),
            "fed, bfloat16": (half, batches),
            "unfed, bfloat16, one by one": ((*half, "--no-graphs"), same),
        }
    rates: dict[str, float] = {}
    memory: dict[str, float] = {}

    def work(phase: str, trainer: Trainer, source: Iterator[Batch]) -> Callable[[], Any]:
        return lambda: make_steps(trainer, phase, source, setting.config.steps)

    for phase in PHASES:
        works = {
            f"{phase}, {name}": work(phase, setting.trainer(*flags), source)
            for name, (flags, source) in kinds.items()
        }
        forget_memory(setting.device)
        rates |= in_turns(works, setting.config.steps * setting.config.batch_size)
        memory[phase] = most_memory(setting.device)
    return rates, memory


def profile(setting: Setting) -> dict[str, Any]:
    """Return what the host asked of the GPU in joint steps, and for what share of them it worked.

    The batch lies on the device, so the loader's thread asks for nothing.
    """
    trainer, same, steps = setting.trainer(), repeat(next(setting.batches())), setting.config.steps
    make_steps(trainer, "joint", same, 2)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        make_steps(trainer, "joint", same, steps)
    events = recorded.events() or []
    calls = Counter(event.name for event in events if event.name.startswith("cuda"))
    busy, end = 0.0, 0.0
    spans = [e.time_range for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    first = min((span.start for span in spans), default=0.0)
    return {
        "steps": steps,
        "host_calls": dict(calls.most_common()),
        "kernels_and_copies_per_step": len(spans) / steps,
        "gpu_busy_share": busy / (end - first) if spans else 0.0,
    }


def variants(setting: Setting) -> dict[str, float]:
    """Measure the gradients of a joint step and of a warm-up step, data at hand, in each layout and
    precision; replayed on a GPU."""
    trainer, batch = setting.trainer(), next(setting.batches())
    images = normalize(batch.images, *trainer.colours)
    _, labels, segments, noise = trainer.adversarial_tensors(batch)

    def gradients(layout: torch.memory_format, half: bool, joint: bool) -> Callable[[], Any]:
        nets = setting.trainer().nets
        for net in (nets.corruption, nets.classifier):
            net.to(memory_format=layout)  # type: ignore[call-overload]

        def step(half: bool, tensors: tuple[Tensor, ...]) -> Step:
            x, segments, labels, noise, weight = tensors
            with autocast(setting.device, half):
                if not joint:
                    return clean_step(nets.classifier, x, labels, batch.total)
                inputs = Inputs(
                    images=x, segments=segments, labels=labels, noise=noise, total=batch.total
                )
                return adversarial_step(nets, inputs, Objective(), weight, joint=True)

        x, weight = images.contiguous(memory_format=layout), torch.ones((), device=setting.device)
        compute = Recordings(step).compute if setting.device.type == "cuda" else step

        def work() -> None:
            for _ in range(setting.config.steps):
                compute(half, (x, segments, labels, noise, weight))

        return work

    kinds = {
        f"{words}, {'bfloat16' if half else 'float32'}": (layout, half)
        for half in (False, True)
        for words, layout in (
            ("contiguous", torch.contiguous_format),
            ("channels last", torch.channels_last),
        )
    }
    rates: dict[str, float] = {}
    for phase, joint in (("joint", True), ("warm-up", False)):
        works = {f"{phase}, {name}": gradients(*kind, joint) for name, kind in kinds.items()}
        rates |= in_turns(works, setting.config.steps * setting.config.batch_size)
    return rates


class Photos(Dataset[tuple[Tensor, Tensor, int]]):
    """The plain peer's data: an image file, decoded, cropped, flipped, cut into superpixels."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*/*.JPEG"))
        classes = sorted({path.parent.name for path in self.paths})
        self.labels = [classes.index(path.parent.name) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, int]:
        image = cv2.imread(str(self.paths[place]))
        assert image is not None
        image, random = image[..., ::-1], np.random.default_rng()
        side = min(image.shape[:2])
        cut = int(side * random.uniform(0.84, 1))
        y, x = (random.integers(0, size - cut + 1) for size in image.shape[:2])
        image = cv2.resize(image[y : y + cut, x : x + cut], (64, 64), interpolation=cv2.INTER_AREA)
        if random.random() < 0.5:
            image = image[:, ::-1]
        image = np.ascontiguousarray(image)
        segments = superpixels(image, SUPERPIXELS, 10.0).astype(np.int64)
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        return pixels, torch.from_numpy(segments), self.labels[place]


def endless(loader: DataLoader[Any]) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


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
        """The same method with one backward pass per net."""
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

    def plain_step(self, images: Tensor, segments: Tensor, labels: Tensor) -> float:
        """A forward and a backward pass over everything for either loss."""
        x = self.inputs(images)
        for number in range(2):
            mask = self.mask(x, segments)
            masked = apply_mask(x, mask)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            if number == 0:
                logits = self.classifier(masked)
                loss = (corruption_loss(logits) + area_penalty(mask, 2)).mean()
            else:
                loss = self.classifier_loss(masked, x, labels)
            loss.backward()
            self.optimizers[number].step()
        right = correct(logits, labels).sum()
        dist.all_reduce(right)
        return float(right)


def _enter(rank: int, ranks: int, setting: Setting) -> None:
    """One worker on one core: ours, DDP and plain in turns; rank 0 writes down the rates."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    folder, steps, batch_size = setting.folder, setting.config.steps, setting.config.batch_size
    meet = f"file://{folder}/meet-{ranks}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    ours = setting.trainer(ranks=ranks)
    wrapped, plain = (Peer(setting.trainer(ranks=ranks)) for _ in range(2))
    batches = setting.batches(rank, ranks)
    photos = Photos(folder / "images" / "train")
    sampler: DistributedSampler[Any] = DistributedSampler(photos, ranks, rank)
    stream = endless(
        DataLoader(
            photos,
            batch_size // ranks,
            sampler=sampler,
            num_workers=1,
            drop_last=True,
            prefetch_factor=2,
        )
    )
    one_step: dict[str, Callable[[], Any]] = {
        "ours, warm-up": lambda: make_steps(ours, "warm-up", batches, steps),
        "ours, joint": lambda: make_steps(ours, "joint", batches, steps),
        "DDP, joint": lambda: [wrapped.wrapped_step(next(batches)) for _ in range(steps)],
        "plain, joint": lambda: [plain.plain_step(*next(stream)) for _ in range(steps)],
    }

    def together(work: Callable[[], Any]) -> Callable[[], Any]:
        def begin_and_end_together() -> None:
            dist.barrier()
            work()
            dist.barrier()

        return begin_and_end_together

    works = {name: together(work) for name, work in one_step.items()}
    rates = in_turns(works, steps * batch_size)
    if rank == 0:
        (folder / f"rates-{ranks}.json").write_text(json.dumps(rates))
    dist.destroy_process_group()


def worker_rates(setting: Setting) -> dict[str, float]:
    """Measure ours, DDP and plain on one and two workers of one core each, of one global batch."""
    rates: dict[str, float] = {}
    for ranks in (1, 2):
        mp.start_processes(_enter, (ranks, setting), nprocs=ranks, start_method="spawn")
        measured = json.loads((setting.folder / f"rates-{ranks}.json").read_text())
        for name, rate in measured.items():
            what, kind, _ = name.partition(CPU_TIME)
            rates[f"{what}, workers: {ranks}{kind}"] = rate
    return rates


def make_data(folder: Path, images: int) -> None:
    """Write generated images and their shards."""
    write_synthetic(folder / "images", SyntheticConfig(train_images=images, val_images=0))
    config = PreprocessConfig(
        source=str(folder / "images"), output=str(folder / "shards"), superpixels=SUPERPIXELS
    )
    ray.init(address="local", include_dashboard=False, logging_level="warning")
    preprocess(config, quiet, cli.connect_ray)
    ray.shutdown()


def ratios(rates: dict[str, float]) -> dict[str, float]:
    """What the goals are about."""
    found = {f"{phase}: fed / unfed": (f"{phase}, fed", f"{phase}, unfed") for phase in PHASES}
    for phase in PHASES:
        for kind in ("", ", bfloat16"):
            unfed = f"{phase}, unfed{kind}"
            found[f"{phase}{kind}: replayed / one by one"] = (unfed, f"{unfed}, one by one")
        half = f"{phase}, fed, bfloat16", f"{phase}, unfed, bfloat16"
        found |= {
            f"{phase}: bfloat16 / float32, unfed": (half[1], f"{phase}, unfed"),
            f"{phase}, bfloat16: fed / unfed": half,
        }
    for phase in ("joint", "warm-up"):
        base = f"{phase}, contiguous, float32"
        for name in rates:
            if name.startswith(f"{phase}, channels") and not name.endswith(CPU_TIME):
                found[f"{name} / contiguous, float32"] = (name, base)
    for name in ("ours, warm-up", "ours, joint", "DDP, joint", "plain, joint"):
        found[f"{name}: 2 workers / 1"] = (f"{name}, workers: 2", f"{name}, workers: 1")
    for ranks in (1, 2):
        for peer in ("DDP", "plain"):
            found[f"ours / {peer}, workers: {ranks}"] = (
                f"ours, joint, workers: {ranks}",
                f"{peer}, joint, workers: {ranks}",
            )
    return {
        name + kind: rates[above + kind] / rates[below + kind]
        for kind in ("", CPU_TIME)
        for name, (above, below) in found.items()
        if above in rates and below in rates
    }


def main() -> None:
    config = cli.parse(BenchConfig, None, __doc__ or "")
    cores, load = os.sched_getaffinity(0), os.getloadavg()[0]  # others' work distorts
    gpu = config.device == "cuda"
    with tempfile.TemporaryDirectory() as name:
        setting = Setting(config=config, folder=Path(name))
        make_data(setting.folder, config.images)
        rates = {} if gpu else worker_rates(setting)
        if not gpu:
            os.sched_setaffinity(0, {min(cores)})  # the loader's thread too
            torch.set_num_threads(1)
        operations, peak = operations_per_image(setting), peaks(setting.device)
        alone, memory = fed_and_unfed(setting)
        profiled = profile(setting) if gpu else None
        alone |= variants(setting)
    shares = shares_of_peak(alone, operations, peak)
    rates = alone | rates
    compared = ratios(rates)
    rows = [[k, f"{v:.0f}", f"{shares[k]:.3f}" if k in shares else "-"] for k, v in rates.items()]
    print(cli.table(["what", "images/s", "of peak"], rows))
    print(cli.table(["ratio", ""], [[k, f"{v:.3f}"] for k, v in compared.items()]))
    for phase in PHASES:
        print(f"{phase}: {operations[phase] / 1e6:.0f} MFLOP an image, {memory[phase]:.0f} MiB")
    nets = {"net_width": config.net_width, "residual_blocks": config.residual_blocks}
    content = {
        "hardware": hardware(),
        "load_average_before": load,
        "batch_size": config.batch_size,
        "images_per_second": rates,
        "ratios": compared,
        "operations_per_image": operations,
        "peak_operations_per_second": peak,
        "shares_of_peak": shares,
        "memory_mib": memory,
        "nets": nets,
        "profile_of_joint_steps": profiled,
    }
    if profiled is not None:
        print(json.dumps(profiled, indent=1))
    config.output.mkdir(parents=True, exist_ok=True)
    default = all(value == getattr(NetsConfig, name) for name, value in nets.items())
    shape = "" if default else f"-width-{config.net_width}-blocks-{config.residual_blocks}"
    kind = f"{config.batch_size}{shape}{'-gpu' if gpu else ''}"
    path = config.output / f"{date.today().isoformat()}-training-{kind}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
