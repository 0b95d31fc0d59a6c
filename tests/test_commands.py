"""Every command's help, and the commands that README, documents and scripts give."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from tests.e2e.commands import ROOT, run

COMMANDS = ("demo", "evaluate", "inspect", "localize", "preprocess", "report", "train")
DOCUMENTS = ("README.md", "docs/operations.md")
PYTHON = """#!/usr/bin/env bash
printf '%q ' "$@" >> commands && echo >> commands
"""


class ParsedError(Exception):
    """The command line was accepted."""


def module_of(command: str) -> str:
    folder = ROOT / "jobs" / command
    return f"jobs.{command}.__main__" if folder.is_dir() else f"jobs.{command}"


def given_commands(source: Path, folder: Path) -> list[list[str]]:
    """Run a script, or a document's blocks, with a Python that writes down its arguments."""
    stub = folder / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    text = source.read_text()
    if source.suffix == ".md":
        blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        text = "".join(block for block in blocks if "/python -m jobs." in block)
    script = ["bash", "-ec", text, "script", "given/1", "given/2"]
    subprocess.run(script, cwd=folder, check=True, capture_output=True)
    return [shlex.split(line) for line in (folder / "commands").read_text().splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_flags(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    main = importlib.import_module(module_of(command)).main
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_help_names_the_command_as_it_is_run() -> None:
    assert run("-m", "jobs.inspect", "--help").stdout.startswith("usage: python -m jobs.inspect ")


@pytest.mark.parametrize(
    "source",
    [*DOCUMENTS, *(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("*.sh"))],
)
def test_commands_that_are_given_parse(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = cli.parse

    def parse_only(*arguments: object) -> None:
        parse(*arguments)  # type: ignore[arg-type]
        raise ParsedError

    monkeypatch.setattr(cli, "parse", parse_only)
    commands = given_commands(ROOT / source, tmp_path)
    assert commands
    for option, module, *arguments in commands:
        assert option == "-m"
        assert module.removeprefix("jobs.") in COMMANDS
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(ParsedError):
            importlib.import_module(module_of(module.removeprefix("jobs."))).main()
