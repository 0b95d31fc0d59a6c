"""What a training does about its hosts: the network interface of each worker, notices that one is
about to go, and lines in the log while the group waits for room."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    WorkerCallback,
    WorkerGroupCallback,
)
from ray.train.v2._internal.execution.context import get_train_context

from jobs.train.checkpoints import newest_step
from jobs.train.log import append_line
from pipeline.errors import UserError
from pipeline.storage import UnreachableError, is_file, is_remote, remove

INTERFACES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}  # "=": exactly this name
AGAIN_SECONDS = 60  # between lines that say the same
LEAVING_SECONDS = 10  # between checkpoints while a host is about to go
POLL_SECONDS = 5.0

terminated = threading.Event()  # whether this worker got a SIGTERM


def interface_of(address: str, addresses: Mapping[str, Iterable[str]]) -> str | None:
    """Return the network interface that has an address, None where none has or it is a loopback
    one, which joins processes of one host without help. addresses: of each interface; IPv6 ones
    may end in %INTERFACE."""
    if ip_address(address).is_loopback:
        return None
    for name, own in addresses.items():
        if address in (text.partition("%")[0] for text in own):
            return name
    return None


def choose_interface() -> None:
    """Let Gloo and NCCL use the interface of this host's Ray address, unless the user chose one.

    Left to themselves they ask for the address of the host's own name, which is 127.0.1.1 on
    Debian and Ubuntu.
    """
    import psutil  # Ray's copy, which can be imported once Ray is

    addresses = {
        name: [entry.address for entry in entries]
        for name, entries in psutil.net_if_addrs().items()
    }
    name = interface_of(ray.util.get_node_ip_address(), addresses)
    if name is not None:
        for variable, form in INTERFACES.items():
            os.environ.setdefault(variable, form.format(name))


def note_termination() -> None:
    """Let a first SIGTERM set `terminated`, and only a second one end the process."""
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: Any) -> None:
        if terminated.is_set() and callable(before):
            before(number, frame)
        terminated.set()

    signal.signal(signal.SIGTERM, note)


class Notices:
    """Tell a rank, in each of its steps, whether to ask the others for a checkpoint."""

    def __init__(self, rank: int, request: str) -> None:
        self.rank, self.request = rank, request
        self.written = self.asked = -math.inf  # when

    def due(self) -> bool:
        """Return whether this process was terminated; of rank 0 also whether the driver asks for a
        checkpoint, or Ray says that a host of the group is about to go."""
        if terminated.is_set():
            return True
        if self.rank:
            return False
        now = time.monotonic()
        if get_train_context().preemption_context.preemption_info is not None:
            return now - self.written >= LEAVING_SECONDS
        if is_remote(self.request) and now - self.asked < POLL_SECONDS:
            return False
        self.asked = now
        with suppress(UnreachableError):
            return is_file(self.request)
        return False

    def done(self) -> None:
        """Take note that a checkpoint is written. A terminated process ends here."""
        self.written = time.monotonic()
        if self.rank == 0:
            remove(self.request)
        if terminated.is_set():
            os.kill(os.getpid(), signal.SIGTERM)


class Preparation(WorkerCallback):
    """Ray Train's call in each worker before the group connects."""

    def after_init_train_context(self) -> None:
        """Prepare a worker's process, in its main thread."""
        choose_interface()
        note_termination()


class Watch(ControllerCallback, WorkerGroupCallback):
    """Ray Train's calls in its controller: they write what training waits for into its log."""

    def __init__(self, run: str, fewest: int, resource: str) -> None:
        self.run, self.fewest, self.resource = run, fewest, resource
        self.hosts: dict[str, str] = {}  # names of the group's hosts by their Ray id
        self.stopped = 0.0  # when the group stopped; 0 while it trains
        self.text, self.written = "", 0.0  # the last line, and when

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember the hosts, and say where training goes on after a stop."""
        workers = worker_group.get_workers()
        self.hosts = {w.metadata.node_id: w.metadata.hostname for w in workers}
        if self.stopped:
            step = newest_step(self.run)
            begin = "the start" if step is None else f"the checkpoint of step {step}"
            waited, self.stopped = time.time() - self.stopped, 0.0
            names = ", ".join(sorted(set(self.hosts.values())))
            self._say(
                f"training starts again after {waited:.0f} s, from {begin} (workers: "
                f"{len(workers)}, on {names})"
            )

    def after_controller_state_update(self, _: Any, current_state: Any) -> None:
        """Say why the group stopped, and what it waits for."""
        state = type(current_state).__name__
        if state == "PreemptingState":
            leaving = current_state.preemption_info.preempted_node_ids
            self._say(f"{self._names(leaving)} is about to go: a checkpoint is written")
        elif state in ("RestartingState", "ReschedulingState", "ResizingState"):
            if not self.stopped:
                self.stopped = time.time()
                threading.Thread(target=self._wait, daemon=True).start()
        elif state == "ShuttingDownState":
            self.stopped = 0.0

    def _wait(self) -> None:
        """Say what is missing until the group starts. In a thread of its own: Ray Train's waits for
        room a minute at a time, and a dead host is known as such only after some seconds."""
        began = time.strftime("%X", time.localtime(self.stopped))
        while self.stopped:
            alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
            room = sum(int(node["Resources"].get(self.resource, 0)) for node in alive.values())
            gone = [node for node in self.hosts if node not in alive]
            missing = f"{self._names(gone)} is gone; " if gone else ""
            self._say(
                f"{missing}waiting since {began} for room (workers: {self.fewest}, one "
                f"{self.resource} each); the cluster has {room} in all"
            )
            time.sleep(POLL_SECONDS)

    def _names(self, nodes: Iterable[str]) -> str:
        return ", ".join(sorted({self.hosts.get(node, node) for node in nodes}))

    def _say(self, text: str) -> None:
        """Append a line to the log, one that says the same as before once a minute only."""
        now = time.time()
        if text == self.text and now - self.written < AGAIN_SECONDS:
            return
        self.text, self.written = text, now
        with suppress(OSError, UserError):  # a line less; where checkpoints fail too, that ends all
            append_line(self.run, f"{time.strftime('%X')} {text}")
