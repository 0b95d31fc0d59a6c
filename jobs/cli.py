"""What commands share: flags from dataclasses, one-line errors, records, progress, tables, Ray."""

import argparse
import dataclasses
import gc
import hashlib
import json
import logging
import math
import operator
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UserError
from pipeline.storage import is_file, is_remote, local_path

Config = TypeVar("Config")

PACKAGES = ("ray", "torch", "nvidia-dali-cuda130", "fast-slic", "webdataset", "pyarrow", "numpy")
ROOT = Path(__file__).parents[1]
LINE_SECONDS = 5.0  # between progress lines
ADDRESS = re.compile(r"auto|[^/]+:\d+")
HOST_SECONDS = 180  # for a host to start a process and look, which can be slow on a busy one
CLUSTER_SECONDS = 50  # for a cluster to answer; Ray itself would wait for 14 minutes
HEAD_SECONDS = 45  # without an answer of a cluster's head; Ray itself ends the process after 60
WATCH_SECONDS = 2.0  # between looks at it

try:
    Path.home()
except RuntimeError:  # a container's user may have none, which ray.train and others need at import
    os.environ["HOME"] = tempfile.gettempdir()


BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "high": (operator.le, "at most"),
    "below": (operator.lt, "below"),
    "multiple_of": (lambda number, divisor: number % divisor == 0, "a multiple of"),
}


def option(
    default: Any = dataclasses.MISSING, *, help: str, positional: bool = False, **bounds: float
) -> Any:
    """Declare a dataclass field as a flag. positional: a tuple given without its flag. bounds: by
    the names in BOUNDS, what `check_bounds` allows."""
    metadata = {"help": help, "positional": positional, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


def check_bounds(config: Any) -> None:
    """Raise ValueError for the first field of a dataclass outside its `option` bounds. Call it from
    `__post_init__`. None passes; of a tuple every value is checked."""
    for field in dataclasses.fields(config):
        bounds = field.metadata.get("bounds", {})
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or not bounds:
                continue
            allowed = (BOUNDS[name][0](number, bound) for name, bound in bounds.items())
            if not (math.isfinite(number) and all(allowed)):
                texts = (f"{BOUNDS[name][1]} {bounds[name]:g}" for name in BOUNDS if name in bounds)
                raise ValueError(f"{flag(field.name)} {number} is out of range: {', '.join(texts)}")


def flag(name: str) -> str:
    """Return the flag of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def parse(
    config_type: type[Config],
    argv: Sequence[str] | None,
    description: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    implied_presets: Mapping[str, str] | None = None,
) -> Config:
    """Fill a dataclass from command-line flags: field `batch_size` is flag `--batch-size`. A field
    that is a dataclass is a group of flags; a bool becomes `--x/--no-x`; a tuple takes several
    values. presets: by the name given as --preset, the values of flags that are not given;
    implied_presets: by the name of a flag, the preset that it stands for. A ValueError of the
    dataclasses' own checks is a usage error."""
    module = sys.modules["__main__"].__spec__
    program = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the help names no default of None
    )
    _add_flags(parser, config_type)
    preset: dict[str, Any] = {}
    if presets is not None:
        chooser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
        implied = implied_presets or {}
        for name in ("preset", *implied):
            chooser.add_argument(flag(name))
        given = vars(chooser.parse_known_args(argv)[0])
        names = [given["preset"]] if "preset" in given else [implied[name] for name in given]
        for name in names:
            preset = {"preset": name, **presets.get(name, {})}
        # A tuple as the parser's default would be extended by the flag's values.
        parser.set_defaults(**{k: v for k, v in preset.items() if not isinstance(v, tuple)})
    values = preset | {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(argv)).items()
    }
    try:
        return _build(config_type, values)
    except ValueError as error:
        parser.error(str(error))


def _add_flags(parser: argparse.ArgumentParser, config_type: Any) -> None:
    types_by_name = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        annotation = types_by_name[field.name]
        if dataclasses.is_dataclass(annotation):
            _add_flags(parser, annotation)
        else:
            _add_flag(parser, field, annotation)


def _build(config_type: Any, values: Mapping[str, Any]) -> Any:
    types_by_name = typing.get_type_hints(config_type)
    arguments = {}
    for field in dataclasses.fields(config_type):
        annotation = types_by_name[field.name]
        if dataclasses.is_dataclass(annotation):
            arguments[field.name] = _build(annotation, values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return config_type(**arguments)


def _add_flag(
    parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]", annotation: Any
) -> None:
    text = field.metadata.get("help", "").replace("%", "%%")
    options: dict[str, Any] = {"help": text}
    if field.default is dataclasses.MISSING:
        options["required"] = True
    elif field.default not in (None, ""):
        options["default"] = field.default
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        # X of X | None; of int | str the text, which the dataclass reads
        annotation = [a for a in typing.get_args(annotation) if a is not types.NoneType][-1]
    if annotation is bool:
        parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **options)
        return
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
        if field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="+", type=annotation, help=text)
            return
        # --run A B and --run A --run B alike; a default would be extended, so `parse` leaves it out
        options |= {"nargs": "+", "action": "extend", "default": argparse.SUPPRESS}
    elif typing.get_origin(annotation) is typing.Literal:
        options["choices"] = typing.get_args(annotation)
        annotation = str
    parser.add_argument(flag(field.name), type=annotation, **options)


_received: list[int] = []  # signals, whose numbers are lost where Ray raises in our place


def _interrupt(number: int, _: types.FrameType | None) -> None:
    _received.append(number)
    os.write(2, b"\nstopping; this can take some seconds\n")  # print may be what was interrupted
    raise KeyboardInterrupt(number)


def run(main: Callable[[], None]) -> None:
    """Run a command: a known error becomes one line on standard error and exit code 1. SIGTERM and
    Ctrl-C raise KeyboardInterrupt in it; they end with a line and 128 + the signal's number."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell sets it for background jobs
            signal.signal(number, _interrupt)
    try:
        main()
        gc.freeze()  # at the exit Python would search all objects of torch: half a second
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print("interrupted; the same command finishes the work", file=sys.stderr)
        sys.exit(128 + (error.args or _received[-1:] or [signal.SIGINT])[0])


def record(config: Any) -> dict[str, Any]:
    """Return what is saved with every output: the resolved configuration, the git commit, the
    project's version, and those of its packages, None where one is not installed."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"  # a job's working directory is sent to the cluster without .git
    return {
        "configuration": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "commit": commit,
        "version": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03, or 2:03 under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressPrinter:
    """Print `40 of 100 images, 12 images/s, ETA 0:05`: at most a line every LINE_SECONDS, and the
    last one once. On a terminal, `in_place` redraws the line each time."""

    def __init__(self, *, in_place: bool = False) -> None:
        self.in_place = in_place
        self.started = self.last = time.monotonic()
        self.ended = False

    def show(
        self,
        done: int,
        total: int,
        *,
        resumed: int = 0,
        note: str = "",
        seconds: float | None = None,
    ) -> None:
        """Print the line where it is due. resumed: images of `done` that an earlier run finished.
        seconds: this run's time, by default since the printer was made."""
        now = time.monotonic()
        due = self.in_place or now - self.last >= LINE_SECONDS
        if self.ended or not (due or done == total):
            return
        self.last, self.ended = now, done == total
        seconds = seconds or now - self.started
        line = progress_line(done, total, seconds=seconds, resumed=resumed, note=note)
        if self.in_place:
            print(f"\r{line}\x1b[K", end="\n" if self.ended else "", flush=True)
        else:
            print(line, flush=True)


def progress_line(
    done: int, total: int, *, seconds: float, resumed: int = 0, note: str = ""
) -> str:
    """Return the counts, the note, images per second of this run and the time left."""
    rate = (done - resumed) / seconds if seconds else 0.0
    left = duration((total - done) / rate) if rate else "unknown"
    middle = f", {note}" if note else ""
    return f"{done} of {total} images{middle}, {rate:.0f} images/s, ETA {left}"


def connect_ray(*, dashboard: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS names, as within `ray job submit`, or start one here, with
    a dashboard if asked for. Left to itself Ray would also join any cluster once started on this
    machine. Raises UserError where no cluster answers, or Ray does not start."""
    import ray  # here: commands that need no Ray start in a tenth of the time

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # Given here, Ray writes no token into the home folder, which a container may lack.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # how to opt out
    else:
        _check_cluster(address)
    handler = signal.getsignal(signal.SIGTERM)
    error = _start_ray(address, dashboard)
    if error is not None:
        error = _start_ray(address, dashboard)  # a busy machine may have been too slow
    signal.signal(signal.SIGTERM, handler)  # Ray sets its own
    if error is not None:
        raise UserError(
            f"Ray did not start, tried twice ({_first_line(error)}). End other work on this "
            "machine; if no folder can be written to, set RAY_TMPDIR"
        ) from error
    if address != "local":
        threading.Thread(target=_watch_head, daemon=True).start()


def _watch_head() -> None:
    """End this process with a line when the head of the cluster is gone, or was started anew and
    knows nothing of this job. In a thread of its own, since Ray's calls may wait for ever."""
    import ray
    from ray._private.worker import global_worker

    client = global_worker.gcs_client
    address, cluster = client.address, client.cluster_id
    host, _, port = address.rpartition(":")
    answered = time.monotonic()
    while ray.is_initialized():
        time.sleep(WATCH_SECONDS)
        found = None
        with suppress(Exception):  # Ray's, or the connection's
            socket.create_connection((host.strip("[]"), int(port)), timeout=WATCH_SECONDS).close()
            found = type(client)(address=address).cluster_id  # a new head may be up at once
        if found == cluster:
            answered = time.monotonic()
        silent = time.monotonic() - answered > HEAD_SECONDS
        if ray.is_initialized() and (silent or found not in (None, cluster)):
            sys.stdout.flush()
            reason = "was started anew" if found else f"has not answered for {HEAD_SECONDS} s"
            line = f"error: the head of the Ray cluster, {address}, {reason}; "
            print(f"{line}once it runs, the same command goes on", file=sys.stderr, flush=True)
            os._exit(1)


def check_hosts(*files: str | Path) -> None:
    """Raise UserError, naming the host, where one of a cluster that RAY_ADDRESS names has other
    versions or another state of this project's code than this process, or does not see `files`,
    which may be local folders. Not of hosts that join later."""
    if not os.environ.get("RAY_ADDRESS"):
        return
    import ray
    from ray.exceptions import NodeDiedError, TaskUnschedulableError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own, task = host_facts(), ray.remote(num_cpus=0, max_retries=0)(host_facts)
    answers = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"host {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            answers[name] = task.options(scheduling_strategy=there).remote(*files)
    for name, answer in answers.items():
        try:
            facts = ray.get(answer, timeout=HOST_SECONDS)
        except (NodeDiedError, TaskUnschedulableError):  # the host is gone since
            continue
        except Exception as error:  # Ray's, or the task's own
            cause = getattr(error, "cause", None) or error
            raise UserError(f"{name} cannot work for this job: {_first_line(cause)}") from error
        for what, value in own.items():
            if facts[what] != value:
                raise UserError(
                    f"{name} has {what} {facts[what]}, this one {value}; install the same "
                    "everywhere, or submit the code with ray job submit --working-dir"
                )


def host_facts(*files: str | Path) -> dict[str, str | None]:
    """Return what must be the same on all hosts, by name. Raises UserError for a file that this
    host does not see."""
    for file in files:
        is_folder = not is_remote(file) and local_path(file).is_dir()
        # A folder that is not mounted is an empty one.
        if not (any(os.scandir(local_path(file))) if is_folder else is_file(file)):
            raise UserError(
                f"it does not see {file}; give a folder that all hosts mount, or a URI (s3://...)"
            )
    code = hashlib.sha256()
    for folder in ("jobs", "model", "pipeline"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            code.update(path.read_bytes())
    packages = {name: _version(name) for name in PACKAGES}
    return {"Python": platform.python_version(), **packages, "code": code.hexdigest()[:12]}


def _start_ray(address: str, dashboard: bool) -> BaseException | None:
    """Connect to Ray. Return the error where that fails."""
    import ray

    try:  # jobs print what their users need themselves
        ray.init(address, include_dashboard=dashboard, logging_level="warning", log_to_driver=False)
    except (Exception, SystemExit) as error:  # Ray raises bare ones
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            raise KeyboardInterrupt(signal.SIGTERM) from None
        ray.shutdown()
        return error
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_cluster(address: str) -> None:
    """Raise UserError where no Ray cluster answers at an address."""
    reason = ""
    if ADDRESS.fullmatch(address):
        command = [sys.executable, *["-m", "ray.scripts.scripts", "health-check", "--address"]]
        command.append(address)
        try:
            subprocess.run(command, capture_output=True, check=True, timeout=CLUSTER_SECONDS)
            return
        except subprocess.TimeoutExpired:
            reason = f" within {CLUSTER_SECONDS} s"
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines()
            reason = f" ({(lines or ['no reason given'])[-1]})"
    raise UserError(
        f"no Ray cluster answers at RAY_ADDRESS={address}{reason}; give its head as HOST:PORT "
        "(the port is 6379 by default), or unset it to run on this machine"
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain-text table; the first column flush left, the others flush right."""
    cells = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
