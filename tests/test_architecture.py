"""The import rules of docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "model", "jobs", "cluster", "benchmarks", "tests")
FORBIDDEN = {
    "pipeline": {"model", "jobs", "cluster", "benchmarks", "tests"},
    "model": {"pipeline", "jobs", "cluster", "benchmarks", "tests", "ray", "pathlib", "os", "io"},
    "jobs": {"benchmarks", "tests"},
    "cluster": {"pipeline", "model", "jobs", "benchmarks", "tests"},
}
ONLY_IN = {
    "fast_slic": {"pipeline/shards/superpixels.py"},
    "nvidia": {"pipeline/loading/loader.py"},
    "torch.distributed": {"jobs/train/trainer.py"},
}


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of all modules imported anywhere in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_rooms_open_only_the_stated_doors(room: str) -> None:
    for path in files(room):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & FORBIDDEN[room], f"{path.relative_to(ROOT)}"


@pytest.mark.parametrize("module", sorted(ONLY_IN))
def test_heavy_parts_have_one_importer(module: str) -> None:
    importers = {
        str(path.relative_to(ROOT))
        for room in ("pipeline", "model", "jobs", "cluster")
        for path in files(room)
        if any(name == module or name.startswith(f"{module}.") for name in imports(path))
    }
    assert importers == ONLY_IN[module]


def test_in_the_pipeline_only_preprocessing_and_its_tasks_know_ray() -> None:
    importers = {
        path.name
        for path in files("pipeline")
        if any(name.split(".")[0] == "ray" for name in imports(path))
    }
    assert importers == {"preprocess.py", "tasks.py"}


def test_packages_are_empty_so_that_names_have_one_home() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("__init__.py"):
            assert path.read_text() == "", path


@pytest.mark.parametrize("job", ["preprocess", "train", "evaluate", "inspect"])
def test_drivers_import_neither_dali_nor_fast_slic(job: str) -> None:
    code = (
        f"import jobs.{job}, sys; "
        "print([m for m in ('nvidia.dali', 'fast_slic', 'cfast_slic') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"
