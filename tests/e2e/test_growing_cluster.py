"""A job on a head without CPUs, to which Ray's autoscaler adds hosts: those of its provider for
tests, which are processes of this machine."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from pipeline.shards.format import read_manifest, split_of
from pipeline.synthetic import SyntheticConfig, write_synthetic
from tests.e2e.commands import ROOT, environment, words
from tests.hosts import RAY, short_folder
from tests.remote import free_port

pytestmark = pytest.mark.slow
SHRUNK = """
import ray, time
ray.init(logging_level="error", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) > 1:
    time.sleep(0.2)
"""


def cluster_config(port: int) -> dict:
    """Our cluster with up to two hosts of one CPU each, of the provider for tests."""
    config = yaml.safe_load((ROOT / "cluster" / "own_machines.yaml").read_text())
    provider = {
        "type": "external",
        "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
        "gcs_address": f"127.0.0.1:{port}",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
    }
    memory = {"object_store_memory": 100_000_000}
    types = {
        FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 1, **memory}, "node_config": {}, "max_workers": 2},
    }
    return config | {
        "provider": provider,
        "available_node_types": types,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "auth": {},
        "min_workers": 0,
        "cluster_synced_files": [],
        "idle_timeout_minutes": 0.05,
    }


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """A head without CPUs; yields the environment that reaches it."""
    port, agent = free_port(), free_port()
    variables = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_ADDRESS=f"127.0.0.1:{port}",
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="1",  # as with KubeRay
        AUTOSCALER_UPDATE_INTERVAL_S="1",
    )
    own = {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
    own["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = FAKE_HEAD_NODE_ID
    with short_folder() as folder:
        (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster_config(port)))
        command = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false"]
        command += [f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
        command += [f"--autoscaling-config={folder / 'cluster.yaml'}", f"--temp-dir={folder}"]
        with (folder / "head.log").open("w") as log:
            head = subprocess.Popen(
                command,
                env=variables | own,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            check = [RAY, "health-check"]
            while subprocess.run(check, env=variables, capture_output=True).returncode:
                assert head.poll() is None, (folder / "head.log").read_text()
            yield variables
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def test_a_cluster_grows_for_the_tasks_of_a_job_and_shrinks(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    write_synthetic(tmp_path / "images", SyntheticConfig(train_images=64, val_images=16))
    flags = words(source=tmp_path / "images", output=tmp_path / "shards", samples_per_shard=8)
    job = ["-m", "jobs.preprocess", *flags, *words(image_size=32, superpixels=25)]
    for command in (job, ["-c", SHRUNK]):
        result = subprocess.run(
            [sys.executable, *command],
            env=cluster,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    assert split_of(read_manifest(tmp_path / "shards"), "train").images == 64
