"""`python -m benchmarks.network_training`: steps over a pretrained network, and maps and classes
by it, beside its bare passes.

Bare passes are the same nets' forward and backward passes on the same batch, without masks,
superpixels, losses, optimizers and sums. Both take turns in one process of --threads threads.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import hardware, make_shards, write_result
from benchmarks.training import CPU_TIME, PHASES, endless, in_turns, make_steps
from jobs import cli
from jobs.train.graphs import autocast, net_inputs
from jobs.train.trainer import Trainer
from model.classifier import class_probabilities
from model.decoder import FeatureCorruptionNet, object_map, resize
from model.pretrained import PretrainedClassifier
from model.saliency import layer_cams_of
from model.step import adversary_view, trainable
from pipeline.loading.loader import Batch, Loader
from pipeline.shards.format import read_manifest
from pipeline.synthetic import SyntheticConfig

INFERENCE = "inference"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured, and where the result goes."""

    network: str = cli.option("efficientnet-lite0", help="as of jobs.train")
    image_size: int = cli.option(224, help="side of the images")
    batch_size: int = cli.option(32, help="images per step")
    steps: int = cli.option(2, help="steps in a turn")
    turns: int = cli.option(5, low=1, help="how often each of the compared is measured")
    threads: int = cli.option(1, help="threads of torch")
    device: str = cli.option("cpu", help="cpu or cuda")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


def new_trainer(config: BenchConfig, folder: Path) -> tuple[Trainer, Batch]:
    """Return a trainer over the network that trains in any phase for ever, and a batch."""
    drawing = SyntheticConfig(
        train_images=config.batch_size, val_images=0, min_side=256, max_side=256
    )
    data = make_shards(folder, drawing, image_size=config.image_size)
    flags = ("--network", config.network, "--batch-size", str(config.batch_size))
    manifest, device = read_manifest(data), torch.device(config.device)
    batch = next(Loader(data, manifest, device).evaluation("train", config.batch_size))
    return Trainer(endless(data, *flags), manifest, device, 1), batch


def bare_passes(trainer: Trainer, batch: Batch, phase: str, steps: int) -> None:
    """Make the passes of so many steps of a phase."""
    nets, labels = trainer.nets, batch.labels
    corruption, clean, classifier = nets.corruption, nets.clean_classifier, nets.classifier
    assert isinstance(corruption, FeatureCorruptionNet)
    assert isinstance(clean, PretrainedClassifier)
    for _ in range(steps):
        with autocast(trainer.device, trainer.half):
            images = net_inputs(batch.images, trainer.colours)
            maps = corruption.encode(images)
            layer_cams_of(clean, clean.final(maps), labels)
            logits = corruption.decode(maps, images.shape[2:])
            view = adversary_view(images, trainer.objective)
            own = trainable(classifier)
            if phase == "warm-up":
                torch.autograd.grad(classifier(view).sum(), own)
            else:
                joint = phase == "joint"
                score = classifier(view.requires_grad_()).sum()
                torch.autograd.grad(score, [view, *own] if joint else view)
                if joint:
                    torch.autograd.grad(classifier(view.detach()).sum(), own)
            torch.autograd.grad(logits.sum(), trainable(corruption))


def infer(trainer: Trainer, batch: Batch, steps: int) -> None:
    """Make maps and classes of a batch, as an evaluation does."""
    nets = trainer.nets
    for _ in range(steps):
        with torch.no_grad(), autocast(trainer.device, trainer.half):
            images = net_inputs(batch.images, trainer.colours)
            object_map(nets.corruption, images, batch.segments, trainer.model.superpixels)
            class_probabilities(nets.clean_classifier, images, crops=False)


def bare_inference(trainer: Trainer, batch: Batch, steps: int) -> None:
    """Make the passes of it."""
    corruption, clean = trainer.nets.corruption, trainer.nets.clean_classifier
    assert isinstance(corruption, FeatureCorruptionNet)
    for _ in range(steps):
        with torch.inference_mode(), autocast(trainer.device, trainer.half):
            images = net_inputs(batch.images, trainer.colours)
            enlarged = resize(images, (corruption.sides[-1], corruption.sides[-1]))
            corruption.decoder(corruption.encoder.encode(enlarged))
            clean(images)


def measure(config: BenchConfig, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return images per second of the steps, of inference and of their bare passes, and their
    ratios."""
    trainer, batch = new_trainer(config, folder)
    rates: dict[str, float] = {}
    for phase in (*PHASES, INFERENCE):
        if phase != "warm-up":
            trainer.warmup_steps = 0
            trainer.choose_trained()
        works: dict[str, Callable[[], Any]] = {
            phase: partial(make_steps, trainer, phase, repeat(batch), config.steps),
            f"{phase}, bare": partial(bare_passes, trainer, batch, phase, config.steps),
        }
        if phase == INFERENCE:
            works[phase] = partial(infer, trainer, batch, config.steps)
            works[f"{phase}, bare"] = partial(bare_inference, trainer, batch, config.steps)
        rates |= in_turns(works, config.steps * config.batch_size, config.turns)
    ratios = {
        what + kind: rates[what + kind] / rates[f"{what}, bare{kind}"]
        for what in (*PHASES, INFERENCE)
        for kind in ("", CPU_TIME)
    }
    return rates, ratios


def main() -> None:
    config = cli.parse(BenchConfig, None, __doc__ or "")
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as name:
        rates, ratios = measure(config, Path(name))
    print(cli.table(["what", "images/s"], [[k, f"{v:.1f}"] for k, v in rates.items()]))
    print(cli.table(["step / bare passes", ""], [[k, f"{v:.3f}"] for k, v in ratios.items()]))
    settings = {"network": config.network, "image_size": config.image_size, "hardware": hardware()}
    content = {**settings, "images_per_second": rates, "ratios": ratios}
    write_result(config.output, f"network-training-{config.device}", content)


if __name__ == "__main__":
    cli.run(main)
