"""`python -m jobs.train`: adversarial training on Ray Train, resumable by the same command."""

import hashlib
import importlib.util
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.train import (
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from jobs import cli
from jobs.runs import MODEL_NAME
from jobs.train.config import PRESETS, TrainConfig
from jobs.train.log import METRICS_NAME, line, summary, waiting_summary
from model.corruption import STRIDE
from pipeline.errors import UserError
from pipeline.loading.cache import ShardCache, check_window
from pipeline.loading.order import Order
from pipeline.loading.samples import Samples, verify_shard
from pipeline.shards.format import Manifest, check_sizes, manifest_hash, read_manifest, split_of
from pipeline.storage import absolute, is_remote, write_atomically

RUN_NAME = "run.json"
RAY_NAME = "ray"  # Ray Train's own record of the run; checkpoints are ours
COLLECTIVE_TIMEOUT = 300  # seconds that ranks wait for one that died
FREE_TO_CHANGE = (
    *("output", "data", "cache", "cache_limit", "verify_shards"),
    *("workers", "device", "graphs", "log_interval", "max_failures", "preset"),
    *("checkpoint_interval", "keep_checkpoints", "collapse_steps", "stop_on_collapse", "mlflow"),
)


def images_hash(manifest: Manifest) -> str:
    """Hexadecimal SHA-256 of what a clean classifier depends on: classes, size, colour statistics
    and number of the train images. Sets that differ in their superpixels alone have the same."""
    images = split_of(manifest, "train").images
    seen = (manifest.classes, manifest.height, manifest.width, manifest.mean, manifest.std, images)
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def claim_output(config: TrainConfig, manifest: Manifest, record: dict[str, Any]) -> None:
    """Write RUN/run.json, or check that the one there is of the same training.

    The number of workers may change: batches, crops and mask samples do not depend on it. Nor do
    they on where the set lies, but for a remote one that the cache does not hold at once, of
    which as many shards are shuffled together as its limit allows: that number is kept here.
    Raises UserError for an output folder of another configuration or data set.
    """
    path = config.output / RUN_NAME
    hashed, window = manifest_hash(config.data), config.window(manifest)
    content = {
        **record,
        "data_sha256": hashed,
        "images_sha256": images_hash(manifest),
        "shuffle_window": window,
    }
    if path.exists():
        before = json.loads(path.read_text())
        old, new = before["configuration"], content["configuration"]
        changed = [
            f"{name} (there {old.get(name)}, now {new[name]})"
            for name in new
            if name not in FREE_TO_CHANGE and old.get(name) != new[name]
        ]
        if before["data_sha256"] != hashed:
            changed.append("the data set (its dataset.json is another)")
        if before.get("shuffle_window") != window:
            changed.append(
                f"the shards shuffled together (there {before.get('shuffle_window') or 'all'}, "
                f"now {window or 'all'}, which follows from --cache-limit)"
            )
        if changed:
            raise UserError(
                f"{config.output} holds a run of another configuration: {', '.join(changed)}. "
                "Use a new --output, or the same flags to go on with that run."
            )
        return
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"--output {config.output} is a file; give a folder")
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def check_warmup(config: TrainConfig, manifest: Manifest) -> None:
    """Raise UserError where the run of --warmup-from does not fit: other images or other nets."""
    run = config.warmup_from
    if run is None:
        return
    if not (run / RUN_NAME).is_file():
        raise UserError(f"--warmup-from {run} holds no {RUN_NAME}: it is no run of jobs.train")
    other = json.loads((run / RUN_NAME).read_text())
    given = other["configuration"]
    if other.get("images_sha256") != images_hash(manifest):
        raise UserError(
            f"--warmup-from {run} was trained on other images than {config.data} holds (classes, "
            "size, mean, deviation or number differ, or the run is of an earlier version): its "
            "classifier may know other classes. Warm up on this set"
        )
    for name in ("net_width", "residual_blocks"):
        flag, here = f"--{name.replace('_', '-')}", getattr(config, name)
        if given[name] != here:
            raise UserError(
                f"--warmup-from {run} has nets of {flag} {given[name]}, not {here}; give the same, "
                "or warm up anew"
            )


def check_data(config: TrainConfig, manifest: Manifest) -> None:
    """Raise UserError or UserError, before anything starts, for shards that are damaged or that
    the nets cannot be trained on. Those of a remote set are checked by their hash as they come."""
    if manifest.height % STRIDE or manifest.width % STRIDE:
        raise UserError(
            f"the shards' images have {manifest.height} x {manifest.width} pixels; the corruption "
            f"net needs multiples of {STRIDE}. Preprocess again with another --image-size"
        )
    if len(manifest.classes) < 2:
        raise UserError(
            f"the set has {len(manifest.classes)} class; with fewer than two a classifier has "
            "nothing to tell apart, and no mask could confuse it"
        )
    if config.target is not None and config.target <= 1 / len(manifest.classes):
        raise UserError(
            f"a target accuracy of {config.target} is not above chance for {len(manifest.classes)} "
            f"classes ({1 / len(manifest.classes):.3f}), so masks would cover everything in vain; "
            "give a higher --target (the paper's 0.1 is for 1000 classes)"
        )
    check_window(
        config.data,
        manifest,
        config.cache_config().limit_bytes,
        Order(batch_size=config.batch_size, window=config.window(manifest)),
        config.most_workers,
    )
    check_sizes(config.data, manifest, "train")
    if not is_remote(config.data):
        cache = ShardCache(config.data, manifest, "train", config.cache_config())
        samples = Samples(manifest, "train", cache)
        for number, shard in enumerate(samples.shards):
            if config.verify_shards:
                verify_shard(cache.path(number), shard)
            samples.open(number)


def check_resources(config: TrainConfig) -> None:
    """Raise UserError where Ray Train would wait for ever: more workers than this machine's
    cores or GPUs. A cluster may still grow, so there it only says what it waits for."""
    resource = "GPU" if config.device == "cuda" else "CPU"
    available = int(ray.cluster_resources().get(resource, 0))
    if available >= config.fewest_workers:
        return
    if os.environ.get("RAY_ADDRESS"):
        print(f"waiting for {config.fewest_workers} {resource}s; the cluster has {available} now")
    else:
        raise UserError(
            f"--workers {config.workers} asks for as many {resource}s, this machine has "
            f"{available}: training would wait for ever. Lower --workers, or submit the job to a "
            "cluster"
        )


def follow(path: Path, stop: threading.Event) -> None:
    """Print the metrics file's new lines as they come, until told to stop.

    Training that goes on from a checkpoint replaces the file by its lines up to there, so lines
    are known by their text, which holds times, rather than by their place.
    """
    printed = set(path.read_text().splitlines()) if path.exists() else set()
    start, inode = 0, None
    stopping = False
    while not stopping:
        stopping = stop.wait(0.5)
        if not path.exists():
            continue
        with path.open() as file:
            if os.fstat(file.fileno()).st_ino != inode:
                start, inode = 0, os.fstat(file.fileno()).st_ino
            file.seek(start)
            whole, _, _ = file.read().rpartition("\n")
        start += len(whole) + 1 if whole else 0
        for text in whole.splitlines():
            if text not in printed:
                printed.add(text)
                print(line(json.loads(text)), flush=True)


def train(config: TrainConfig) -> None:
    """Train to the end, from the last checkpoint where there is one. Raises UserError with the
    cause where training cannot go on."""
    config = replace(
        config,
        data=absolute(config.data),
        output=config.output.resolve(),
        warmup_from=config.warmup_from and config.warmup_from.resolve(),
    )
    manifest = read_manifest(config.data)
    check_data(config, manifest)
    check_warmup(config, manifest)
    record = cli.record(config)
    claim_output(config, manifest, record)
    if config.mlflow is not None and importlib.util.find_spec("mlflow") is None:
        raise UserError("--mlflow needs the package mlflow: pip install mlflow-skinny")
    if (config.output / MODEL_NAME).exists():
        print(f"{config.output / MODEL_NAME} is there already: nothing left to train")
        return
    cli.connect_ray()
    check_resources(config)
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = config.device == "cuda" or (config.device == "auto" and gpus >= config.fewest_workers)
    fewest, most = config.fewest_workers, config.most_workers
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"config": config, "record": record},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT),
        scaling_config=ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most), use_gpu=use_gpu
        ),
        run_config=RunConfig(
            name=RAY_NAME,
            storage_path=str(config.output),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    stop = threading.Event()
    printer = threading.Thread(target=follow, args=(config.output / METRICS_NAME, stop))
    printer.start()
    try:
        failed = trainer.fit().return_value
    except SystemExit:  # how Ray Train answers Ctrl-C, once its workers have ended
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        reason = str(next(iter(failures.values()), error)).strip().splitlines()[-1]
        raise UserError(
            f"training failed {config.max_failures + 1} times, the last time with: {reason}. "
            "The same command goes on from the last checkpoint"
        ) from error
    finally:
        stop.set()
        printer.join()
    if failed is not None:
        raise UserError(failed)
    print(summary(config.output))
    print(waiting_summary(config.output))
    print(f"trained nets: {config.output / MODEL_NAME}")


def _train_worker(settings: dict[str, Any]) -> str | None:
    from jobs.train.trainer import train_worker

    return train_worker(settings)


def main() -> None:
    train(cli.parse(TrainConfig, None, __doc__ or "", PRESETS))


if __name__ == "__main__":
    cli.run(main)
