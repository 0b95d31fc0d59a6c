"""Evaluation as a whole: what is asked for, the ground truth, what is said of it, the figures."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray

from jobs.cli import connect_ray, option
from jobs.evaluate.maps import MapCounts, MapTruth, map_truth
from jobs.evaluate.rows import (
    PAPER,
    Method,
    best_known_classes,
    network_methods,
    ordered,
    run_methods,
)
from jobs.evaluate.scoring import (
    Boxes,
    Predictions,
    add_constant_boxes,
    add_guesses,
    add_mean_map,
    centred_shares,
    check_coverage,
    joined,
    matrix,
    score,
)
from jobs.evaluate.tasks import (
    GPU_SHARE,
    TASKS_PER_WORKER,
    TOP,
    NetworkConfig,
    PredictConfig,
    gpus_and_workers,
    predict_range,
    ranges,
    run_parts,
    score_map_range,
)
from jobs.runs import MODEL_NAME, ModelConfig, load_nets
from model.localization import RULE_TEXTS
from pipeline.errors import UserError
from pipeline.evaluation.formats import (
    read_guesses,
    read_score_map,
    read_top_classes,
    score_map_path,
)
from pipeline.evaluation.metrics import SUBSETS
from pipeline.evaluation.protocols import PROTOCOLS, SIDE
from pipeline.evaluation.truth import (
    GroundTruth,
    ground_truth_of,
    read_ground_truth,
)
from pipeline.loading.cache import DEFAULT_LIMIT, GIB
from pipeline.shards.format import Manifest, read_manifest, sha256_file, split_of
from pipeline.shards.ledger import read_ledger

NO_SIZES = "give --image-sizes FILE (lines id,width,height)"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, on what, and how it is divided."""

    data: str | None = option(None, help="shards that jobs.preprocess wrote: a folder, or a URI")
    cache: Path | None = option(
        None, help="folder for shards of remote --data (default: in the user's cache folder)"
    )
    cache_limit: float = option(DEFAULT_LIMIT, help="GiB that the files in it may take together")
    run: tuple[Path, ...] = option(
        (), help="folder of a finished jobs.train; a second one is compared with the first"
    )
    ground_truth: Path | None = option(
        None,
        help="instead of --data: a folder of wsolevaluation metadata or of ILSVRC XML files, or a "
        "Kaggle solution CSV",
    )
    output: Path = option(help="folder for predictions.parquet, metrics.json and report.html")
    split: str = option("val", help="split of --data to evaluate")
    protocol: Literal["devkit", "exclusive", "int224"] = option(
        "devkit", help="; ".join(f"{name}: {p.text}" for name, p in PROTOCOLS.items())
    )
    baselines: bool = option(
        True, help="also CAM, LayerCAM, gradient saliency and LRP, from the clean classifier"
    )
    ten_crops: bool = option(
        False,
        help="classes (not maps) of the runs and of --network from ten crops of each image, their "
        "probabilities averaged: corners and centre, 7/8 of the sides, each also mirrored",
    )
    score_maps: Path | None = option(
        None, help="folder of score maps ID.npy in [0, 1], all of one size, scored as a row"
    )
    predictions: Path | None = option(
        None, help="boxes with classes, scored as a row: Kaggle .csv, or .parquet"
    )
    classifier: Path | None = option(
        None,
        help="another classifier's best classes (CSV or Parquet), for a row with ALN's boxes, and "
        "without --run for all rows that have none of their own",
    )
    network: str | None = option(
        None, help="also rows from a network, e.g. torchvision:resnet50 or timm:resnet50"
    )
    network_weights: Path | None = option(None, help="weights file of --network")
    network_classes: Path | None = option(
        None, help="a wnid per line, in the order of --network's outputs (default: the data's)"
    )
    network_size: int | None = option(
        None, help="side in pixels that --network is fed (default: its own)"
    )
    classes: Path | None = option(
        None,
        help="a wnid per line (LOC_synset_mapping.txt), where the ground truth has numbers only",
    )
    image_sizes: Path | None = option(
        None, help="lines id,width,height, where the ground truth has none (a Kaggle CSV)"
    )
    centred_box: tuple[float, ...] | None = option(
        None, help="height and width of the centred box as shares (default: best on train boxes)"
    )
    export: Path | None = option(
        None, help="folder for our own score maps and boxes in the formats of others"
    )
    batch_size: int = option(100, help="images the nets see at once")
    workers: int | None = option(
        None, help="Ray tasks at once (default: one per CPU, or four per GPU where there are any)"
    )
    shards: int | None = option(
        None, help="parts the split is cut into, at most one per batch (default: 4 per worker)"
    )
    seed: int = option(0, help="of the bootstrap, of whose box is another's, of random pictures")

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers", "shards", "network_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not 0 < self.cache_limit < float("inf"):
            raise ValueError(f"--cache-limit {self.cache_limit} must be above 0 (GiB)")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must be at least 0")
        if (self.data is None) == (self.ground_truth is None):
            raise ValueError("give either --data (shards) or --ground-truth (files), one of them")
        for name in ("run", "network"):
            if getattr(self, name) and self.data is None:
                raise ValueError(f"--{name} needs images: give --data SHARDS")
        if len(self.run) > 2:
            raise ValueError(f"--run was given {len(self.run)} times; at most two are compared")
        if bool(self.network) != bool(self.network_weights):
            raise ValueError("--network and --network-weights need each other")
        if self.classifier and self.network and not self.run:
            raise ValueError(
                "--classifier beside --network needs --run: without ALN's boxes no row would have "
                "its classes; leave one of them out"
            )
        if self.export and not self.run:
            raise ValueError("--export writes what our nets predict: it needs --run")
        if self.ten_crops and not (self.run or self.network):
            raise ValueError(
                "--ten-crops is about the classes of nets: it needs --run or --network"
            )
        shares = self.centred_box or (1.0,)
        if len(shares) > 2 or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"--centred-box {shares} must be one or two shares in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """predictions: a row per image in the ground truth's order, see `jobs.scoring.joined`.
    metrics: the content of metrics.json but for the run's record. truth, said: what was scored."""

    predictions: pa.Table
    metrics: dict[str, Any]
    truth: GroundTruth
    said: Predictions


def check_compatible(run: Path, config: ModelConfig, data: str, manifest: Manifest) -> None:
    """Raise UserError, in one line, where nets and shards differ in classes or image size."""
    if config.classes != manifest.classes:
        both = set(config.classes) & set(manifest.classes)
        raise UserError(
            f"checkpoint and shards with different classes: {run} knows {len(config.classes)}, "
            f"{data} has {len(manifest.classes)}, {len(both)} of them in common; class indices "
            "would not mean the same. Evaluate on shards of the set that the run was trained on."
        )
    if (config.height, config.width) != (manifest.height, manifest.width):
        raise UserError(
            f"checkpoint and shards with different image sizes: {run} was trained at "
            f"{config.height}x{config.width}, {data} holds {manifest.height}x{manifest.width}. "
            f"Preprocess with --image-size {config.height}."
        )
    asked, compactness = (
        manifest.configuration["superpixels"],
        manifest.configuration["compactness"],
    )
    if (
        max(manifest.max_superpixels, asked) != config.superpixels
        or compactness != config.compactness
    ):
        raise UserError(
            f"checkpoint and shards with different superpixels: {run} was trained with "
            f"{config.superpixels} at compactness {config.compactness}, {data} has {asked} at "
            f"{compactness}; the masks would mean something else. Preprocess with --superpixels "
            f"{config.superpixels} --compactness {config.compactness}."
        )


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What is scored against. table: a row per image, which the predictions' columns join.
    maps: None where image sizes are unknown."""

    manifest: Manifest | None
    truth: GroundTruth
    table: pa.Table
    maps: MapTruth | None


def _inputs(config: EvaluateConfig) -> _Inputs:
    manifest = None
    if config.data is not None:
        manifest = read_manifest(config.data)
        if not split_of(manifest, config.split).images:
            raise UserError(
                f"split {config.split!r} of {config.data} has no images: nothing to evaluate."
            )
        for run in config.run:
            check_compatible(run, load_nets(run).config, config.data, manifest)
        names = ["row", "key", "id", "label", "shard", "width", "height", "boxes"]
        table = read_ledger(config.data, config.split, names)
        truth = ground_truth_of(table, manifest.classes, manifest.class_names)
    else:
        assert config.ground_truth is not None
        truth = read_ground_truth(
            config.ground_truth, image_sizes=config.image_sizes, classes=config.classes
        )
        rows = np.arange(len(truth.ids))
        table = pa.table({"row": rows, "id": list(truth.ids), "label": truth.labels})
    maps = None
    if truth.sizes is not None:
        maps = map_truth(truth, table["row"].to_numpy(), config.protocol, config.seed)
    elif config.score_maps is not None or config.protocol == "int224":
        raise UserError(
            f"{config.ground_truth} holds no image sizes, without which maps have no place and "
            f"images cannot be carried to {SIDE} px; {NO_SIZES}."
        )
    return _Inputs(manifest=manifest, truth=truth, table=table, maps=maps)


def _take(
    said: Predictions, table: pa.Table, counts: dict[str, MapCounts], grid: np.ndarray
) -> None:
    """Take a task's columns over: boxes, AUCs, classes and counts by name."""
    for column in table.column_names:
        name, _, what = column.rpartition("_")
        if what == "box":
            said.boxes[name] = Boxes(
                boxes=matrix(table, column).astype(np.int64),
                grid=grid,
                found=table[f"{name}_found"].to_numpy(),
            )
        elif what == "classes":
            said.classes[name] = matrix(table, column).astype(np.int64)
        elif what == "auc":
            said.aucs[name] = (table[column].to_numpy(), table[f"{column}_other"].to_numpy())
    said.counts |= counts


def _add_nets(
    said: Predictions,
    config: EvaluateConfig,
    inputs: _Inputs,
    progress: Callable[[int, int], None],
) -> pa.Table:
    """What runs and network say of every image; returns the table with their classes."""
    assert config.data is not None
    assert inputs.manifest is not None
    connect_ray()
    network = None
    if config.network is not None and config.network_weights is not None:
        network = NetworkConfig(
            name=config.network,
            weights=config.network_weights,
            classes=config.network_classes,
            size=config.network_size,
        )
    asked = PredictConfig(
        data=config.data,
        split=config.split,
        runs=config.run,
        network=network,
        cache=config.cache,
        cache_bytes=round(config.cache_limit * GIB),
        batch_size=config.batch_size,
        baselines=config.baselines,
        ten_crops=config.ten_crops,
        export=None if config.export is None else config.export / "score_maps",
    )
    gpus, workers = gpus_and_workers(config.workers)
    task = ray.remote(num_cpus=1, num_gpus=GPU_SHARE if gpus else 0)(predict_range)
    shared = ray.put(inputs.maps)
    batches = -(-len(inputs.truth.ids) // config.batch_size)
    table, counts = run_parts(
        lambda first, stop: task.remote(asked, shared, first, stop, gpus > 0),
        ranges(batches, config.shards or TASKS_PER_WORKER * workers),
        workers,
        progress,
    )
    check_coverage(table["row"].to_numpy(), inputs.table)
    _take(said, table, counts, np.array([inputs.manifest.height, inputs.manifest.width]))
    others = {"network": config.network, "other": "the given classifier"}
    known = {name: text for name, text in others.items() if text and name in said.classes}
    for number, run in enumerate(config.run):
        label = "" if len(config.run) == 1 else f" ({run.name})"
        said.methods |= run_methods(number, label, baselines=config.baselines, others=known)
    if config.network is not None:
        said.methods |= network_methods(config.network)
    joined_table = inputs.table
    for name in table.column_names:
        if name.endswith(("_classes", "_scores")):
            joined_table = joined_table.append_column(name, table[name])
    return joined_table


def _add_score_maps(
    said: Predictions,
    config: EvaluateConfig,
    truth: MapTruth,
    progress: Callable[[int, int], None],
) -> None:
    """The row of others' score maps."""
    root = config.score_maps
    assert root is not None
    first = read_score_map(score_map_path(root, truth.ids[0].as_py()), None)
    size = (SIDE, SIDE) if config.protocol == "int224" else (first.shape[0], first.shape[1])
    connect_ray()
    _, workers = gpus_and_workers(config.workers)
    task = ray.remote(num_cpus=1)(score_map_range)
    shared = ray.put(truth)
    table, counts = run_parts(
        lambda first, stop: task.remote(root, size, shared, first, stop),
        ranges(len(truth.rows), config.shards or TASKS_PER_WORKER * workers),
        workers,
        progress,
    )
    _take(said, table, counts, np.array(size))
    said.methods["score_maps"] = Method(
        title="Given score maps",
        box="score_maps",
        classes=best_known_classes(said.classes),
        map="score_maps",
    )


def evaluate(config: EvaluateConfig, progress: Callable[[int, int], None]) -> Evaluation:
    """Predict and score, over Ray where nets or maps are scored (see `connect_ray`); writes
    nothing but the score maps of `config.export`.

    Raises UserError or UserError, each of one line, for inputs that do not fit each other.
    """
    started = time.monotonic()
    inputs = _inputs(config)
    truth, table, said = inputs.truth, inputs.table, Predictions()
    if config.classifier is not None:
        said.classes["other"] = read_top_classes(config.classifier, truth)
    if config.predictions is not None:
        add_guesses(said, read_guesses(config.predictions, truth))
    if config.run or config.network:
        table = _add_nets(said, config, inputs, progress)
    centred: dict[str, Any] = {}
    if inputs.maps is not None:
        if config.score_maps is not None:
            _add_score_maps(said, config, inputs.maps, progress)
        known = best_known_classes(said.classes)
        shares, source = centred_shares(config.data, inputs.manifest, config.centred_box)
        add_constant_boxes(said, truth, shares, known, PAPER["whole_image"])
        centred = {"shares": {"height": shares[0], "width": shares[1]}, "source": source}
        maps = next((name for name in ("aln", "score_maps") if name in said.counts), None)
        if maps is not None:
            add_mean_map(said, maps, inputs.maps, known)
    if not said.methods:
        raise UserError(
            f"{config.ground_truth} holds no image sizes, so no constant box can be scored, and "
            f"there are no --predictions: nothing to evaluate; {NO_SIZES}."
        )
    said.methods = ordered(said.methods)
    methods = score(said, truth, protocol=config.protocol, seed=config.seed)
    if centred:
        methods["centred_box"] |= centred
    extra: dict[str, Any] = {}
    if inputs.manifest is not None:
        extra["rejected"] = split_of(inputs.manifest, config.split).rejected
        extra["data_configuration"] = inputs.manifest.configuration
    if truth.classes is not None:
        names = truth.class_names if truth.class_names is not None else truth.classes
        extra["class_names"] = dict(zip(truth.classes, names, strict=True))
    metrics = {
        "format": 1,
        "split": config.split if config.data is not None else None,
        "images": len(truth.ids),
        "with_boxes": int((np.diff(truth.starts) > 0).sum()),
        "protocol": config.protocol,
        "protocol_text": PROTOCOLS[config.protocol].text,
        "box_rule": f"{RULE_TEXTS['paper']}; box of the largest 8-connected component",
        "subsets": SUBSETS,
        "seed": config.seed,
        "runs": [str(run) for run in config.run],
        "methods": methods,
        **{name: _classifier_figures(said.classes[name], truth) for name in said.classes},
        **extra,
        "model_sha256": [sha256_file(run / MODEL_NAME) for run in config.run],
        "seconds": round(time.monotonic() - started, 2),
    }
    predictions = joined(said, truth, config.protocol, table)
    return Evaluation(predictions=predictions, metrics=metrics, truth=truth, said=said)


def _classifier_figures(classes: np.ndarray, truth: GroundTruth) -> dict[str, float]:
    hits = classes == truth.labels[:, None]
    return {f"top{k}": int(hits[:, :k].any(axis=1).sum()) / len(hits) for k in (1, TOP)}
