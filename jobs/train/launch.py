"""Start Ray Train's workers, restart them after failures, and show the log as they write it."""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.runs import LOG_NAME
from jobs.train.checkpoints import FAULT_NAME, REQUEST_NAME, way_on
from jobs.train.cluster import Preparation, Watch
from jobs.train.config import ResourcesConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.storage import (
    UnreachableError,
    entries,
    is_file,
    is_remote,
    join,
    local_path,
    name,
    parent,
    read_bytes,
    remove,
    write_atomically,
)

COLLECTIVE_TIMEOUT = 300  # seconds that ranks wait for one that died
POLL_SECONDS = 0.5
REMOTE_SECONDS = 5.0  # between looks at an object
REQUEST_SECONDS = 15  # to finish a step and write a checkpoint, before an interruption ends all


def check_resources(resources: ResourcesConfig) -> None:
    """Raise UserError for more workers than this machine's cores or GPUs, for which Ray Train would
    wait for ever. On a cluster print what it waits for: Ray does not tell how far that can grow."""
    resource = "GPU" if resources.device == "cuda" else "CPU"
    available, (fewest, _) = int(ray.cluster_resources().get(resource, 0)), resources.worker_range
    if available >= fewest:
        return
    if os.environ.get("RAY_ADDRESS"):
        print(
            f"waiting for {fewest} {resource}s; the cluster has {available}. Start more hosts, or "
            "give fewer --workers: an autoscaler adds hosts only where it can have all of them"
        )
    else:
        raise UserError(
            f"--workers {resources.workers} asks for as many {resource}s, this machine has "
            f"{available}. Lower --workers, or submit the job to a cluster"
        )


@contextmanager
def following(path: str) -> Iterator[None]:
    """Print what is appended to a file from now on, to its end when the context is left."""
    stop = threading.Event()
    with ExitStack() as stack:
        if is_remote(path):
            read = appended(path)
        else:
            read = stack.enter_context(local_path(path).open("a+")).read  # which is at its end

        def copy() -> None:
            stopping = False
            while not stopping:
                stopping = stop.wait(REMOTE_SECONDS if is_remote(path) else POLL_SECONDS)
                sys.stdout.write(read())
                sys.stdout.flush()

        thread = threading.Thread(target=copy)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def appended(location: str) -> Callable[[], str]:
    """Return a function that reads what was appended to a remote file since its last call, and
    nothing while it cannot be reached."""

    def size() -> int:
        return entries(parent(location))[1].get(name(location), 0)

    position = size()

    def read() -> str:
        nonlocal position
        text = b""
        with suppress(UnreachableError):
            if size() > position:
                text = read_bytes(location)[position:]
                position += len(text)
        return text.decode(errors="replace")

    return read


def launch(config: TrainConfig, record: dict[str, Any], run: dict[str, Any]) -> None:
    """Train to the end. record: saved with the nets. run: what RUN/run.json says. Raises UserError
    with the cause where training cannot go on."""
    resources = config.resources
    fewest, most = resources.worker_range
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = resources.device == "cuda" or (resources.device == "auto" and gpus >= fewest)
    workers = fewest if fewest == most else (fewest, most)
    if not os.environ.get("RAY_ADDRESS"):  # this machine alone, which nobody drains
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        # Ray Train wants a folder for checkpoints, but these are ours.
        with tempfile.TemporaryDirectory() as empty, following(join(config.output, LOG_NAME)):
            trainer = TorchTrainer(
                _work,
                train_loop_config={"config": config, "record": record, "run": run},
                torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT),
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
                run_config=RunConfig(
                    storage_path=empty,
                    failure_config=FailureConfig(max_failures=resources.max_failures),
                    callbacks=[
                        Preparation(),
                        Watch(config.output, fewest, "GPU" if use_gpu else "CPU"),
                    ],
                ),
            )
            failure = _fit(trainer, config.output)
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        reason = str(next(iter(failures.values()), error)).strip().splitlines()[-1]
        raise UserError(
            f"training failed {resources.max_failures + 1} times, the last time with: {reason}. "
            f"{way_on(config.output).capitalize()}"
        ) from error
    except RayError as error:  # Ray Train's own process ended, as for want of memory
        reason = str(getattr(error, "cause", None) or error).splitlines()[0].rstrip(".")
        way = way_on(config.output).capitalize()
        raise UserError(f"Ray Train ended: {reason}. {way}") from error
    if failure is not None:
        raise UserError(failure)


def _fit(trainer: TorchTrainer, run: str) -> str | None:
    """Run Ray Train to its end and return what its workers return. An interruption first waits for
    a checkpoint. Raises TrainingFailedError."""
    request = join(run, REQUEST_NAME)
    remove(request)
    remove(join(run, FAULT_NAME))
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
        write_atomically(request, b"")
        while is_file(request) and not ended.done():
            if time.monotonic() - started > REQUEST_SECONDS:
                break
            time.sleep(POLL_SECONDS)
        ray.shutdown()
        remove(request)
        print(way_on(run), file=sys.stderr)
        raise


def _work(settings: dict[str, Any]) -> str | None:
    # Imported in the worker: the driver needs no loader.
    from jobs.train.worker import train_worker

    return train_worker(**settings)
