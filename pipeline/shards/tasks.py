"""Bounded Ray tasks whose every result is looked at."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import ray

from pipeline.storage import UnreachableError

POLL_SECONDS = 1.0
ATTEMPTS = 4  # at a task whose worker process or node dies, or that meets an error of the disk
PASSING = (OSError, UnreachableError)  # errors in a task that may be gone at the next attempt
PER_CPU = 2  # tasks in flight for each CPU: the next one waits beside the one that runs

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A task that failed for good. reason: one line."""

    reason: str


def run_tasks(
    function: Callable[..., Result],
    items: Iterable[Item],
    arguments: Callable[[Item], tuple],
    limit: int | None,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Item, Result | Failure]]:
    """Call `function(*arguments(item))` in a Ray task for each item; what became of each, as they
    end. `function` may be called several times for one item, in several processes at once.

    limit: tasks in flight; by default those that all CPUs run, and as many that wait. Arguments are
    made when a task is submitted. `tick` is called after each round, about every second at least.
    Ray must be initialized.
    """
    limit = limit or PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    # Ray's own retries would go on for ever where it is Ray that ends the process, for its memory.
    remote = ray.remote(max_retries=0)(function)
    waiting, in_flight = iter(items), dict[ray.ObjectRef, tuple[Item, int]]()
    while True:
        for item in itertools.islice(waiting, limit - len(in_flight)):
            in_flight[remote.remote(*arguments(item))] = item, 1
        if not in_flight:
            return
        finished, _ = ray.wait(list(in_flight), timeout=POLL_SECONDS)
        for reference in finished:
            item, attempt = in_flight.pop(reference)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                if attempt < ATTEMPTS and _may_pass(error):
                    in_flight[remote.remote(*arguments(item))] = item, attempt + 1
                else:
                    yield item, Failure(reason=_reason(error))
            else:
                yield item, result
        tick()


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may do better: the process or its node ended, or the disk failed."""
    return not isinstance(error, ray.exceptions.RayTaskError) or isinstance(error.cause, PASSING)


def _reason(error: Exception) -> str:
    """One line of a task's failure: the exception in the task where there was one."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    return f"its worker process ended {ATTEMPTS} times ({str(error).splitlines()[0]})"
