"""Evaluating a split: batches over Ray tasks, predictions back, figures from them.

A split is cut into batches in its own order, and the tasks take whole batches: what a net
computes for an image does not depend on the number of tasks, so neither do the figures.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from jobs.cli import UserError, connect_ray, option
from jobs.models import MODEL_NAME, ModelConfig, Nets, colour_statistics, load_nets
from jobs.scoring import (
    TOP,
    centred_shares,
    check_coverage,
    fixed_lists,
    join_predictions,
    score,
)
from model.adversarial import normalize
from model.baselines import blur, class_activation_map, gradient_saliency
from model.localization import RULE_TEXTS, localize, mask_map
from model.metrics import PROTOCOL
from pipeline.ledger import read_ledger
from pipeline.shards import Card, DataError, read_card, sha256_file, split_of

TASKS_PER_WORKER = 4  # so that the progress line moves
GPU_SHARE = 0.25  # tasks share a GPU: while one finds boxes on its core, another's nets run


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, on what, and how it is divided."""

    data: Path = option(help="folder of shards that jobs.preprocess wrote")
    run: Path = option(help="folder of a finished jobs.train")
    output: Path = option(help="folder for predictions.parquet, metrics.json and report.html")
    split: str = option("val", help="split to evaluate")
    batch_size: int = option(100, help="images the nets see at once")
    workers: int | None = option(
        None, help="Ray tasks at once (default: one per CPU, or four per GPU where there are any)"
    )
    shards: int | None = option(
        None, help="parts the split is cut into, at most one per batch (default: 4 per worker)"
    )
    baselines: bool = option(True, help="also CAM and gradient saliency, from the clean classifier")
    seed: int = option(0, help="of the bootstrap intervals and the report's random pictures")

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers", "shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """predictions: a row per image in ledger order, see `join_predictions`. metrics: the content
    of metrics.json but for the run's record."""

    predictions: pa.Table
    metrics: dict[str, Any]


def check_compatible(run: Path, config: ModelConfig, data: Path, card: Card) -> None:
    """Raise UserError, in one line, where nets and shards differ in classes or image size."""
    if config.classes != card.classes:
        both = set(config.classes) & set(card.classes)
        raise UserError(
            f"checkpoint and shards with different classes: {run} knows {len(config.classes)}, "
            f"{data} has {len(card.classes)}, {len(both)} of them in common; class indices would "
            "not mean the same. Evaluate on shards of the set that the run was trained on."
        )
    if (config.height, config.width) != (card.height, card.width):
        raise UserError(
            f"checkpoint and shards with different image sizes: {run} was trained at "
            f"{config.height}x{config.width}, {data} holds {card.height}x{card.width}. "
            f"Preprocess with --image-size {config.height}."
        )
    asked, compactness = card.configuration["superpixels"], card.configuration["compactness"]
    if max(card.max_superpixels, asked) != config.superpixels or compactness != config.compactness:
        raise UserError(
            f"checkpoint and shards with different superpixels: {run} was trained with "
            f"{config.superpixels} at compactness {config.compactness}, {data} has {asked} at "
            f"{compactness}; the masks would mean something else. Preprocess with --superpixels "
            f"{config.superpixels} --compactness {config.compactness}."
        )


def _top_classes(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Up to five best classes [B, 5] and their probabilities; equal ones in index order."""
    scores, classes = torch.softmax(logits, dim=1).sort(dim=1, descending=True, stable=True)
    return classes[:, :TOP].cpu().numpy(), scores[:, :TOP].cpu().numpy()


def predict(
    nets: Nets,
    images: Tensor,
    segments: Tensor,
    labels: Tensor,
    *,
    superpixels: int,
    baselines: bool,
) -> dict[str, np.ndarray]:
    """What the nets say of one batch, as columns; boxes in pixels of the stored size.

    images: uint8 [B, 3, H, W]; segments: int64 [B, H, W]; labels: int64 [B], whose class the
    baselines' maps are of (see model/baselines.py). Raises ValueError for maps with NaN.
    """
    x = normalize(images, *colour_statistics(nets.config, images.device))
    columns: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name in ("classifier", "clean_classifier"):
            classes, scores = _top_classes(getattr(nets, name)(x))
            columns |= {f"{name}_classes": classes, f"{name}_scores": scores}
        maps = {"aln": mask_map(nets.corruption, x, segments, superpixels).cpu().numpy()}
    if baselines:
        maps["cam"] = class_activation_map(nets.clean_classifier, x, labels).cpu().numpy()
        saliency = gradient_saliency(nets.clean_classifier, x, labels)
        maps["gradient"] = blur(saliency.cpu().numpy())
    for name, values in maps.items():
        columns[f"{name}_box"], columns[f"{name}_found"] = localize(values)
    return columns


def predict_range(config: EvaluateConfig, first: int, stop: int, use_gpu: bool) -> pa.Table:
    """Predictions for batches number first..stop-1 of the split: `predict`'s columns and `row`.

    Runs in a Ray task, on CUDA where the task was given a GPU. Sets the process to one thread and
    to deterministic kernels.
    """
    from pipeline.loader import evaluation_batches  # DALI: only where batches are made

    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda" if use_gpu else "cpu")
    card = read_card(config.data)
    nets = load_nets(config.run)
    for net in (nets.corruption, nets.classifier, nets.clean_classifier):
        net.to(device)
    tables = []
    for batch in evaluation_batches(
        config.data,
        card,
        config.split,
        batch_size=config.batch_size,
        first=first,
        stop=stop,
        device=device,
    ):
        rows = batch.index.cpu().numpy()
        try:
            columns = predict(
                nets,
                batch.images,
                batch.segments,
                batch.labels,
                superpixels=card.max_superpixels,
                baselines=config.baselines,
            )
        except ValueError as error:
            raise UserError(
                f"ledger rows {rows[0]} to {rows[-1]} of {config.data}: {error}"
            ) from None
        tables.append(pa.table({"row": rows, **{n: fixed_lists(v) for n, v in columns.items()}}))
    return pa.concat_tables(tables)


def ranges(batches: int, shards: int) -> list[tuple[int, int]]:
    """Batches 0..batches-1 in `shards` runs [first, stop) that differ by one at most; fewer runs
    where there are fewer batches."""
    shards = min(shards, batches)
    return [(batches * i // shards, batches * (i + 1) // shards) for i in range(shards)]


def predict_all(
    config: EvaluateConfig, batches: int, progress: Callable[[int, int], None]
) -> pa.Table:
    """`predict_range` over the whole split, in Ray tasks of which at most `workers` are under way.

    progress: called with the batches done and all batches. Needs an initialized Ray. Raises the
    UserError or DataError of a task as it is; Ray itself repeats tasks whose worker died.
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    cores = max(1, int(resources.get("CPU", 1)))
    workers = config.workers or int(gpus / GPU_SHARE) or cores
    task = ray.remote(num_cpus=1, num_gpus=GPU_SHARE if gpus else 0)(predict_range)
    waiting = deque(ranges(batches, config.shards or TASKS_PER_WORKER * workers))
    running: dict[ray.ObjectRef, tuple[int, int]] = {}
    tables, done = [], 0
    while waiting or running:
        while waiting and len(running) < workers:
            part = waiting.popleft()
            running[task.remote(config, *part, gpus > 0)] = part
        (reference,), _ = ray.wait(list(running), num_returns=1)
        first, stop = running.pop(reference)
        try:
            tables.append(ray.get(reference))
        except RayTaskError as error:
            if isinstance(error.cause, UserError | DataError):
                raise error.cause from None
            raise
        done += stop - first
        progress(done, batches)
    return pa.concat_tables(tables)


def evaluate(config: EvaluateConfig, progress: Callable[[int, int], None]) -> Evaluation:
    """Predict and score a split over Ray, see `connect_ray`; writes nothing.

    Raises UserError or DataError, each of one line, for folders that do not fit each other.
    """
    started = time.monotonic()
    card = read_card(config.data)
    split = split_of(card, config.split)
    if not split.images:
        raise UserError(
            f"split {config.split!r} of {config.data} has no images: nothing to evaluate."
        )
    check_compatible(config.run, load_nets(config.run).config, config.data, card)
    columns = ["row", "key", "id", "label", "shard", "width", "height", "boxes"]
    ledger = read_ledger(config.data, config.split, columns)
    connect_ray()
    predicted = predict_all(config, -(-split.images // config.batch_size), progress)
    check_coverage(predicted["row"].to_numpy(), ledger)
    shares, source = centred_shares(config.data, card)
    predictions = join_predictions(ledger, predicted, (card.height, card.width), shares)
    scored = score(predictions, card, config.seed)
    scored["methods"]["centred_box"] |= {
        "shares": {"height": shares[0], "width": shares[1]},
        "source": source,
    }
    metrics = {
        "format": 1,
        "split": config.split,
        "images": split.images,
        "rejected": split.rejected,
        "protocol": PROTOCOL,
        "box_rule": RULE_TEXTS["paper"],
        **scored,
        "class_names": dict(zip(card.classes, card.class_names, strict=True)),
        "data_configuration": card.configuration,
        "model_sha256": sha256_file(config.run / MODEL_NAME),
        "seconds": round(time.monotonic() - started, 2),
    }
    return Evaluation(predictions=predictions, metrics=metrics)
