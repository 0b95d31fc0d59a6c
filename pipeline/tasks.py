"""One bounded loop of Ray tasks, in which every result is looked at."""

import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.storage import UnreachableError

POLL_SECONDS = 1.0
CANCEL_SECONDS = 3.0  # after which a cancelled task that has not ended is killed
ATTEMPTS = 4  # at a task whose worker process or node dies, or that meets an error of the disk
PASSING = (OSError, UnreachableError)  # errors in a task that may be gone at the next attempt
PER_CPU = 2  # tasks in flight for each CPU: the next one waits beside the one that runs

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A task that failed for good.

    error: the exception in the task, or Ray's where its process ended. reason: it in one line.
    """

    error: Exception
    reason: str


def run_tasks(
    function: Callable[..., Result],
    items: Iterable[Item],
    arguments: Callable[[Item], tuple],
    at_once: int | None = None,
    *,
    gpus: float = 0.0,
    tick: Callable[[], None] = lambda: None,
) -> Generator[tuple[Item, Result | Failure], None, None]:
    """Yield each item with the result of `function(*arguments(item))` in a Ray task, as they end.

    A task whose process or disk fails is repeated, so `function` may be called several times for
    one item, in several processes at once. Closing the generator stops the tasks that still run:
    a caller that gives up early does so within `contextlib.closing`.

    at_once: tasks in flight; by default two for each CPU. gpus: share of a GPU that a task takes.
    Arguments are made when a task is submitted. `tick` is called after each round, about every
    second at least. Ray must be initialized.
    """
    at_once = at_once or PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    # Ray's own retries would go on for ever where it is Ray that ends the process, for its memory.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(function)
    waiting, in_flight = iter(items), dict[ray.ObjectRef, tuple[Item, int]]()
    try:
        while True:
            for item in itertools.islice(waiting, at_once - len(in_flight)):
                in_flight[remote.remote(*arguments(item))] = item, 1
            if not in_flight:
                return
            finished, _ = ray.wait(list(in_flight), timeout=POLL_SECONDS)
            for reference in finished:
                item, attempt = in_flight.pop(reference)
                try:
                    result = ray.get(reference)
                except RayError as error:
                    if attempt < ATTEMPTS and _may_pass(error):
                        in_flight[remote.remote(*arguments(item))] = item, attempt + 1
                    else:
                        yield item, _failure(error)
                else:
                    yield item, result
            tick()
    finally:
        _stop(list(in_flight))


def _may_pass(error: RayError) -> bool:
    """Return whether another attempt may do better: the process, its node or the disk failed."""
    return not isinstance(error, RayTaskError) or isinstance(error.cause, PASSING)


def _failure(error: RayError) -> Failure:
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        return Failure(error=cause, reason=reason)
    reason = f"its worker process ended {ATTEMPTS} times ({str(error).splitlines()[0]})"
    return Failure(error=error, reason=reason)


def _stop(references: list[ray.ObjectRef]) -> None:
    """Cancel these tasks and wait for their ends; kill those that do not end.

    Ray cancels by an interrupt, which workers of a job in the background of a script ignore.
    """
    force = False
    while references:
        for reference in references:
            ray.cancel(reference, force=force)
        ended, references = ray.wait(
            references, num_returns=len(references), timeout=CANCEL_SECONDS
        )
        for reference in ended:
            with suppress(RayError):
                ray.get(reference)
        force = True
