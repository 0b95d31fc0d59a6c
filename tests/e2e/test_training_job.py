"""`python -m jobs.train` with two Ray Train workers: killed, resumed, and failing clearly."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from jobs.cli import parse
from jobs.runs import Nets, load_nets
from jobs.train.__main__ import main
from jobs.train.checkpoints import REQUEST_NAME
from jobs.train.config import PRESETS, TrainConfig
from jobs.train.state import finished_nets
from jobs.train.worker import resume
from pipeline.errors import UserError
from tests.e2e.commands import run
from tests.jobs.kills import kill_driver_when, worker_killed, workers
from tests.jobs.train.small import new_trainer, train_logged

pytestmark = pytest.mark.slow
SMALL = (
    *("--warmup-epochs=2", "--epochs=3", "--batch-size=16"),
    *("--net-width=8", "--bottleneck=16", "--log-interval=1"),
)
WORKER = "RayTrainWorker"


def flags(data: Path, output: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--output", str(output), *SMALL, *more]


def metrics(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a training may be writing the last line
    return [json.loads(line) for line in whole.splitlines()]


def past(output: Path, step: int) -> bool:
    """Return whether the log has this step of 20; every fourth ends an epoch."""
    return any(values["step"] >= step for values in metrics(output))


def weights(nets: Nets) -> torch.Tensor:
    return torch.cat([p.flatten() for net in nets.modules().values() for p in net.parameters()])


@pytest.fixture(scope="module")
def finished(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by the command as a user gives it, with a Ray of its own."""
    output = tmp_path_factory.mktemp("train") / "run"
    result = run("-m", "jobs.train", *flags(small_set, output))
    assert result.returncode == 0, result.stderr
    lines = [text for text in result.stdout.splitlines() if text.startswith("step ")]
    assert lines == (output / "log.txt").read_text().splitlines()
    assert [text.split(" | ")[0] for text in lines] == [f"step {n}/20" for n in range(1, 21)]
    return output


def test_a_run_logs_every_step_and_leaves_what_evaluation_needs(
    finished: Path, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = metrics(finished)
    assert [values["step"] for values in lines] == list(range(1, 21))
    assert {values["phase"] for values in lines} == {"warmup", "adversarial"}
    last = lines[-1]
    needed = {"corruption_loss", "classifier_loss", "accuracy", "area_weight", "area", "phase"}
    assert needed | {"joint_share", "images_per_second", "waiting", "eta_seconds"} <= set(last)
    assert {"clean_accuracy", "context_accuracy", "corruption_rate"} <= set(last)
    assert list((finished / "tensorboard").iterdir())
    pictures = sorted(path.name for path in (finished / "examples").iterdir())
    assert pictures == [f"step-{step:06}.png" for step in (8, 12, 16, 20)]
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == ["step-000000016", "step-000000020"]
    record = json.loads((finished / "run.json").read_text())
    assert record["configuration"]["optimization"]["batch_size"] == 16
    assert record["versions"]["ray"]
    assert torch.isfinite(weights(load_nets(finished))).all()
    main(flags(small_set, finished))
    assert "nothing left to train" in capsys.readouterr().out


@pytest.fixture(scope="module")
def killed(small_set: Path, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of as many workers as Ray has CPUs, two, all of whose processes were killed in the
    third of five epochs."""
    output = tmp_path_factory.mktemp("killed") / "run"
    often = ("--checkpoint-interval=1", "--workers=1:12")
    kill_driver_when(lambda: past(output, 10), "jobs.train", *flags(small_set, output, *often))
    for process in workers(WORKER):
        process.kill()
    assert not (output / "model").exists()
    return output


def test_a_killed_run_resumes_loses_a_worker_and_ends_with_the_same_bits(
    finished: Path, killed: Path, small_set: Path, tmp_path: Path
) -> None:
    """The same command goes on, here with its images in memory; after the death of a worker by
    itself."""
    output = shutil.copytree(killed, tmp_path / "run")
    request = output / REQUEST_NAME

    def past_step_14() -> bool:
        if past(output, 14):
            request.touch()
            return True
        return False

    with worker_killed(WORKER, past_step_14) as dead:
        main(flags(small_set, output, "--checkpoint-interval=3", "--resident"))
    assert dead
    assert not request.exists()
    notes = [note for values in metrics(output) for note in values.get("notes", [])]
    resumed = [note for note in notes if note.startswith("went on from the checkpoint of step ")]
    assert len(resumed) == 2
    assert [values["step"] for values in metrics(output)] == list(range(1, 21))
    assert torch.equal(weights(load_nets(output)), weights(load_nets(finished)))


def test_a_run_goes_on_with_another_number_of_workers(
    finished: Path, killed: Path, small_set: Path, tmp_path: Path
) -> None:
    """Batches, crops and mask samples are the same, so only the rounding of sums may differ."""
    output = shutil.copytree(killed, tmp_path / "run")
    alone = new_trainer(parse(TrainConfig, flags(small_set, output), "", PRESETS))
    resume(alone)
    lines = train_logged(alone, output, alone.steps - alone.state.step)
    for now, together in zip(lines[8:12], metrics(finished)[8:12], strict=True):
        assert now["classifier_loss"] == pytest.approx(together["classifier_loss"], rel=1e-3)
        assert now["accuracy"] == pytest.approx(together["accuracy"], abs=0.07)
    ends = weights(finished_nets(alone.state, alone.model)), weights(load_nets(finished))
    torch.testing.assert_close(*ends, rtol=0.2, atol=0.02)


@pytest.mark.usefixtures("ray_local")
def test_not_a_number_ends_a_run_in_one_attempt(small_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="became NaN or infinite"):
        main(flags(small_set, tmp_path / "run", "--warmup-rate=1e30", "--workers=1"))
    assert not (tmp_path / "run" / "model").exists()
    steps = [values["step"] for values in metrics(tmp_path / "run")]
    assert len(steps) == len(set(steps)) < 10  # another attempt would end the same way
