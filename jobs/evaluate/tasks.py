"""What runs in the tasks of an evaluation: nets or score maps -> scored columns and counts.

A split is cut into batches in its own order, and the tasks take whole batches: what a net
computes for an image does not depend on the number of tasks, so neither do the figures.
"""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from torch import Tensor

from jobs.evaluate.maps import MapCounts, MapTruth, Scored, score_maps
from jobs.evaluate.networks import Network, load_network, network_logits, network_maps, prepare
from jobs.evaluate.rows import suffix
from jobs.runs import Nets, colour_statistics, load_nets
from model.classifier import class_probabilities
from model.evidence import evidence
from model.localization import RULES
from model.masking import mask_map, normalize
from model.relevance import layerwise_relevance
from model.saliency import blur, class_activation_map, gradient_saliency
from pipeline.errors import UserError
from pipeline.evaluation.formats import read_score_map, score_map_path, write_score_map
from pipeline.evaluation.sweep import stretch
from pipeline.loading.cache import CacheConfig
from pipeline.shards.format import read_manifest

TOP = 5  # classes kept per image and classifier
TASKS_PER_WORKER = 4  # so that the progress line moves
GPU_SHARE = 0.25  # tasks share a GPU: while one finds boxes on its core, another's nets run
MAPS_AT_ONCE = 16  # others' score maps in memory
CANCEL_SECONDS = 3.0  # after which a task that has not ended is killed

Result = tuple[pa.Table, dict[str, MapCounts]]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A network from elsewhere, see `jobs.networks.load_network`."""

    name: str
    weights: Path
    classes: Path | None
    size: int | None


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What a task needs to know. cache: folder for shards of a remote set, None for the node's
    default one. runs: none to two; export: folder for score maps, or None."""

    data: str
    split: str
    cache: Path | None
    cache_bytes: int
    runs: tuple[Path, ...]
    network: NetworkConfig | None
    batch_size: int
    baselines: bool
    ten_crops: bool
    export: Path | None


def top_classes(probabilities: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Up to five best classes [B, 5] and their probabilities; equal ones in index order."""
    scores, classes = probabilities.sort(dim=1, descending=True, stable=True)
    return classes[:, :TOP].cpu().numpy(), scores[:, :TOP].cpu().numpy()


def net_maps(
    nets: Nets,
    images: Tensor,
    segments: Tensor,
    labels: Tensor,
    superpixels: int,
    *,
    baselines: bool,
    crops: bool,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the nets say of one batch: (columns of classes and scores, maps float [B, H, W]).

    images: uint8 [B, 3, H, W]; segments: int64 [B, H, W]; labels: int64 [B], whose class the
    baselines' maps are of (see model/saliency.py). crops: see `class_probabilities`.
    """
    x = normalize(images, *colour_statistics(nets.config, images.device))
    x = x.contiguous(memory_format=torch.channels_last)  # on a CPU a quarter faster
    columns: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name in ("classifier", "clean_classifier"):
            found = class_probabilities(getattr(nets, name), x, crops=crops)
            classes, scores = top_classes(found)
            columns |= {f"{name}_classes": classes, f"{name}_scores": scores}
        maps = {"aln": mask_map(nets.corruption, x, segments, superpixels).cpu().numpy()}
    if baselines:
        clean = nets.clean_classifier
        maps["gradient"] = blur(gradient_saliency(clean, x, labels).cpu().numpy())
        maps["lrp"] = blur(layerwise_relevance(clean, x, labels).cpu().numpy())
        maps["cam"] = class_activation_map(clean, x, labels).cpu().numpy()
        maps["layercam"] = evidence(clean, x, labels, segments, superpixels).cpu().numpy()
    return columns, maps


def network_says(
    network: Network, images: Tensor, labels: Tensor, *, crops: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same of a network from elsewhere."""
    with torch.no_grad():
        found = class_probabilities(
            lambda views: network_logits(network, views), prepare(network, images), crops=crops
        )
    classes, scores = top_classes(found)
    columns = {"network_classes": classes, "network_scores": scores}
    maps = network_maps(network, images, labels)
    return columns, {f"network_{name}": values for name, values in maps.items()}


def _load(config: PredictConfig, device: torch.device) -> tuple[list[Nets], Network | None]:
    runs = [load_nets(run) for run in config.runs]
    for nets in runs:
        for net in (nets.corruption, nets.classifier, nets.clean_classifier):
            net.to(device)
            torch.nn.utils.convert_conv2d_weight_memory_format(net, torch.channels_last)
    if config.network is None:
        return runs, None
    given = config.network
    manifest = read_manifest(config.data)
    network = load_network(given.name, given.weights, manifest.classes, given.classes, given.size)
    network.module.to(device)
    return runs, network


def predict_range(
    config: PredictConfig, truth: MapTruth, first: int, stop: int, use_gpu: bool
) -> Result:
    """Score what runs and network say of batches number first..stop-1 of the split.

    Returns a row per image: `row` (of the ledger), per classifier `X_classes` and `X_scores`, up
    to five, best first, and the columns of `score_maps`; and the maps' counts. Runs in a Ray task,
    on CUDA where the task was given a GPU. Sets the process to one thread and to deterministic
    kernels. Raises UserError for nets that give no finite map.
    """
    from pipeline.loading.loader import Loader

    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda" if use_gpu else "cpu")
    manifest = read_manifest(config.data)
    runs, network = _load(config, device)
    scored = Scored()
    cache = CacheConfig(folder=config.cache, limit_bytes=config.cache_bytes)
    loader = Loader(config.data, manifest, device, cache)
    for batch in loader.evaluation(config.split, config.batch_size, first, stop):
        rows = batch.rows.cpu().numpy()
        images = np.searchsorted(truth.rows, rows)
        said = [
            (
                suffix(i),
                net_maps(
                    nets,
                    batch.images,
                    batch.segments,
                    batch.labels,
                    manifest.max_superpixels,
                    baselines=config.baselines,
                    crops=config.ten_crops,
                ),
            )
            for i, nets in enumerate(runs)
        ]
        if network is not None:
            said.append(
                ("", network_says(network, batch.images, batch.labels, crops=config.ten_crops))
            )
        scored.add("row", rows)
        for end, (columns, maps) in said:
            for name, values in columns.items():
                scored.add(_with_suffix(name, end), values)
            for name, values in maps.items():
                try:
                    score_maps(scored, name + end, values, images, truth, rules=tuple(RULES))
                except ValueError as error:
                    raise UserError(
                        f"ledger rows {rows[0]} to {rows[-1]} of {config.data}: {error}"
                    ) from None
                if config.export is not None:
                    _export(config.export / (name + end), values, images, truth)
    return scored.table(), scored.counts


def _with_suffix(column: str, end: str) -> str:
    """clean_classifier_classes -> clean_classifier_2_classes."""
    net, what = column.rsplit("_", 1)
    return f"{net}{end}_{what}"


def _export(folder: Path, maps: np.ndarray, images: np.ndarray, truth: MapTruth) -> None:
    for values, image in zip(stretch(maps), images.tolist(), strict=True):
        write_score_map(folder, truth.ids[image].as_py(), values)


def score_map_range(
    root: Path, size: tuple[int, int], truth: MapTruth, first: int, stop: int
) -> Result:
    """Score others' score maps of images number first..stop-1, as `predict_range` does.

    size: (height, width) that all maps must have. Raises UserError for a map that is missing,
    of another size, or with values that are none.
    """
    scored = Scored()
    for start in range(first, stop, MAPS_AT_ONCE):
        images = np.arange(start, min(start + MAPS_AT_ONCE, stop))
        maps = [read_score_map(score_map_path(root, truth.ids[i].as_py()), size) for i in images]
        scored.add("row", images)
        score_maps(scored, "score_maps", np.stack(maps), images, truth, own=False)
    return scored.table(), scored.counts


def ranges(total: int, parts: int) -> list[tuple[int, int]]:
    """0..total-1 in `parts` runs [first, stop) that differ by one at most; fewer where there are
    fewer."""
    parts = min(parts, total)
    return [(total * i // parts, total * (i + 1) // parts) for i in range(parts)]


def gpus_and_workers(workers: int | None) -> tuple[int, int]:
    """GPUs of the initialized Ray, and tasks at once: as given, or four per GPU, or one per CPU."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    return gpus, workers or int(gpus / GPU_SHARE) or max(1, int(resources.get("CPU", 1)))


def run_parts(
    submit: Callable[[int, int], ray.ObjectRef],
    parts: list[tuple[int, int]],
    workers: int,
    progress: Callable[[int, int], None],
) -> Result:
    """The merged results of `submit(first, stop)` over all parts, at most `workers` under way.

    progress: called with the units done and all of them. Raises the UserError or UserError of a
    task as it is, when the other tasks have been stopped; Ray itself repeats tasks whose worker
    died.
    """
    waiting, total, done = deque(parts), parts[-1][1], 0
    running: dict[ray.ObjectRef, tuple[int, int]] = {}
    tables: list[pa.Table] = []
    counts: dict[str, MapCounts] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                part = waiting.popleft()
                running[submit(*part)] = part
            (reference,), _ = ray.wait(list(running), num_returns=1)
            first, stop = running.pop(reference)
            try:
                table, part_counts = ray.get(reference)
            except RayTaskError as error:
                if isinstance(error.cause, UserError | UserError):
                    raise error.cause from None
                raise
            tables.append(table)
            for name, added in part_counts.items():
                counts[name] = counts[name] + added if name in counts else added
            done += stop - first
            progress(done, total)
    finally:  # where one part failed: the others are stopped, and their results looked at
        left, force = list(running), False
        while left:
            for reference in left:
                ray.cancel(reference, force=force)
            ended, left = ray.wait(left, num_returns=len(left), timeout=CANCEL_SECONDS)
            for reference in ended:
                with suppress(RayError):
                    ray.get(reference)
            force = True  # workers of a job that a script started with & ignore interrupts
    return pa.concat_tables(tables).sort_by("row"), counts
