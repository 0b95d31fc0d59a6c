import importlib
import json
import re
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from jobs import cli

ROOT = Path(__file__).parents[1]


def cluster_config() -> dict:
    return yaml.safe_load((ROOT / "ray_config.yaml").read_text())


def test_ray_config_fits_rays_own_schema() -> None:
    validate_config(prepare_config(cluster_config()))


def test_files_that_nodes_mount_exist() -> None:
    files = set(cluster_config()["file_mounts"].values()) - {"~/.ray/auth_token"}
    assert len(files) == 2
    for local in files:
        assert (ROOT / local).is_file()


@pytest.mark.parametrize("name", ["ray_config.yaml", "cluster/own_machines.yaml"])
def test_every_node_is_started_with_the_token(name: str) -> None:
    config = yaml.safe_load((ROOT / name).read_text())
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    for kind in ("head", "worker"):
        (start,) = (c for c in config[f"{kind}_start_ray_commands"] if "ray start" in c)
        assert "RAY_AUTH_MODE=token" in start


def test_runtime_environment_is_one_that_ray_accepts_and_leaves_the_code_in() -> None:
    content = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())
    environment = RuntimeEnv(working_dir=str(ROOT), **content)
    assert environment["excludes"] == content["excludes"]
    for needed in ("jobs", "pipeline", "model"):
        assert f"/{needed}/" not in content["excludes"]
        assert (ROOT / needed).is_dir()


def test_own_machines_fit_rays_own_schema() -> None:
    config = yaml.safe_load((ROOT / "cluster" / "own_machines.yaml").read_text())
    validate_config(prepare_config(config))


def test_every_command_given_is_one_of_known_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("README.md", "slurm.sh", "kubernetes_jobs.yaml")
    text = "\n".join((ROOT / "cluster" / name).read_text() for name in files)
    text = re.sub(r"\\?\n(#  )?    +(?=--)", " ", text)
    commands = re.findall(r"python -m (jobs\.\w+) (--.*)", text)
    assert {module for module, _ in commands} == {"jobs.preprocess", "jobs.train", "jobs.evaluate"}
    for module, flags in commands:
        parsed = Mock(side_effect=InterruptedError)
        monkeypatch.setattr(cli, "_build", parsed)
        with pytest.raises(InterruptedError):
            importlib.import_module(f"{module}.__main__").main(flags.split())


def test_the_cluster_of_the_jobs_is_the_one_given_with_a_token() -> None:
    folder = ROOT / "cluster"
    cluster = yaml.safe_load((folder / "kubernetes.yaml").read_text())
    jobs = list(yaml.safe_load_all((folder / "kubernetes_jobs.yaml").read_text()))
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert [job["kind"] for job in jobs] == ["RayJob"] * 3
    for job in jobs:
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


def test_panels_show_metrics_that_there_are() -> None:
    content = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    shown = [target["expr"] for panel in content["panels"] for target in panel["targets"]]
    names = {re.search(r"ray_(\w+)", expression)[1] for expression in shown}  # type: ignore[index]
    code = "".join(path.read_text() for path in (ROOT / "jobs" / "train").glob("*.py"))
    code += "".join(path.read_text() for path in (ROOT / "model").glob("*.py"))
    for name in names:
        if name.startswith("aln_"):
            assert name.removeprefix("aln_").removesuffix("_accuracy").removesuffix("_loss") in code
        else:
            assert name.removeprefix("preprocess_").split("_")[0] in ("images", "rejected")


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "cluster" / "slurm.sh")], check=True)
