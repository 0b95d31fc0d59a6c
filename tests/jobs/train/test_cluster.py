"""What a training does about its hosts, without a cluster."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from ray.train.v2._internal.execution.controller.state import PreemptingState, RestartingState

from jobs.train import cluster
from jobs.train.checkpoints import write_checkpoint
from jobs.train.cluster import (
    INTERFACES,
    LEAVING_SECONDS,
    Notices,
    Watch,
    interface_of,
    note_termination,
    terminated,
)

ADDRESSES = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "ib0": ["10.1.0.7", "fe80::1%ib0"],
    "eth0": ["10.0.0.70", "10.0.0.7", "fe80::2%eth0"],
}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.7", "eth0"),
        ("10.1.0.7", "ib0"),
        ("fe80::2", "eth0"),
        ("127.0.0.1", None),
        ("127.0.1.1", None),
        ("::1", None),
        ("192.168.0.1", None),
    ],
)
def test_the_interface_is_the_one_with_the_nodes_address(address: str, name: str | None) -> None:
    assert interface_of(address, ADDRESSES) == name


def test_a_worker_takes_that_interface_unless_the_user_chose_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psutil

    entries = {k: [SimpleNamespace(address=a) for a in v] for k, v in ADDRESSES.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: entries)
    monkeypatch.setattr(cluster.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    cluster.choose_interface()
    assert [os.environ[name] for name in INTERFACES] == ["eth0", "ib"]
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    cluster.choose_interface()
    assert [os.environ[name] for name in INTERFACES] == ["eth0", "=eth0"]


def lines(run: Path) -> list[str]:
    return [line.partition(" ")[2] for line in (run / "log.txt").read_text().splitlines()]


def test_the_log_says_what_a_stopped_group_waits_for_and_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)
    names = {"a": "host-a", "b": "host-b"}
    nodes = [{"NodeID": node, "Alive": True, "Resources": {"CPU": 1.0}} for node in names]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    workers = [
        SimpleNamespace(metadata=SimpleNamespace(node_id=node, hostname=name))
        for node, name in names.items()
    ]
    group = SimpleNamespace(get_workers=lambda: workers)
    watch = Watch(str(tmp_path), 2, "CPU")
    watch.after_worker_group_start(group)
    assert not (tmp_path / "log.txt").exists()
    info = SimpleNamespace(preempted_node_ids=["b"])
    watch.after_controller_state_update(None, PreemptingState(info, 0.0))
    watch.after_controller_state_update(None, RestartingState(Mock()))
    nodes[1]["Alive"] = False
    deadline = time.monotonic() + 10
    while "1 in all" not in (tmp_path / "log.txt").read_text():
        assert time.monotonic() < deadline
    write_checkpoint(tmp_path, 7, {}, {}, keep=2)
    watch.after_worker_group_start(group)
    first, *_, waits, goes_on = lines(tmp_path)
    assert first == "host-b is about to go: a checkpoint is written"
    assert waits.startswith("host-b is gone; waiting since ")
    assert waits.endswith("for room (workers: 2, one CPU each); the cluster has 1 in all")
    begin = "training starts again after 0 s, from the checkpoint of step 7"
    assert goes_on == f"{begin} (workers: 2, on host-a, host-b)"


@pytest.mark.parametrize("rank", [0, 1])
def test_checkpoints_are_due_by_a_request_a_host_that_goes_and_sigterm(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info=None))
    monkeypatch.setattr(cluster, "get_train_context", lambda: context)
    request = tmp_path / "request"
    notices = Notices(rank, str(request))
    assert not notices.due()
    request.touch()
    assert notices.due() == (rank == 0)
    notices.done()
    assert request.exists() == (rank == 1)
    context.preemption_context.preemption_info = "soon"
    assert not notices.due()  # one was just written
    notices.written -= LEAVING_SECONDS
    assert notices.due() == (rank == 0)
    ended = Mock()
    before = signal.signal(signal.SIGTERM, ended)
    try:
        note_termination()
        os.kill(os.getpid(), signal.SIGTERM)
        assert notices.due()
        assert not ended.called
        notices.done()
        assert ended.called
    finally:
        signal.signal(signal.SIGTERM, before)
        terminated.clear()
