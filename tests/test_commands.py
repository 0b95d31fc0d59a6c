"""Every command's help, and the commands that README, documents and scripts give."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import cli
from tests.e2e.commands import ROOT, run

COMMANDS = (
    "demo",
    "evaluate",
    "inspect",
    "localize",
    "preprocess",
    "report",
    "serve",
    "shipped",
    "train",
)
DOCUMENTS = ("README.md", "docs/operations.md", "docs/your-photos.md")
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


def test_help_names_the_command_as_it_is_run() -> None:
    assert run("-m", "jobs.inspect", "--help").stdout.startswith("usage: python -m jobs.inspect ")


# What each command needs beside the flag that is tried, and where that flag needs another one.
NEEDED = {
    "demo": "",
    "evaluate": "--data d --output o",
    "inspect": "--data d --output o",
    "localize": "i.jpg",
    "preprocess": "--source s --output o",
    "report": "e --output o",
    "serve": "",
    "shipped": "--run r --images words",
    "train": "--data d --output o",
}
TOGETHER = {
    **{f"evaluate --{name}": "--run r" for name in ("rule", "baselines", "ten-crops", "accurate")},
    "train --preset photos": "--network timm:n",
    "train --co-trained last": "--network timm:n",
}
IN_WORDS = (  # documented beside choices and defaults
    *("preprocess --image-size 64x96", "preprocess --image-size 512", "preprocess --layout cub"),
    *("preprocess --image-format rgb", "preprocess --image-format jpg", "preprocess --verify"),
    *("train --workers 2:8", "train --workers 1"),
    *("evaluate --centred-box 0.5 0.6", "train --target 0.1", "train --target-share 0.65"),
    *("train --averaging 0", "train --logit-limit 0", "train --area-power 1"),
)


def documented(help_text: str) -> Iterator[str]:
    """Yield each flag of a help with each of its choices, its default, or alone where it takes no
    value."""
    entries = re.split(r"\n  (?=-)", help_text.partition("options:\n")[2])
    for entry in map(" ".join, map(str.split, entries)):
        words = re.match(r"(--[\w-]+)(?:, (--no-[\w-]+))?(?: \{(.*?)\})?( [A-Z_]+)?", entry)
        if words is None:
            continue
        flag, negative, choices, value = words.groups()
        default = re.search(r"\(default: ([^ )]+)\)$", entry)
        if choices:
            yield from (f"{flag} {choice}" for choice in choices.split(","))
        elif value is None:
            yield from filter(None, (flag, negative))
        elif default:
            yield f"{flag} {default[1]}"


def parses(command: str, words: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether the command accepts these words beside those that it needs."""
    parse = cli.parse

    def parse_only(*arguments: object) -> None:
        parse(*arguments)  # type: ignore[arg-type]
        raise ParsedError

    flag = words.split()[0].replace("--no-", "--")
    beside = TOGETHER.get(f"{command} {words}") or TOGETHER.get(f"{command} {flag}", "")
    line = f"{NEEDED[command]} {words} {beside}".split()
    with monkeypatch.context() as patch:
        patch.setattr(cli, "parse", parse_only)
        patch.setattr(sys, "argv", [command, *line])
        try:
            importlib.import_module(module_of(command)).main()
        except ParsedError:
            return True
        except SystemExit:
            return False
    raise AssertionError("a command parses, or ends with a usage error")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_value_is_accepted_and_no_number_is_nan_or_infinite(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert not parses(command, "--help", monkeypatch)
    tried = [*documented(capsys.readouterr().out)]
    assert tried or command == "report"  # whose flags have neither choices nor defaults
    tried += [words.partition(" ")[2] for words in IN_WORDS if words.split()[0] == command]
    refused = [words for words in tried if not parses(command, words, monkeypatch)]
    assert [words for words in refused if words not in ("-h", "--help")] == []
    numbers = [words.split()[0] for words in tried if re.fullmatch(r"\S+ [\d.]+", words)]
    taken = [
        f"{flag} {value}"
        for flag in numbers
        for value in ("nan", "inf", "-inf", "1e999", "")
        if parses(command, f"{flag} {value}", monkeypatch)
    ]
    assert taken == []


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


def test_training_starts_for_a_user_without_a_home() -> None:
    """Containers run as users whom nothing knows; ray.train asks for their home at import."""
    code = "import pwd; pwd.getpwuid = lambda _: {}[_]; import jobs.cli, jobs.train.launch"
    environment = {k: v for k, v in os.environ.items() if k != "HOME"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert (result.returncode, result.stderr) == (0, "")
