"""The import rules of docs/architecture.md."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
FOLDERS = ("pipeline", "model", "jobs", "cluster", "benchmarks", "tests")
COMMANDS = ("preprocess", "inspect", "train", "evaluate", "report", "localize", "serve")
FORBIDDEN = {  # folder: what its files must not import
    "pipeline": {"model", "jobs", "cluster", "benchmarks", "tests"},
    "model": {"pipeline", "jobs", "cluster", "benchmarks", "tests", "ray", "pathlib", "os", "io"},
    "jobs": {"benchmarks", "tests"},
    "cluster": {"pipeline", "model", "jobs", "benchmarks", "tests"},
    "pipeline/sources": {"pipeline.shards", "pipeline.loading", "pipeline.evaluation", "torch"},
    "pipeline/shards": {"pipeline.loading", "pipeline.evaluation"},
    "pipeline/loading": {"pipeline.sources", "pipeline.evaluation"},
    "pipeline/evaluation": {"pipeline.shards", "pipeline.loading", "torch", "ray"},
} | {
    f"jobs/{command}": {f"jobs.{other}" for other in COMMANDS if other != command}
    for command in COMMANDS
}
ONLY_IN = {
    "fast_slic": {"pipeline/shards/superpixels.py"},
    "nvidia": {"pipeline/loading/loader.py"},
    "torch.distributed": {"jobs/train/collectives.py"},
    "ray": {
        "pipeline/tasks.py",
        "pipeline/shards/make.py",
        "jobs/cli.py",
        "jobs/evaluate/tasks.py",
        "jobs/serve/replica.py",
        "jobs/train/cluster.py",
        "jobs/train/launch.py",
        "jobs/train/worker.py",
        "jobs/train/log.py",
    },
}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@functools.cache
def imports(path: Path) -> set[str]:
    """Full names of all modules and names imported anywhere in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def defined(module: str) -> set[str]:
    """The names that a module of the project defines itself, not those that it imports."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        return {child.stem for child in (ROOT / module.replace(".", "/")).iterdir()}
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names


def importers(module: str, folders: tuple[str, ...]) -> set[str]:
    """The files in these folders that import a module or something of it."""
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in files(folder)
        if any(f"{name}.".startswith(f"{module}.") for name in imports(path))
    }


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_folders_import_only_what_they_may(folder: str) -> None:
    for module in FORBIDDEN[folder]:
        assert importers(module, (folder,)) == set(), f"{folder} imports {module}"


@pytest.mark.parametrize("module", sorted(ONLY_IN))
def test_special_libraries_are_imported_in_the_files_named(module: str) -> None:
    assert importers(module, ("pipeline", "model", "jobs", "cluster")) == ONLY_IN[module]


def test_a_name_is_imported_from_the_file_that_defines_it() -> None:
    for path in (path for folder in FOLDERS for path in files(folder)):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            module = node.module or ""
            if module.split(".")[0] in FOLDERS:
                missing = {alias.name for alias in node.names} - defined(module)
                assert not missing, f"{path.relative_to(ROOT)} imports {missing} from {module}"


def test_packages_are_empty_so_that_names_have_one_home() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            assert path.read_text() == "", path


@pytest.mark.parametrize("path", [*files("pipeline"), *files("model")], ids=lambda p: p.stem)
def test_libraries_name_no_flag_and_no_command(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.findall(r"(?<!tar )--[a-z][a-z-]*|\bjobs\.\w+", node.value)
            assert not named, f"{path.relative_to(ROOT)}:{node.lineno} names {named}"


def test_the_list_of_files_is_the_tree() -> None:
    """docs/architecture.md has an indented tree of names, each with a description after spaces."""
    (block,) = re.findall(r"^```\n(pipeline/.*?)^```$", DOCUMENT.read_text(), re.M | re.S)
    listed, folders = set(), dict[int, str]()
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path = "".join(folders[level] for level in range(depth)) + name
        if name.endswith("/"):
            folders[depth] = name
        else:
            listed.add(path)
    command = ["git", "ls-files", *sorted({path.split("/")[0] for path in listed})]
    tracked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    tree = {
        path
        for path in tracked.stdout.splitlines()
        if not path.endswith("__init__.py") and not path.startswith("benchmarks/results/")
    }
    assert sorted(tree - listed) == [], "not in the list"
    assert sorted(listed - tree) == [], "not in the tree"


def loaded(modules: list[str], heavy: set[str]) -> set[str]:
    """Which heavy packages a process has loaded that imports these modules."""
    code = f"import sys, {', '.join(modules)}; print(*{heavy!r} & sys.modules.keys())"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return set(result.stdout.split())


def test_drivers_import_neither_dali_nor_fast_slic() -> None:
    drivers = ["jobs.evaluate.sources", "jobs.inspect.__main__", "jobs.train.launch"]
    drivers += ["jobs.train.checks", "pipeline.shards.make", "jobs.preprocess.preview"]
    assert loaded(drivers, {"nvidia.dali", "fast_slic", "cfast_slic"}) == set()


def test_flags_are_read_without_packages_that_take_seconds_to_load() -> None:
    commands = [f"jobs.{command}.__main__" for command in COMMANDS]
    slow = {"torch", "ray", "pandas", "numba", "matplotlib", "scipy", "nvidia.dali", "fast_slic"}
    assert loaded([*commands, "jobs.demo", "jobs.shipped"], slow) == set()
