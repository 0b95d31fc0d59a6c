"""`python -m jobs.train`: adversarial training on Ray Train, resumable by the same command."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.runs import MODEL_NAME
from jobs.train.config import PRESETS, TrainConfig, by_flag
from jobs.train.launch import launch
from jobs.train.log import summary, waiting_summary
from model.corruption import STRIDE
from pipeline.errors import UserError
from pipeline.loading.cache import ShardCache, check_window
from pipeline.loading.order import Order
from pipeline.loading.samples import Samples, verify_shard
from pipeline.shards.format import Manifest, check_sizes, manifest_hash, read_manifest, split_of
from pipeline.storage import absolute, is_remote, write_atomically

RUN_NAME = "run.json"
RUN_FORMAT = 2
FREE_TO_CHANGE = ("output", "preset", "resources", "logging", "data", "cache", "cache_limit")


def images_hash(manifest: Manifest) -> str:
    """Return the SHA-256, as hexadecimal digits, of what a clean classifier depends on. Sets that
    differ in their superpixels alone have the same."""
    images = split_of(manifest, "train").images
    parts = (manifest.classes, manifest.height, manifest.width, manifest.mean, manifest.std, images)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def describe_run(config: TrainConfig, manifest: Manifest, record: dict[str, Any]) -> dict[str, Any]:
    """Return the content of run.json: the record and what else a training depends on. Batches,
    crops and mask samples depend on neither the number of workers nor where the set lies, but on
    how many shards of a remote one the cache lets be shuffled together."""
    return {
        "format": RUN_FORMAT,
        **record,
        "data_sha256": manifest_hash(config.loading.data),
        "images_sha256": images_hash(manifest),
        "shuffle_window": config.loading.window(manifest),
    }


def read_run(run: Path) -> dict[str, Any]:
    """Read RUN/run.json. Raises UserError for a run of an earlier version."""
    content = json.loads((run / RUN_NAME).read_text())
    if content.get("format") != RUN_FORMAT:
        raise UserError(
            f"{run / RUN_NAME} is of format {content.get('format', 1)}; this program reads "
            f"{RUN_FORMAT}. Train anew in another --output"
        )
    return content


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return in words where two contents of run.json are of different trainings."""
    old, new = (
        by_flag({k: v for k, v in run["configuration"].items() if k not in FREE_TO_CHANGE})
        for run in (before, now)
    )
    words = [
        f"{name} (there {old.get(name)}, now {value})"
        for name, value in new.items()
        if name not in FREE_TO_CHANGE and old.get(name) != value
    ]
    if before["data_sha256"] != now["data_sha256"]:
        words.append("the data set (its dataset.json is another)")
    there, window = (run["shuffle_window"] or "all" for run in (before, now))
    if there != window:
        words.append(
            f"the shards shuffled together (there {there}, now {window}, which follows from "
            "--cache-limit)"
        )
    return words


def claim_output(output: Path, content: dict[str, Any]) -> None:
    """Write RUN/run.json, where there is none yet. Raises UserError for an output folder of
    another training."""
    path = output / RUN_NAME
    if path.exists():
        changed = changes(read_run(output), content)
        if changed:
            raise UserError(
                f"{output} holds a run of another configuration: {', '.join(changed)}. "
                "Use a new --output, or the same flags to go on with that run."
            )
        return
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def check_warmup(config: TrainConfig, manifest: Manifest) -> None:
    """Raise UserError where the run of --warmup-from does not fit: other images or other nets."""
    run = config.optimization.warmup_from
    if run is None:
        return
    if not (run / RUN_NAME).is_file():
        raise UserError(f"--warmup-from {run} holds no {RUN_NAME}: it is no run of jobs.train")
    other = read_run(run)
    if other["images_sha256"] != images_hash(manifest):
        raise UserError(
            f"--warmup-from {run} was trained on other images than {config.loading.data} holds "
            "(classes, size, mean, deviation or number differ). Warm up on this set"
        )
    for name in ("net_width", "residual_blocks"):
        theirs, ours = other["configuration"]["nets"][name], getattr(config.nets, name)
        if theirs != ours:
            raise UserError(
                f"--warmup-from {run} has {cli.flag(name)} {theirs}, not {ours}; give the same, or "
                "warm up anew"
            )


def check_data(config: TrainConfig, manifest: Manifest) -> None:
    """Raise UserError for shards that are damaged or that the nets cannot be trained on. Those of
    a remote set are checked by their hash as they come."""
    loading, target, classes = config.loading, config.balance.target, len(manifest.classes)
    if config.nets.network is None and (manifest.height % STRIDE or manifest.width % STRIDE):
        raise UserError(
            f"the shards' images have {manifest.height} x {manifest.width} pixels; the corruption "
            f"net needs multiples of {STRIDE}. Preprocess again with another --image-size"
        )
    if classes < 2:
        raise UserError(
            f"the set has {classes} class; a classifier needs at least two to tell apart"
        )
    if target is not None and target <= 1 / classes:
        raise UserError(
            f"a target accuracy of {target} is not above chance for {classes} classes "
            f"({1 / classes:.3f}); give a higher --target (the paper's 0.1 is for 1000 classes)"
        )
    cache_config = loading.cache_config()
    order = Order(batch_size=config.optimization.batch_size, window=loading.window(manifest))
    _, most_workers = config.resources.worker_range
    check_window(loading.data, manifest, cache_config.limit_bytes, order, most_workers)
    check_sizes(loading.data, manifest, "train")
    if not is_remote(loading.data):
        cache = ShardCache(loading.data, manifest, "train", cache_config)
        samples = Samples(manifest, "train", cache)
        for number, shard in enumerate(samples.shards):
            if config.resources.verify_shards:
                verify_shard(cache.path(number), shard)
            samples.open(number)


def train(config: TrainConfig) -> None:
    """Train to the end, from the last checkpoint where there is one. Raises UserError with the
    cause where training cannot go on."""
    loading = replace(config.loading, data=absolute(config.loading.data))
    warmup_from = config.optimization.warmup_from
    optimization = replace(config.optimization, warmup_from=warmup_from and warmup_from.resolve())
    output = config.output.resolve()
    config = replace(config, output=output, loading=loading, optimization=optimization)
    manifest = read_manifest(config.loading.data)
    check_data(config, manifest)
    check_warmup(config, manifest)
    record = cli.record(config)
    claim_output(output, describe_run(config, manifest, record))
    if (output / MODEL_NAME).exists():
        print(f"{output / MODEL_NAME} is there already: nothing left to train")
        return
    cli.connect_ray()
    launch(config, record)
    print(summary(output), waiting_summary(output), sep="\n")
    print(f"trained nets: {output / MODEL_NAME}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with its flags (`--help` lists them)."""
    train(cli.parse(TrainConfig, argv, __doc__ or "", PRESETS, {"network": "photos"}))


if __name__ == "__main__":
    cli.run(main)
