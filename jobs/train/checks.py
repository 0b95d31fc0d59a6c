"""What is checked before a training starts: its data, and whose output folder it is."""

import hashlib
import json
import platform
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jobs import cli
from jobs.runs import RUN_NAME, exclusive_run
from jobs.train.checkpoints import newest_step, read_warmup
from jobs.train.config import TrainConfig, by_flag
from jobs.train.state import TrainingError
from model.corruption import STRIDE
from pipeline.errors import UserError
from pipeline.loading.cache import ShardCache, check_window
from pipeline.loading.order import Order, steps_per_epoch
from pipeline.loading.samples import Samples, verify_shard
from pipeline.shards.format import Manifest, check_sizes, manifest_hash, split_of
from pipeline.storage import is_file, is_remote, join, read_bytes, write_atomically

RUN_FORMAT = 2
HASHES = ("data_sha256", "images_sha256", "shuffle_window")
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


def read_run(run: str) -> dict[str, Any]:
    """Read RUN/run.json. Raises UserError for a damaged one, or a run of an earlier version."""
    path = join(run, RUN_NAME)
    data = read_bytes(path)
    try:
        content = json.loads(data)
        number = content.get("format", 1)
        if number == RUN_FORMAT:
            content["configuration"]["nets"].items()
            return content | {name: content[name] for name in HASHES}
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}); copy it again, or train anew in another --output"
        ) from error
    raise UserError(
        f"{path} is of format {number}; this program reads {RUN_FORMAT}. Train anew in another "
        "--output"
    )


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


def check_output(output: str, content: dict[str, Any]) -> None:
    """Raise UserError for an output folder of another training."""
    if is_file(join(output, RUN_NAME)):
        changed = changes(read_run(output), content)
        if changed:
            raise UserError(
                f"{output} holds a run of another configuration: {', '.join(changed)}. "
                "Use a new --output, or the same flags to go on with that run."
            )
    elif is_file(output):
        raise UserError(f"--output {output} is a file; give a folder")
    elif newest_step(output) is not None:
        raise UserError(
            f"{output} holds checkpoints but no {RUN_NAME}, so their flags are unknown. Remove the "
            "folder, or use a new --output"
        )


@contextmanager
def claimed_output(output: str, content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Keep other trainings from the output folder, and write its run.json where there is none yet.
    Yields what that says. Raises UserError for a folder of another training, or of one at work."""
    check_output(output, content)
    with exclusive_run(output):
        check_output(output, content)
        path = join(output, RUN_NAME)
        if not is_file(path):
            own = content | {"id": uuid.uuid4().hex}
            write_atomically(path, (json.dumps(own, indent=1) + "\n").encode())
        yield read_run(output)


def check_own(output: str, run: Mapping[str, Any]) -> None:
    """Raise UserError where the folder is no longer of this run: after the head's death workers go
    on for a minute, in which a user may have removed the folder or begun another run there."""
    if not is_file(join(output, RUN_NAME)) or read_run(output).get("id") != run.get("id"):
        raise UserError(
            f"{join(output, RUN_NAME)} is not this training's any more; it ends without writing"
        )


def check_same_data(data: str, run: Mapping[str, Any]) -> None:
    """Raise UserError where this host finds another set there than the run is of."""
    if manifest_hash(data) != run["data_sha256"]:
        raise UserError(
            f"host {platform.node()} finds another set at {data} than the run is of: give a folder "
            "that all hosts mount, restore the set, or train anew in another --output"
        )


def check_warmup(config: TrainConfig, manifest: Manifest) -> None:
    """Raise UserError where the run of --warmup-from does not fit: other images, other nets,
    or no checkpoint past its warm-up."""
    run = config.optimization.warmup_from
    if run is None:
        return
    if not is_file(join(run, RUN_NAME)):
        raise UserError(f"--warmup-from {run} holds no {RUN_NAME}: it is no run of jobs.train")
    other = read_run(run)
    network = other["configuration"]["nets"].get("network")  # absent from older runs
    if network is not None:
        raise UserError(
            f"--warmup-from {run} has nets over {network}, whose warm-up trains the corruption net "
            "too. Give a run with nets from scratch, or leave the flag out"
        )
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
    if newest_step(config.output) is None:
        try:
            read_warmup(run)
        except TrainingError as error:
            raise UserError(str(error)) from error


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
    images = split_of(manifest, "train").images
    steps_per_epoch(images, order.batch_size, most_workers)  # raises where a worker goes empty
    check_window(loading.data, manifest, cache_config.limit_bytes, order, most_workers)
    check_sizes(loading.data, manifest, "train")
    if not is_remote(loading.data):
        cache = ShardCache(loading.data, manifest, "train", cache_config)
        samples = Samples(manifest, "train", cache)
        for number, shard in enumerate(samples.shards):
            if config.resources.verify_shards:
                verify_shard(cache.path(number), shard)
            samples.open(number)
