import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.ahead import run_ahead


class Calls:
    """A function that counts its calls under way and finished; item -1 raises."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.started, self.running, self.most = seconds, 0, 0, 0
        self.lock = threading.Lock()

    def __call__(self, item: int) -> int:
        with self.lock:
            self.started += 1
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
        if item < 0:
            raise ValueError(item)
        return item * item


def test_results_come_in_order_although_calls_end_in_another() -> None:
    def square(item: int) -> int:
        time.sleep(0.01 * (item % 3 == 0))
        return item * item

    assert list(run_ahead(square, range(40), threads=4, depth=8)) == [x * x for x in range(40)]
    assert list(run_ahead(square, [], threads=4, depth=8)) == []


@pytest.mark.parametrize(("threads", "depth"), [(1, 1), (4, 4), (3, 8), (8, 3)])
def test_no_more_than_depth_items_are_taken_before_their_results_are(
    threads: int, depth: int
) -> None:
    calls, taken, given = Calls(0.001), 0, 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(60):
            taken += 1
            assert taken - given <= depth
            yield item

    for _ in run_ahead(calls, items(), threads=threads, depth=depth):
        given += 1
    assert given == 60
    assert calls.most <= min(threads, depth)


def test_an_error_comes_where_its_result_is_due_and_cancels_the_rest() -> None:
    calls = Calls(0.01)
    results = run_ahead(calls, [1, 2, -1, *range(1000)], threads=2, depth=50)
    assert [next(results), next(results)] == [1, 4]
    with pytest.raises(ValueError, match="-1"):
        next(results)
    assert (calls.running, list(results)) == (0, [])
    assert calls.started < 40


@pytest.mark.parametrize("end", [lambda results: results.close(), lambda results: None])
def test_a_closed_or_forgotten_iterator_leaves_no_thread_and_no_call(
    end: Callable[[Iterator[int]], None],
) -> None:
    calls, before = Calls(0.01), threading.active_count()
    results = run_ahead(calls, range(1000), threads=2, depth=50)
    next(results)
    end(results)
    del results
    assert (calls.running, threading.active_count()) == (0, before)
    assert calls.started < 40


def test_an_error_of_the_items_is_raised_and_ends_the_threads() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(run_ahead(Calls(), (1 // x for x in (1, 1, 0)), threads=2, depth=2))
    assert threading.active_count() == before
