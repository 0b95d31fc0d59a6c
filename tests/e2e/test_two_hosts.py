"""A training over two hosts that share nothing but an S3 server."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.runs import load_nets
from pipeline import storage
from tests import remote
from tests.e2e.commands import words
from tests.hosts import OUTSIDE, short_folder, two_hosts

pytestmark = pytest.mark.slow


def test_two_hosts_with_loopback_names_train_to_s3(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in remote.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with two_hosts() as hosts, short_folder() as folder, remote.s3_server(tmp_path, OUTSIDE) as s3:
        data, output = remote.upload(small_set, s3, "set"), remote.uri(s3, "run")
        for host in hosts:
            host.start_ray(folder)
        flags = words(data=data, output=output, cache=tmp_path / "cache", workers=2)
        small = "--warmup-epochs=1 --epochs=2 --batch-size=16 --net-width=8 --bottleneck=16"
        command = [sys.executable, "-m", "jobs.train", *flags, *small.split(), "--log-interval=1"]
        training = hosts[0].start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        text, errors = training.communicate(timeout=240)
        assert training.returncode == 0, errors
        steps = [line.split(" |")[0] for line in text.splitlines() if line.startswith("step ")]
        assert steps == [f"step {n}/12" for n in range(1, 13)]
        assert storage.read_bytes(storage.join(output, "log.txt")).count(b"step ") == 12
        assert len(storage.read_bytes(storage.join(output, "metrics.jsonl")).splitlines()) == 12
        (events,) = storage.entries(storage.join(output, "tensorboard"))[1].values()
        assert events > 1000
        kept = storage.entries(storage.join(output, "checkpoints"))[0]
        assert sorted(kept) == ["step-000000008", "step-000000012"]
        assert load_nets(output).config.net_width == 8
