"""One bounded loop of Ray tasks, in which every result is looked at."""

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import ray
from ray._private.worker import global_worker
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RayError, RayTaskError, RpcError

from pipeline.errors import UserError
from pipeline.storage import UnreachableError

POLL_SECONDS = 1.0
CANCEL_SECONDS = 3.0  # after which a cancelled task that has not ended is killed
ATTEMPTS = 4  # at a task whose worker process or node dies, or that meets an error of the disk
PASSING = (OSError, UnreachableError)  # errors in a task that may be gone at the next attempt
PER_CPU = 2  # tasks in flight for each CPU: the next one waits beside the one that runs
SLOW = 3.0  # times the median: a task that takes longer is slow, but not before SLOW_SECONDS
SLOW_SECONDS = 10.0
REMEMBERED = 1000  # durations of tasks

LOG = logging.getLogger(__name__)
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

    A task whose process or disk fails is repeated; one that takes far longer than the others, as on
    a host that is slow or cut off, is also started on another once no item waits. So `function` may
    be called several times for one item, in several processes at once. Closing the generator stops
    the tasks that still run: a caller that gives up early does so within `contextlib.closing`.

    at_once: tasks in flight; by default two for each CPU, also of hosts that join, and up to so
    many where some are slow, which do not count. gpus: share of a GPU that a task takes. Arguments
    are made when a task is submitted. `tick` is called after each round, about every second at
    least. Ray must be initialized.
    """
    # Ray's own retries would go on for ever where it is Ray that ends the process, for its memory.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(function)
    waiting = iter(items)
    # Ray would start another attempt on the same host, where that has room.
    again = remote.options(scheduling_strategy="SPREAD")
    attempts = _Attempts(
        lambda task: (again if task.started else remote).remote(*arguments(task.item))
    )
    limit = most = at_once or 0
    asked = -math.inf
    try:
        while True:
            if time.monotonic() - asked >= POLL_SECONDS:
                slow = attempts.slow()
                if at_once is None or slow:  # an autoscaler adds hosts for tasks that wait
                    most = PER_CPU * _cpus() or most or PER_CPU
                # Slow ones may never end, as on a host that stands still with all of `at_once`.
                limit = max(at_once or most, min((at_once or most) + slow, most))
                asked = time.monotonic()
            for item in itertools.islice(waiting, max(0, limit - len(attempts.running))):
                attempts.start(_Task(item))
            if not attempts.running:
                return
            if len(attempts.running) < limit:
                attempts.start_slow_again()
            try:
                finished, _ = ray.wait(list(attempts.running), timeout=POLL_SECONDS)
            except OSError as error:  # its socket is closed
                raise UserError(f"Ray on this host has ended ({error})") from error
            for reference in finished:
                yield from attempts.end(reference)
            tick()
    finally:
        _stop([*attempts.running, *attempts.late])


def _cpus() -> int:
    """Return the cluster's CPUs, 0 while its head does not answer. (`ray.cluster_resources` would
    abort the process where the head starts anew meanwhile.)"""
    try:
        nodes = global_worker.gcs_client.get_all_node_info(timeout=POLL_SECONDS).values()
    except RpcError:
        return 0
    return int(sum(x.resources_total.get("CPU", 0) for x in nodes if x.state == GcsNodeInfo.ALIVE))


@dataclass
class _Task:
    """An item with its attempts: those that run, how many failed, when the last one was started."""

    item: Any
    running: list[ray.ObjectRef] = field(default_factory=list)
    failed: int = 0
    started: float = 0.0


@dataclass
class _Attempts:
    """The attempts that run. submit: start one. late: those that another one has overtaken.
    seconds: what tasks took, the last ones. lines: what was logged."""

    submit: Callable[[_Task], ray.ObjectRef]
    running: dict[ray.ObjectRef, _Task] = field(default_factory=dict)
    late: list[ray.ObjectRef] = field(default_factory=list)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    lines: set[str] = field(default_factory=set)

    def start(self, task: _Task) -> None:
        task.running.append(self.submit(task))
        task.started = time.monotonic()
        self.running[task.running[-1]] = task

    def slow_before(self) -> float:
        """Return the time before which an attempt must have started to be slow; -inf where no task
        has ended yet."""
        limit = max(SLOW_SECONDS, SLOW * median(self.seconds)) if self.seconds else math.inf
        return time.monotonic() - limit

    def slow(self) -> int:
        """Return how many attempts are slow: of each task all but the last one, or that too."""
        before = self.slow_before()
        in_time = {id(task) for task in self.running.values() if task.started >= before}
        return len(self.running) - len(in_time)

    def start_slow_again(self) -> None:
        """Start another attempt at the oldest task where it is slow; ATTEMPTS run at most."""
        tasks = [task for task in self.running.values() if len(task.running) < ATTEMPTS]
        oldest = min(tasks, key=lambda task: task.started, default=None)
        if oldest and oldest.started < self.slow_before():
            self._log(
                "a task takes far longer than others, as on a slow host: it is started once more"
            )
            self.start(oldest)

    def end(self, reference: ray.ObjectRef) -> Iterator[tuple[Any, Any]]:
        """Take the result of an attempt that has ended. Yields the task's where that ends it."""
        task = self.running.pop(reference)
        task.running.remove(reference)
        try:
            result = ray.get(reference)
        except RayError as error:
            task.failed += 1
            if task.running:
                return
            if task.failed < ATTEMPTS and _may_pass(error):
                if not isinstance(error, RayTaskError):
                    reason = _first_line(error).partition(" This can happen")[0]  # Ray's advice
                    self._log(f"a task is repeated: {reason}")
                self.start(task)
            else:
                yield task.item, _failure(error)
            return
        self.seconds.append(time.monotonic() - task.started)
        for other in task.running:
            del self.running[other]
            ray.cancel(other)
            self.late.append(other)
        yield task.item, result

    def _log(self, line: str) -> None:
        """Log a line once."""
        if line not in self.lines:
            LOG.warning(line)
        self.lines.add(line)


def _may_pass(error: RayError) -> bool:
    """Return whether another attempt may do better: the process, its node or the disk failed."""
    return not isinstance(error, RayTaskError) or isinstance(error.cause, PASSING)


def _failure(error: RayError) -> Failure:
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        return Failure(error=cause, reason=reason)
    reason = f"its worker process ended {ATTEMPTS} times ({_first_line(error)})"
    return Failure(error=error, reason=reason)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _stop(references: list[ray.ObjectRef]) -> None:
    """Cancel these tasks and wait for their ends; kill those that do not end, but for those on a
    host that does not answer, which Ray ends with the driver.

    Ray cancels by an interrupt, which workers of a job in the background of a script ignore.
    """
    for force in (False, True):
        if not references:
            return
        for reference in references:
            ray.cancel(reference, force=force)
        ended, references = ray.wait(
            references, num_returns=len(references), timeout=CANCEL_SECONDS
        )
        for reference in ended:
            with suppress(RayError):
                ray.get(reference)
