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
NETWORK, PORT = "10.213.77", 6379
HEAD, OUTSIDE = f"{NETWORK}.1", f"{NETWORK}.254"


class Host:
    """A namespace with one address on eth0, and processes in it."""

    def __init__(self, number: int, token: str) -> None:
        self.name, self.address = f"aln{number}-{os.getpid()}", f"{NETWORK}.{number}"
        self.cable = f"aln{number}v{os.getpid()}"  # its end outside of the host
        self.processes: list[subprocess.Popen] = []
        self.environment = environment(
            RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, RAY_ADDRESS=f"{HEAD}:{PORT}"
        )

    def start(self, *command: str, **options: object) -> subprocess.Popen:
        """Start a process whose host name is this host's; it leads a group of its own."""
        inner = 'hostname "$0" && exec "$@"'
        words = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", inner, self.name]
        settings = {"env": self.environment, "cwd": ROOT, "start_new_session": True, "text": True}
        process = subprocess.Popen([*words, *command], **{**settings, **options})  # type: ignore[call-overload]
        self.processes.append(process)
        return process

    def start_ray(self, folder: Path, cpus: int) -> None:
        """Start a Ray node, on the first host the head, which is waited for."""
        own, head = folder / self.name[:4], self.address == HEAD
        where = ["--head", f"--port={PORT}"] if head else [f"--address={HEAD}:{PORT}"]
        if head:
            where += ["--include-dashboard=false", f"--temp-dir={own}"]
        where += [f"--num-cpus={cpus}", f"--node-ip-address={self.address}"]
        where += ["--disable-usage-stats", "--object-store-memory=100000000"]
        deadline = time.monotonic() + 90
        with own.with_suffix(".log").open("a") as log:
            node = self.start(RAY, "start", "--block", *where, stdout=log, stderr=log)
            while head and self.start(RAY, "health-check", stderr=log).wait():
                assert time.monotonic() < deadline, "the head node did not come up"
                if node.poll() is not None:  # on a busy machine Ray may give up
                    node = self.start(RAY, "start", "--block", *where, stdout=log, stderr=log)
                time.sleep(0.5)

    def kill(self, but: subprocess.Popen | None = None) -> None:
        """End all processes of the host at once, as a power cut does; not the group of `but`."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for pid in map(int, pids.stdout.split()):
            with suppress(ProcessLookupError):
                if but is None or os.getpgid(pid) != but.pid:
                    os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            if process is not but:
                process.wait()
        self.processes = [but] if but else []

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
