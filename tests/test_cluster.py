from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[1]


def cluster_config() -> dict:
    return yaml.safe_load((ROOT / "ray_config.yaml").read_text())


def test_ray_config_fits_rays_own_schema() -> None:
    validate_config(prepare_config(cluster_config()))


def test_files_that_nodes_mount_exist() -> None:
    for local in cluster_config()["file_mounts"].values():
        assert (ROOT / local).is_file()


def test_runtime_environment_is_one_that_ray_accepts_and_leaves_the_code_in() -> None:
    content = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())
    environment = RuntimeEnv(working_dir=str(ROOT), **content)
    assert environment["excludes"] == content["excludes"]
    for needed in ("jobs", "pipeline", "model"):
        assert f"/{needed}/" not in content["excludes"]
        assert (ROOT / needed).is_dir()
