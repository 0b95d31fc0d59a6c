"""The tasks of an evaluation over Ray: batches of a split -> scored maps and classes. A split is
cut into batches in its own order, and the tasks take whole batches: what a net computes for an
image does not depend on the number of tasks, so neither do the figures."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import ray
import torch
from torch import Tensor

from jobs.cli import check_hosts, connect_ray
from jobs.evaluate.config import EvaluateConfig
from jobs.evaluate.maps import NetworkSource, RunSource
from jobs.evaluate.scorer import MapTruth, Part, score_maps
from jobs.networks import load_network
from jobs.runs import MODEL_NAME, load_nets, model_hash
from model.localization import RULES
from pipeline.errors import NAMED, UserError
from pipeline.evaluation.protocols import TOP
from pipeline.evaluation.results import maps_bytes
from pipeline.evaluation.sweep import quantize, stretch
from pipeline.loading.cache import GIB, CacheConfig
from pipeline.shards.format import MANIFEST_NAME, Manifest, manifest_hash, read_manifest
from pipeline.storage import join
from pipeline.tasks import Failure, run_tasks

if TYPE_CHECKING:  # importing it needs DALI, which tasks alone do
    from pipeline.loading.loader import Batch

TASKS_PER_WORKER = 4  # so that the progress line moves
GPU_SHARE = 0.25  # at most: while one task finds boxes on its core, the nets of others run


def set_up_process(use_gpu: bool) -> torch.device:
    """Set the process to one thread and to deterministic kernels, and return its device."""
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not
    torch.use_deterministic_algorithms(True)
    return torch.device("cuda" if use_gpu else "cpu")


def load_source(
    config: EvaluateConfig, manifest: Manifest, device: torch.device
) -> RunSource | NetworkSource:
    """Read the run's nets or the network onto the device. Raises UserError."""
    superpixels = manifest.max_superpixels
    if config.network is not None:
        network = load_network(
            config.network,
            manifest.classes,
            manifest.class_names,
            weights=config.network_weights,
            network_classes=config.network_classes,
            size=config.network_size,
        )
        if network.new_classes:
            raise UserError(
                f"{config.network} does not know {len(network.new_classes)} of the "
                f"{len(manifest.classes)} classes of {config.data}: "
                f"{', '.join(network.new_classes[:NAMED])}. Evaluate a network that knows them, or "
                "give --network-classes FILE."
            )
        network.classifier.to(device)
        return NetworkSource(network=network, superpixels=superpixels, crops=config.ten_crops)
    assert config.run is not None
    nets = load_nets(config.run, accurate=config.accurate)
    for net in nets.modules().values():
        net.to(device)
        torch.nn.utils.convert_conv2d_weight_memory_format(net, torch.channels_last)
    return RunSource(
        nets=nets,
        superpixels=superpixels,
        baselines=config.baselines,
        crops=config.ten_crops,
    )


def top_classes(probabilities: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return up to five best classes [B, 5] and their probabilities; equal ones in index order."""
    scores, classes = probabilities.sort(dim=1, descending=True, stable=True)
    return classes[:, :TOP].cpu().numpy(), scores[:, :TOP].cpu().numpy()


def read_files(config: EvaluateConfig) -> dict[str, str]:
    """Return the SHA-256 of what an evaluation reads everywhere, by location."""
    assert config.data is not None
    hashes = {join(config.data, MANIFEST_NAME): manifest_hash(config.data)}
    if config.run is not None:
        hashes[join(config.run, MODEL_NAME)] = model_hash(config.run)
    return hashes


def score_range(
    config: EvaluateConfig,
    truth: MapTruth,
    first: int,
    stop: int,
    use_gpu: bool,
    hashes: dict[str, str],
) -> Part:
    """Score what the source makes of batches number first..stop-1 of the split. Runs in a Ray task,
    on CUDA where the task was given a GPU. hashes: what `read_files` gave the driver. Raises
    UserError for other files on this host, and for nets that give no finite map."""
    from pipeline.loading.loader import Loader

    assert config.data is not None
    for path, value in read_files(config).items():
        if value != hashes[path]:
            raise UserError(
                f"host {platform.node()} finds another {path} than the host of the command; give a "
                "folder that all hosts mount, or a URI (s3://...)"
            )
    device = set_up_process(use_gpu)
    manifest = read_manifest(config.data)
    source = load_source(config, manifest, device)
    cache = CacheConfig(folder=config.cache, limit_bytes=round(config.cache_limit * GIB))
    loader = Loader(config.data, manifest, device, cache)
    parts: Part | None = None
    main_levels: list[np.ndarray] = []
    for batch in loader.evaluation(config.split, config.batch_size, first, stop):
        part, levels = score_batch(config, source, batch, truth)
        parts = part if parts is None else parts + part
        main_levels.append(levels)
    assert parts is not None
    images = np.searchsorted(truth.rows, parts.rows)
    return replace(parts, file=maps_bytes(source.main_map, images, np.concatenate(main_levels)))


def score_batch(
    config: EvaluateConfig, source: RunSource | NetworkSource, batch: "Batch", truth: MapTruth
) -> tuple[Part, np.ndarray]:
    """Return what the source makes of a batch, and its main maps: uint8 [B, H, W]."""
    rows = batch.rows.cpu().numpy()
    images = np.searchsorted(truth.rows, rows)
    probabilities, maps = source.predict(batch)
    best = {name: top_classes(values) for name, values in probabilities.items()}
    scored = {}
    for name, values in maps:
        try:
            levels = quantize(stretch(values))
            scored[name] = score_maps(values, levels, images, truth, tuple(RULES))
        except ValueError as error:
            raise UserError(
                f"ledger rows {rows[0]} to {rows[-1]} of {config.data}: {error}"
            ) from None
        if name == source.main_map:  # pictures show a mask's probabilities as they are
            main_levels = quantize(values.clip(0, 1)) if name == "aln" else levels
    part = Part(
        rows=rows,
        maps=scored,
        classes={name: classes for name, (classes, _) in best.items()},
        scores={name: scores for name, (_, scores) in best.items()},
    )
    return part, main_levels


def ranges(total: int, parts: int) -> list[tuple[int, int]]:
    """Cut 0..total-1 into `parts` ranges [first, stop) that differ by one at most; into fewer
    where there are fewer."""
    parts = min(parts, total)
    return [(total * i // parts, total * (i + 1) // parts) for i in range(parts)]


def shard_parts(
    config: EvaluateConfig, truth: MapTruth, progress: Callable[[int, int], None]
) -> Iterator[Part]:
    """Score the whole split in Ray tasks, and yield what each gives, as they end. progress: called
    with the images that are scored, and all, also while no task ends. Raises a task's UserError as
    it is, when the other tasks have been stopped."""
    connect_ray()
    assert config.data is not None
    hashes = read_files(config)
    check_hosts(*hashes)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    workers = config.workers or int(gpus / GPU_SHARE) or max(1, int(resources.get("CPU", 1)))
    batches = -(-len(truth.ids) // config.batch_size)
    shared, done = ray.put(truth), 0
    results = run_tasks(
        score_range,
        ranges(batches, config.shards or TASKS_PER_WORKER * workers),
        lambda part: (config, shared, *part, gpus > 0, hashes),
        workers,
        gpus=min(GPU_SHARE, gpus / workers),
        tick=lambda: progress(done, len(truth.ids)),
    )
    with closing(results):
        for _, result in results:
            if isinstance(result, Failure):
                raise result.error
            done += len(result.rows)
            yield result
