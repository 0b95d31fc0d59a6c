"""`python -m jobs.train` with two Ray Train workers: killed, resumed, and failing clearly."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from jobs.runs import load_nets
from tests.e2e.commands import descendants, end, kill_when, run, start, wait_until

pytestmark = pytest.mark.slow
SMALL = (
    *("--warmup-epochs=2", "--epochs=3", "--batch-size=16"),
    *("--net-width=8", "--bottleneck=16", "--log-interval=1"),
)


def train(data: Path, output: Path, *more: str) -> tuple[str, ...]:
    return ("-m", "jobs.train", "--data", str(data), "--output", str(output), *SMALL, *more)


def metrics(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def past_step_10(output: Path) -> bool:
    """In the middle of the third of five epochs."""
    return any(values["step"] >= 10 for values in metrics(output))


def weights(run_folder: Path) -> torch.Tensor:
    nets = load_nets(run_folder)
    parts = (nets.corruption, nets.classifier, nets.clean_classifier)
    return torch.cat([p.flatten() for net in parts for p in net.parameters()])


@pytest.fixture(scope="module")
def finished(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("train") / "run"
    result = run(*train(small_set, output))
    assert result.returncode == 0, result.stderr
    lines = [text for text in result.stdout.splitlines() if text.startswith("step ")]
    assert lines == (output / "log.txt").read_text().splitlines()
    assert [text.split(" | ")[0] for text in lines] == [f"step {n}/20" for n in range(1, 21)]
    return output


def test_a_run_logs_every_step_and_leaves_what_evaluation_needs(finished: Path) -> None:
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
    assert torch.isfinite(weights(finished)).all()


@pytest.fixture(scope="module")
def killed(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose processes were all killed past step 10 of 20."""
    output = tmp_path_factory.mktemp("killed") / "run"
    often = ("--checkpoint-interval", "1")  # which slows it down as well
    kill_when(lambda: past_step_10(output), *train(small_set, output, *often))
    assert not (output / "model").exists()
    return output


def test_a_killed_run_resumes_and_ends_with_the_same_bits(
    finished: Path, killed: Path, small_set: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(killed, tmp_path / "run")
    result = run(*train(small_set, output))
    assert result.returncode == 0, result.stderr
    assert "step 1/" not in result.stdout, "started anew"
    assert [values["step"] for values in metrics(output)] == list(range(1, 21))
    assert torch.equal(weights(output), weights(finished))


def test_after_a_workers_death_the_others_start_again_from_the_last_checkpoint(
    finished: Path, small_set: Path, tmp_path: Path
) -> None:
    """One process of the two is killed, in the middle of an epoch; nobody gives the command
    again."""
    output = tmp_path / "run"
    process = start(*train(small_set, output, "--checkpoint-interval", "3"))
    try:
        wait_until(lambda: any(values["step"] >= 5 for values in metrics(output)), process)
        workers = [n for n, line in descendants(process.pid).items() if "RayTrainWorker" in line]
        os.kill(workers[0], signal.SIGKILL)
        assert process.wait(timeout=240) == 0
    finally:
        end(process)
    notes = [note for values in metrics(output) for note in values.get("notes", [])]
    assert [note[:36] for note in notes] == ["went on from the checkpoint of step "]
    assert [values["step"] for values in metrics(output)] == list(range(1, 21))
    assert torch.equal(weights(output), weights(finished))


@pytest.mark.parametrize("workers", ["1", "1:12"])
def test_a_run_goes_on_with_another_number_of_workers_or_what_the_machine_has(
    finished: Path, killed: Path, small_set: Path, tmp_path: Path, workers: str
) -> None:
    """Batches, crops and mask samples are the same, so only the rounding of sums may differ.
    Twelve workers would be too many for this machine."""
    output = shutil.copytree(killed, tmp_path / "run")
    result = run(*train(small_set, output, "--workers", workers))
    assert result.returncode == 0, result.stderr
    assert "nothing left to train" not in result.stdout
    for now, together in zip(metrics(output)[8:12], metrics(finished)[8:12], strict=True):
        assert now["classifier_loss"] == pytest.approx(together["classifier_loss"], rel=1e-3)
        assert now["accuracy"] == pytest.approx(together["accuracy"], abs=0.07)
    torch.testing.assert_close(weights(output), weights(finished), rtol=0.2, atol=0.02)


def test_a_second_start_on_a_finished_run_does_nothing_and_says_so(
    finished: Path, small_set: Path
) -> None:
    result = run(*train(small_set, finished))
    assert result.returncode == 0
    assert "nothing left to train" in result.stdout


def test_not_a_number_is_one_line_and_a_failure(small_set: Path, tmp_path: Path) -> None:
    result = run(*train(small_set, tmp_path / "run", "--warmup-rate", "1e30"))
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "became NaN or infinite" in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "model").exists()
    steps = [values["step"] for values in metrics(tmp_path / "run")]
    assert len(steps) == len(set(steps)) < 10  # one attempt: another would end the same way
