"""`python -m jobs.serve`: a page that boxes the object in a photograph, and the same over HTTP.
Images in, JSON out: curl --data-binary @photo.jpg http://localhost:8000/localize"""

import ipaddress
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from jobs import cli
from pipeline.errors import UserError
from pipeline.storage import absolute

TOKEN = "ALN_TOKEN"  # environment variable
SHORTEST_TOKEN = 16
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Which nets answer, where, and how many of them."""

    run: str | None = cli.option(
        None,
        help="folder or URI of a finished jobs.train (default: the net that comes with the "
        "project)",
    )
    host: str = cli.option(
        "localhost", help=f"address to bind; one that is not loopback needs a token in {TOKEN}"
    )
    port: int = cli.option(8000, low=0, high=65535, help="port to bind; 0: a free one")
    replicas: int = cli.option(1, low=1, help="copies of the nets, of one CPU core each")
    accurate: bool = cli.option(False, help="look twice, as jobs.localize does")
    max_upload: int = cli.option(20, low=1, help="largest image file, in MiB")

    def __post_init__(self) -> None:
        cli.check_bounds(self)


def read_token(host: str) -> str | None:
    """Take the token out of the environment, so that no other process inherits it. Raises UserError
    where the address needs one."""
    token = os.environ.pop(TOKEN, None)
    loopback = host == "localhost"
    with suppress(ValueError):
        loopback = ipaddress.ip_address(host).is_loopback
    if (not loopback and token is None) or (token is not None and len(token) < SHORTEST_TOKEN):
        raise UserError(
            f"--host {host}: set {TOKEN} to a secret of {SHORTEST_TOKEN} characters or more"
            + (", or leave it unset" if loopback else "; or leave --host out")
        )
    return token


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket. Raises UserError where the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give others") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with its flags (`--help` lists them)."""
    config = cli.parse(ServeConfig, argv, __doc__ or "")
    from jobs.shipped import open_nets  # here: it needs torch, which takes seconds to load

    token, run = read_token(config.host), config.run and absolute(config.run)
    open_nets(run, accurate=config.accurate)  # so that what is wrong is one line here
    with bind(config.host, config.port) as listening:
        cli.connect_ray(dashboard=True)
        from jobs.serve.app import Limits, make_server  # here: they import Ray
        from jobs.serve.replica import ask, deploy, stop

        handle = deploy(run, accurate=config.accurate, replicas=config.replicas)
        limits = Limits(image_bytes=config.max_upload * MIB)
        server = make_server(partial(ask, handle), limits, token)
        print(f"ready: http://{config.host}:{listening.getsockname()[1]}", flush=True)
        with suppress(KeyboardInterrupt):  # which uvicorn passes on once it has stopped
            server.run(sockets=[listening])
        stop()


if __name__ == "__main__":
    cli.run(main)
