import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipeline import tasks
from pipeline.tasks import ATTEMPTS, Failure, run_tasks

pytestmark = pytest.mark.usefixtures("ray_local")


def tally(folder: Path, item: int) -> int:
    """Note an attempt at an item; how many there have been."""
    with (folder / str(item)).open("a") as file:
        file.write("x")
    return (folder / str(item)).stat().st_size


def work(folder: Path, item: int) -> int:
    """Item 3 kills its process at the first attempt, 4 always; 5 raises, 6 has no disk at first."""
    attempt = tally(folder, item)
    if item == 4 or (item == 3 and attempt == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 5:
        raise ValueError("five\nand more")
    if item == 6 and attempt < ATTEMPTS:
        raise OSError("no disk")
    return item * item


def test_what_dies_is_repeated_what_fails_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    found = dict(run_tasks(work, range(8), lambda item: (tmp_path, item), 2))
    failed = {item: r.reason for item, r in found.items() if isinstance(r, Failure)}
    assert {i: r for i, r in found.items() if i not in failed} == {
        i: i * i for i in (0, 1, 2, 3, 6, 7)
    }
    assert set(failed) == {4, 5}
    assert failed[4].startswith("its worker process ended 4 times (")
    assert failed[5] == "ValueError: five"
    attempts = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert attempts == {"0": 1, "1": 1, "2": 1, "3": 2, "4": 4, "5": 1, "6": 4, "7": 1}


def test_no_more_tasks_are_made_than_the_limit_allows(tmp_path: Path) -> None:
    made, ended, most = 0, 0, 0

    def arguments(item: int) -> tuple:
        nonlocal made, most
        made += 1
        most = max(most, made - ended)
        return tmp_path, item

    for _ in run_tasks(tally, iter(range(30)), arguments, 3):
        ended += 1
    assert (made, ended, most) == (30, 30, 3)


def nap(folder: Path, item: int) -> int:
    """The first attempt at item 3 takes a minute, as on a host that is slow or cut off."""
    attempt = tally(folder, item)
    for _ in range(600 if item == 3 and attempt == 1 else 1):  # one long sleep cannot be ended
        time.sleep(0.1)
    return attempt


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_slow_task_is_started_again_and_the_first_result_counts(
    at_once: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tasks, "SLOW_SECONDS", 2.0)
    started = time.monotonic()
    found = dict(run_tasks(nap, range(6), lambda item: (tmp_path, item), at_once))
    assert found == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1}
    assert time.monotonic() - started < 30
    assert len(caplog.messages) == 1


def stall(item: int) -> None:
    while item:
        time.sleep(0.05)


def test_a_task_that_is_slow_everywhere_is_started_four_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"PER_CPU": 8, "POLL_SECONDS": 0.05, "SLOW": 0, "SLOW_SECONDS": 0.1}.items():
        monkeypatch.setattr(tasks, name, value)
    submitted: list[int] = []
    until = time.monotonic() + 2

    def arguments(item: int) -> tuple:
        submitted.append(item)
        return (item,)

    def tick() -> None:
        if time.monotonic() > until and len(submitted) > ATTEMPTS:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        list(run_tasks(stall, range(2), arguments, 1, tick=tick))
    assert submitted == [0] + [1] * ATTEMPTS


def test_more_tasks_are_made_as_hosts_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster: dict[str, float] = {}
    submitted = []

    def arguments(item: int) -> tuple:
        submitted.append(item)
        return tmp_path, item

    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(tasks, "_cpus", lambda: cluster["CPU"])
    monkeypatch.setattr(tasks.ray, "wait", lambda tasks, **_: (tasks[:1], tasks[1:]))
    with closing(run_tasks(tally, range(30), arguments)) as results:
        for cpus, expected in ((0, 2), (1, 3), (4, 10), (2, 10), (2, 10)):
            cluster["CPU"] = cpus
            next(results)
            assert len(submitted) == expected


def fail_or_run_on(folder: Path, item: int, ignore_interrupts: bool) -> None:
    """Item 0 fails once another one runs; the others never end, and leave their process's id."""
    if item == 0:
        while not list(folder.iterdir()):
            time.sleep(0.05)
        raise ValueError("zero")
    answer = signal.SIG_IGN if ignore_interrupts else signal.default_int_handler
    signal.signal(signal.SIGINT, answer)  # whatever the shell that runs the tests has set
    try:
        (folder / str(os.getpid())).touch()
        while True:  # one long sleep could not be interrupted
            time.sleep(0.05)
    finally:
        (folder / str(os.getpid())).rename(folder / "ended")


@pytest.mark.parametrize("ignore_interrupts", [False, True])
def test_closing_stops_the_tasks_that_run(
    tmp_path: Path, ignore_interrupts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where workers ignore interrupts, as those of a job in a script's background do."""
    monkeypatch.setattr(tasks, "CANCEL_SECONDS", 1.0 if ignore_interrupts else 60.0)
    submitted = []

    def arguments(item: int) -> tuple:
        submitted.append(item)
        return tmp_path, item, ignore_interrupts

    with closing(run_tasks(fail_or_run_on, range(9), arguments, 2)) as results:
        item, result = next(results)
    assert item == 0
    assert isinstance(result, Failure)
    assert isinstance(result.error, ValueError)
    assert submitted == [0, 1]
    (left,) = tmp_path.iterdir()
    assert (left.name == "ended") == (not ignore_interrupts)
    while left.name != "ended" and Path(f"/proc/{left.name}").exists():
        time.sleep(0.05)  # killed, its process still has to end


SHORT_OF_MEMORY = """
import time, ray
from pipeline.tasks import run_tasks
limits = {"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 50}
ray.init(address="local", num_cpus=1, include_dashboard=False, _system_config=limits)
def nap(seconds):
    time.sleep(seconds)
for _, result in run_tasks(nap, [60], lambda seconds: (seconds,), 1):
    print(result.reason)
"""


@pytest.mark.slow
def test_a_task_that_ray_ends_for_its_memory_is_not_repeated_for_ever() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "its worker process ended 4 times (" in found.stdout
    assert "low on memory" in found.stdout


STALLED_HOST = """
import time, ray
from ray.cluster_utils import Cluster
from pipeline import tasks
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
hosts = [cluster.add_node(num_cpus=8) for _ in range(2)]
ray.init(address=cluster.address)
tasks.SLOW_SECONDS = 1.0
stalled = set()
def host(item):
    node = ray.get_runtime_context().get_node_id()
    while node in item:
        time.sleep(0.1)
    return node
def arguments(item):
    return (stalled if item else {},)
for item, node in tasks.run_tasks(host, range(2), arguments, 1):
    stalled.add(node)
assert len(stalled) == 2
"""


@pytest.mark.hosts
def test_a_task_that_stands_still_on_one_host_is_done_on_another() -> None:
    """Each host has room for every attempt."""
    subprocess.run(
        [sys.executable, "-c", STALLED_HOST],
        cwd=Path(__file__).parents[2],
        timeout=120,
        check=True,
    )
