"""The three jobs through `ray job submit`, on a head started with token authentication."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.evaluation.results import read_evaluation
from pipeline.synthetic import SyntheticConfig, write_synthetic
from tests.e2e.commands import ROOT, environment

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).parent / "ray")
LOGICAL_CPUS = 2  # one for the training worker, one for the job's driver


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node of its own; yields the environment that reaches it with the token."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    port, dashboard, agent = free_port(), free_port(), free_port()
    variables = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{dashboard}",
    )
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--disable-usage-stats"]
    command += [f"--num-cpus={LOGICAL_CPUS}", f"--dashboard-port={dashboard}"]
    # Without an agent of its own, whose port another Ray here may have, a node takes no jobs.
    command += [f"--dashboard-agent-listen-port={agent}"]
    process = subprocess.Popen(
        command,
        env=variables,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        # Listing jobs works before the node's agent, which submitting needs, is up.
        trial = [RAY, "job", "submit", "--", "true"]
        while subprocess.run(trial, env=variables, capture_output=True).returncode:
            assert process.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "the head node did not come up"
            time.sleep(1)
        yield variables
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_submitted_commands_pass_and_one_that_fails_ends_the_job_with_its_line(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    write_synthetic(tmp_path / "images", SyntheticConfig(train_images=64, val_images=16))
    script = """
        python -m jobs.preprocess --source $0/images --output $0/shards --samples-per-shard 20 \\
            --image-size 32 --superpixels 25 &&
        python -m jobs.train --data $0/shards --output $0/run --warmup-epochs 1 --epochs 1 \\
            --workers 1 --net-width 8 --bottleneck 16 --batch-size 16 &&
        python -m jobs.evaluate --data $0/shards --run $0/run --output $0/evaluation &&
        python -m jobs.preprocess --source $0/nowhere --output $0/other"""
    command = [RAY, "job", "submit", "--working-dir", ".", "--entrypoint-num-cpus", "1"]
    command += ["--runtime-env", "cluster/runtime_env.yaml", "--submission-id", "jobs", "--"]
    command += ["sh", "-c", script, str(tmp_path)]
    result = subprocess.run(
        command, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode != 0
    # What `submit` prints may lack the last lines: it ends with the job, not with its log.
    log = subprocess.run(
        [RAY, "job", "logs", "jobs"], env=cluster, capture_output=True, text=True, check=True
    ).stdout
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path}/nowhere" in error
    written = read_evaluation(tmp_path / "evaluation")
    assert written.metrics["images"] == 16
    assert {"whole image", "centred box", "cam", "aln"} <= {row.row.map for row in written.rows}
    assert (tmp_path / "evaluation" / "report.html").stat().st_size > 10_000


def test_the_head_refuses_a_caller_without_the_token(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(secrets.token_hex(32))
    stranger = cluster | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    result = subprocess.run(
        [RAY, "job", "list"], env=stranger, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "token" in (result.stdout + result.stderr).lower()
