"""Two hosts on one machine: network namespaces, whose names resolve to 127.0.1.1 as on Debian."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT, environment

RAY = str(Path(sys.executable).parent / "ray")
NETWORK = f"10.213.{os.getpid() % 256}"  # so that two runs of the tests do not meet
PORT = 6379
HEAD, OUTSIDE = f"{NETWORK}.1", f"{NETWORK}.254"


class Host:
    """A network namespace with one address on eth0, and a machine in it: processes in namespaces of
    their own for their ids and their host's name."""

    def __init__(self, number: int, token: str) -> None:
        self.name, self.address = f"aln{number}-{os.getpid()}", f"{NETWORK}.{number}"
        self.cable = f"aln{number}v{os.getpid()}"  # its end outside of the host
        self.machine: subprocess.Popen | None = None
        self.environment = environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=token,
            RAY_ADDRESS=f"{HEAD}:{PORT}",
            RAY_grpc_client_keepalive_time_ms="60000",  # as cluster/README.md advises
            RAY_grpc_client_keepalive_timeout_ms="20000",
            RAY_memory_monitor_refresh_ms="0",  # the memory is the whole machine's
        )

    def start(self, *command: str, **options: object) -> subprocess.Popen:
        """Start a process on the machine."""
        self.machine = self.machine or self._boot()
        proc = f"/proc/{self.machine.pid}/ns"
        words = ["nsenter", f"--net={proc}/net", f"--uts={proc}/uts", f"--mount={proc}/mnt"]
        words += [f"--pid={proc}/pid_for_children", f"--wd={ROOT}", "--", *command]
        settings = {"env": self.environment, "text": True} | options
        return subprocess.Popen(words, **settings)  # type: ignore[call-overload]

    def _boot(self) -> subprocess.Popen:
        """Start the machine, the first process of its namespaces."""
        words = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--pid", "--fork"]
        words += ["--mount-proc", "--kill-child", "sh", "-c"]
        script = f"hostname {self.name}; echo; exec sleep infinity"
        machine = subprocess.Popen([*words, script], stdout=subprocess.PIPE)
        assert machine.stdout
        if not machine.stdout.readline():
            pytest.skip("no namespaces of processes can be made here")
        return machine

    def start_ray(self, folder: Path) -> None:
        """Start a Ray node of one CPU, on the first host the head, which is waited for."""
        own, head = folder / self.name[:4], self.address == HEAD
        where = ["--head", f"--port={PORT}"] if head else [f"--address={HEAD}:{PORT}"]
        if head:
            where += ["--include-dashboard=false", f"--temp-dir={own}"]
        where += ["--num-cpus=1", f"--node-ip-address={self.address}"]
        where += ["--disable-usage-stats", "--object-store-memory=100000000"]
        deadline = time.monotonic() + 90
        with own.with_suffix(".log").open("a") as log:
            node = self.start(RAY, "start", "--block", *where, stdout=log, stderr=log)
            while head and self.start(RAY, "health-check", stderr=log).wait():
                assert time.monotonic() < deadline, "the head node did not come up"
                if node.poll() is not None:  # on a busy machine Ray may give up
                    node = self.start(RAY, "start", "--block", *where, stdout=log, stderr=log)
                time.sleep(0.5)

    def kill(self) -> None:
        """End all processes of the host at once."""
        if self.machine is not None:
            self.machine.kill()
            self.machine.wait()
        self.machine = None

    def tasks(self, title: str) -> list[int]:
        """Return the process ids of Ray's workers whose title begins so."""
        return self.processes(f"ray::{title}")

    def processes(self, words: str) -> list[int]:
        """Return the ids of the processes with these words in their command line."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        chosen = []
        for pid in map(int, pids.stdout.split()):
            with suppress(OSError):
                if words in Path(f"/proc/{pid}/cmdline").read_text():
                    chosen.append(pid)
        return chosen

    def drain(self) -> None:
        """Announce the host's end as a cloud does: by SIGTERM of `ray start --block`."""
        for pid in self.processes("\0start\0--block\0"):
            os.kill(pid, signal.SIGTERM)

    def cut(self) -> None:
        """Take the host off the network."""
        _ip("link", "set", self.cable, "down")

    def restore(self) -> None:
        """Put the host back on the network."""
        _ip("link", "set", self.cable, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts in a network with this one, which is OUTSIDE. Skips the test where they cannot
    be made."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("two hosts need root, ip (iproute2) and unshare (util-linux)")
    token = secrets.token_hex(32)
    hosts = Host(1, token), Host(2, token)
    with ExitStack() as stack:
        for host in hosts:
            try:
                _ip("netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
            stack.callback(_ip, "netns", "delete", host.name)
            stack.callback(host.kill)
            names = Path("/etc/netns", host.name)  # bound over /etc within the namespace
            names.mkdir(parents=True)
            stack.callback(shutil.rmtree, names)
            (names / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
        bridge = f"aln{os.getpid()}"
        _ip(*f"link add {bridge} type bridge".split())
        stack.callback(_ip, "link", "delete", bridge)
        _ip(*f"address add {OUTSIDE}/24 dev {bridge}".split())
        _ip("link", "set", bridge, "up")
        for host in hosts:
            _ip(*f"link add {host.cable} type veth peer name eth0 netns {host.name}".split())
            stack.callback(_ip, "link", "delete", host.cable)
            _ip(*f"link set {host.cable} master {bridge} up".split())
            _ip(*f"-n {host.name} address add {host.address}/24 dev eth0".split())
            for device in ("lo", "eth0"):
                _ip("-n", host.name, "link", "set", device, "up")
        yield hosts


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="aln", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
