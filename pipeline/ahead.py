"""Look-ahead: calls that run in threads before their results are asked for, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, depth: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order, from a pool of `threads`.

    At most `depth` calls are under way or wait for the caller; `items` is read in the caller's
    thread. No reference to a result stays behind. A call's error is raised where its result is due.
    After it, or once the iterator is closed, calls that have not begun are cancelled and the others
    are waited for.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield from map(Future.result, submit_ahead(pool, function, items, depth))
    finally:
        pool.shutdown(cancel_futures=True)


def submit_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Future[Result]]:
    """Yield a future of `function(item)` for each item, in order, `depth` submitted at a time.

    Calls that have not begun are cancelled once the iterator is closed.
    """
    waiting = deque[Future[Result]]()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == depth:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for future in waiting:
            future.cancel()
