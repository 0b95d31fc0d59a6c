"""The Ray Serve deployment: image files -> boxes, classes and masks, in batches."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from jobs.locate import facts, keep_freed_memory, locate, prepare
from jobs.pictures import encode_png, grey
from jobs.runs import Nets
from jobs.shipped import open_nets
from model.localization import RULES, localize_by
from pipeline.evaluation.protocols import scale_boxes
from pipeline.shards.images import ImageError

NAME = "localize"
BATCH_SIZE = 4  # images that the nets see at once, at most: larger ones are no faster
MOST_WAITING = 1000  # images at a replica; the HTTP side admits fewer
BATCH_SECONDS = 0.01  # that an image waits for others
HEALTH_SECONDS = 2  # between checks whether a replica lives
Answer = dict[str, Any]


class BusyError(Exception):
    """The replicas cannot answer now, as when one of them has died."""


def answer(nets: Nets, files: Sequence[bytes]) -> list[Answer]:
    """Return a dict for each file: its size, boxes by rule, classes, and the mask as a PNG of the
    nets' size; or under "error" why it is no image that can be used."""
    answers: list[Answer] = [{} for _ in files]
    prepared = {}
    for i, data in enumerate(files):
        try:
            prepared[i] = prepare(nets.config, data)
        except (ImageError, MemoryError) as error:
            answers[i]["error"] = str(error) or "too large for this machine's memory"
    if not prepared:
        return answers
    results = locate(nets, list(prepared.values()), batch_size=len(prepared))
    maps = np.stack([result.map for result in results])
    sizes = np.array([(image.height, image.width) for image in prepared.values()])
    by_rule, _ = localize_by(maps, tuple(RULES))
    scaled = [scale_boxes(boxes, np.array(maps.shape[1:]), sizes).tolist() for boxes in by_rule]
    for i, result, *boxes in zip(prepared, results, *scaled, strict=True):
        answers[i] = facts(prepared[i], result)
        answers[i]["rule"] = nets.config.rule
        answers[i]["boxes"] = dict(zip(RULES, boxes, strict=True))
        answers[i]["mask"] = encode_png(grey(result.map))
    return answers


class Localizer:
    """A replica: the nets on one CPU core."""

    def __init__(self, run: str | None, accurate: bool) -> None:
        keep_freed_memory()
        torch.set_num_threads(1)
        self.nets = open_nets(run, accurate=accurate)
        size = (self.nets.config.height, self.nets.config.width, 3)
        answer(self.nets, [encode_png(np.zeros(size, np.uint8))])  # kernels are chosen once

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=BATCH_SECONDS)
    async def __call__(self, files: list[bytes]) -> list[Answer]:
        return await asyncio.to_thread(answer, self.nets, files)


def deploy(run: str | None, *, accurate: bool, replicas: int) -> DeploymentHandle:
    """Start the replicas, without Serve's proxy, which holds uploads of any size in memory."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
    # All wait for a batch within the replica: a router that finds it full asks again and again.
    replica = serve.deployment(
        name=NAME,
        num_replicas=replicas,
        max_ongoing_requests=MOST_WAITING,
        ray_actor_options={"num_cpus": 1},
        health_check_period_s=HEALTH_SECONDS,
    )(Localizer)
    return serve.run(replica.bind(run, accurate), name=NAME, route_prefix=None)


async def ask(handle: DeploymentHandle, data: bytes) -> Answer:
    """Return the answer of a replica. Raises BusyError."""
    try:
        return await handle.remote(data)
    except RayError as error:
        raise BusyError(f"the nets do not answer ({type(error).__name__})") from error


def stop() -> None:
    """End the replicas."""
    serve.delete(NAME)
