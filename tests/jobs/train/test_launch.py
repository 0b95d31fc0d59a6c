"""How the driver of a training answers an interruption."""

import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from jobs.train import launch, worker
from jobs.train.checkpoints import REQUEST_NAME, write_checkpoint
from jobs.train.config import ResourcesConfig
from jobs.train.worker import train_worker
from pipeline.errors import UserError
from pipeline.storage import UnreachableError
from tests.jobs.test_runs import some_tensors
from tests.jobs.train.small import config_for


def interrupt_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    monkeypatch.setattr(launch.ray, "shutdown", Mock())
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)


@pytest.mark.parametrize(
    ("answers", "line"),
    [(True, "goes on from the checkpoint of step 7"), (False, "there is no checkpoint yet")],
)
def test_an_interruption_waits_for_a_checkpoint_and_names_its_step(
    answers: bool,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "REQUEST_SECONDS", 60 if answers else 0)
    request = tmp_path / REQUEST_NAME
    request.touch()  # of an earlier driver, which was killed

    def fit() -> object:
        while not request.exists():
            time.sleep(0.01)
        if answers:
            write_checkpoint(tmp_path, 7, some_tensors(), {}, keep=2)
            request.unlink()
        time.sleep(5)  # workers train on until the driver ends
        return Mock()

    interrupt_soon(monkeypatch)
    with pytest.raises(KeyboardInterrupt) as ended:
        launch._fit(SimpleNamespace(fit=fit), str(tmp_path))
    assert ended.value.args == (signal.SIGTERM,)
    assert line in capsys.readouterr().err
    assert not request.exists()


@pytest.mark.parametrize(
    ("error", "ends"), [(UserError("a bad shard"), True), (UnreachableError("no route"), False)]
)
def test_what_no_attempt_can_mend_is_tried_once(
    error: UserError, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = Mock(side_effect=error)
    monkeypatch.setattr(worker, "run_training", attempts)
    config = config_for(tmp_path, output=tmp_path)
    with pytest.raises(UserError):
        train_worker(config, {}, {})
    if ends:
        assert train_worker(config, {}, {}) == "a bad shard"
        launch._fit(Mock(), str(tmp_path))  # the same command given again tries again
    with pytest.raises(UserError):
        train_worker(config, {}, {})


def test_more_workers_than_a_cluster_has_are_waited_for_and_a_machine_refuses_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch.ray, "cluster_resources", lambda: {"CPU": 2.0})
    resources = ResourcesConfig(workers="3:4")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    launch.check_resources(resources)
    assert "waiting for 3 CPUs; the cluster has 2" in capsys.readouterr().out
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match=r"--workers 3:4 asks for as many CPUs, .* has 2\. "):
        launch.check_resources(resources)
