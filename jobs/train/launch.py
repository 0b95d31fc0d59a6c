"""Start Ray Train's workers, restart them after failures, and show the log as they write it."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.runs import LOG_NAME
from jobs.train.checkpoints import FAULT_NAME, REQUEST_NAME, way_on
from jobs.train.config import ResourcesConfig, TrainConfig
from pipeline.errors import UserError

RAY_NAME = "ray"  # Ray Train's own record of the run; checkpoints are ours
COLLECTIVE_TIMEOUT = 300  # seconds that ranks wait for one that died
POLL_SECONDS = 0.5
REQUEST_SECONDS = 15  # to finish a step and write a checkpoint, before an interruption ends all


def check_resources(resources: ResourcesConfig) -> None:
    """Raise UserError for more workers than this machine's cores or GPUs, for which Ray Train would
    wait for ever; a cluster may still grow."""
    resource = "GPU" if resources.device == "cuda" else "CPU"
    available, (fewest, _) = int(ray.cluster_resources().get(resource, 0)), resources.worker_range
    if available >= fewest:
        return
    if os.environ.get("RAY_ADDRESS"):
        print(f"waiting for {fewest} {resource}s; the cluster has {available}")
    else:
        raise UserError(
            f"--workers {resources.workers} asks for as many {resource}s, this machine has "
            f"{available}. Lower --workers, or submit the job to a cluster"
        )


@contextmanager
def following(path: Path) -> Iterator[None]:
    """Print what is appended to a file from now on, to its end when the context is left."""
    stop = threading.Event()
    with path.open("a+") as file:  # which stands at its end

        def copy() -> None:
            stopping = False
            while not stopping:
                stopping = stop.wait(POLL_SECONDS)
                sys.stdout.write(file.read())
                sys.stdout.flush()

        thread = threading.Thread(target=copy)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def launch(config: TrainConfig, record: dict[str, Any]) -> None:
    """Train to the end. Raises UserError with the cause where training cannot go on."""
    resources = config.resources
    fewest, most = resources.worker_range
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = resources.device == "cuda" or (resources.device == "auto" and gpus >= fewest)
    workers = fewest if fewest == most else (fewest, most)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config, "record": record},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=RAY_NAME,
            storage_path=str(config.output),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    try:
        with following(config.output / LOG_NAME):
            failure = _fit(trainer, config.output)
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        reason = str(next(iter(failures.values()), error)).strip().splitlines()[-1]
        raise UserError(
            f"training failed {resources.max_failures + 1} times, the last time with: {reason}. "
            f"{way_on(config.output).capitalize()}"
        ) from error
    if failure is not None:
        raise UserError(failure)


def _fit(trainer: TorchTrainer, run: Path) -> str | None:
    """Run Ray Train to its end and return what its workers return. An interruption first waits for
    a checkpoint. Raises TrainingFailedError."""
    request = run / REQUEST_NAME
    request.unlink(missing_ok=True)
    (run / FAULT_NAME).unlink(missing_ok=True)
    ended: Future[str | None] = Future()

    def fit() -> None:
        try:
            ended.set_result(trainer.fit().return_value)
        except BaseException as error:
            ended.set_exception(error)

    # In a thread: in the main one Ray Train would answer Ctrl-C itself, without a checkpoint.
    threading.Thread(target=fit, daemon=True).start()
    try:
        return ended.result()
    except KeyboardInterrupt:
        started = time.monotonic()
        request.touch()
        while request.exists() and not ended.done():
            if time.monotonic() - started > REQUEST_SECONDS:
                break
            time.sleep(POLL_SECONDS)
        ray.shutdown()
        request.unlink(missing_ok=True)
        print(way_on(run), file=sys.stderr)
        raise


def _work(settings: dict[str, Any]) -> str | None:
    # Imported in the worker: the driver needs no loader.
    from jobs.train.worker import train_worker

    return train_worker(settings["config"], settings["record"])
