"""What the commands share: flags and their bounds, progress lines, records, one-line errors."""

import contextlib
import itertools
import os
import signal
import socket
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar
from unittest.mock import Mock

import pytest
import ray

from jobs import cli
from jobs.cli import check_bounds, option, parse
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Nets:
    net_width: int = option(24, help="channels", low=8, multiple_of=8)
    rate: float = option(0.1, help="per step", above=0, below=1)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    output: str = option(help="a folder")
    sides: tuple[int, ...] = option((), help="in pixels", low=1)
    limit: float | None = option(None, help="GiB", above=0)
    size: int | str = option(64, help="of images, pixels")
    nets: Nets = field(default_factory=Nets)

    def __post_init__(self) -> None:
        check_bounds(self)


def test_groups_are_flat_flags() -> None:
    config = parse(Config, ["--output", "o", "--net-width", "16", "--sides", "3", "4"], "")
    assert config == Config(output="o", sides=(3, 4), nets=Nets(net_width=16))
    assert parse(Config, ["--output", "o", "--size", "64x96"], "").size == "64x96"


def test_the_help_names_the_defaults_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], "")
    printed = capsys.readouterr().out
    assert "(default: 24)" in printed
    assert "None" not in printed


def test_presets_reach_groups_and_flags_override_them() -> None:
    presets = {"small": {"net_width": 8, "rate": 0.5}}
    config = parse(Config, ["--output", "o", "--rate", "0.25"], "", presets)
    assert config.nets == Nets(rate=0.25)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--net-width 12", "--net-width 12 is out of range: at least 8, a multiple of 8"),
        ("--net-width 0", "--net-width 0 "),
        ("--rate 1", "--rate 1.0 is out of range: above 0, below 1"),
        ("--rate nan", "--rate nan "),
        ("--limit inf", "--limit inf "),
        ("--sides 4 0", "--sides 0 is out of range: at least 1"),
    ],
)
def test_a_value_out_of_range_is_a_usage_error(
    flags: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(Config, ["--output", "o", *flags.split()], "")
    assert fault in capsys.readouterr().err


def test_a_progress_line_gives_rate_and_time_left_of_this_run() -> None:
    line = cli.progress_line(500, 1000, seconds=3.0, resumed=200, note="2 rejected")
    assert line == "500 of 1000 images, 2 rejected, 100 images/s, ETA 0:05"
    assert cli.progress_line(200, 1000, seconds=3.0, resumed=200).endswith("ETA unknown")


def test_only_due_lines_are_printed_and_the_last_one_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    printer = cli.ProgressPrinter()
    for now in (1.0, 2.0, 5.0, 6.0):
        printer.show(int(now), 8)
    printer.show(8, 8)
    printer.show(8, 8)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" of ")[0] for line in printed] == ["5", "8"]


def test_a_record_has_the_projects_version_and_none_for_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "PACKAGES", ("numpy", "no-such-package"))
    record = cli.record(Config(output="a"))
    project = tomllib.loads((cli.ROOT / "pyproject.toml").read_text())["project"]
    assert record["version"] == project["version"]
    assert record["configuration"]["nets"] == {"net_width": 24, "rate": 0.1}
    assert record["versions"]["numpy"]
    assert record["versions"]["no-such-package"] is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no folder a"), 1),
        (OSError("disk"), 1),
        (KeyboardInterrupt(signal.SIGINT), 130),
        (KeyboardInterrupt(signal.SIGTERM), 143),
    ],
)
def test_known_errors_are_one_line_and_an_exit_code(
    error: BaseException,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main() -> None:
        raise error

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of this process
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_sigterm_that_interrupts_ray_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            cli._interrupt(signal.SIGTERM, None)
        raise KeyboardInterrupt  # as Ray does, without the number

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli, "_received", [])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 143


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "somewhere"])
def test_an_address_that_is_none_is_refused_with_its_variable(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={address}; .* HOST:PORT"):
        cli.connect_ray()


def test_a_cluster_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cli, "CLUSTER_SECONDS", 2)
    with pytest.raises(UserError, match=r"answers at RAY_ADDRESS=127\.0\.0\.1:1 within 2 s"):
        cli.connect_ray()


@pytest.mark.parametrize(
    "failure", [Exception("timed out during startup\nmore"), SystemExit(1), OSError("/tmp/ray")]
)
def test_ray_gets_a_second_try_and_then_one_line(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    tries = Mock(side_effect=[failure, None])
    monkeypatch.setattr(ray, "init", tries)
    cli.connect_ray()
    assert tries.call_count == 2
    monkeypatch.setattr(ray, "init", Mock(side_effect=failure))
    with pytest.raises(UserError, match=r"tried twice \(.*\)\. .*RAY_TMPDIR$"):
        cli.connect_ray()


def test_a_host_with_other_versions_or_without_the_files_is_named(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seen").touch()
    cli.check_hosts(tmp_path / "nothing")  # a machine by itself
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    cli.check_hosts(tmp_path / "seen", tmp_path)
    with pytest.raises(UserError, match=r"^host .*does not see .*/nothing"):
        cli.check_hosts(tmp_path / "seen", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^host .*does not see .*/empty"):
        cli.check_hosts(tmp_path / "empty")
    monkeypatch.setattr(cli, "_version", lambda name: "0.1" if name == "ray" else version(name))
    with pytest.raises(UserError, match=r"^host \S+ \(\S+\) has ray 2\S+, this one 0\.1"):
        cli.check_hosts()


@dataclass
class Client:
    """In place of Ray's, whose head listens at `address`; each one finds another cluster there."""

    address: str
    ids: ClassVar[Iterator[int]] = itertools.count(1)

    def __post_init__(self) -> None:
        self.cluster_id = next(self.ids)


@pytest.mark.parametrize("listens", [False, True])
def test_a_head_that_is_gone_or_another_ends_the_process_with_a_line(
    listens: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = Client(f"127.0.0.1:{server.getsockname()[1] if listens else 1}")
        monkeypatch.setattr(ray._private.worker, "global_worker", Mock(gcs_client=client))
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(cli, "HEAD_SECONDS", 0.2)
        monkeypatch.setattr(cli, "WATCH_SECONDS", 0.1)
        monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            cli._watch_head()
    (line,) = capsys.readouterr().err.splitlines()
    reason = "was started anew" if listens else "has not answered for 0.2 s"
    assert f"{client.address}, {reason}; " in line
