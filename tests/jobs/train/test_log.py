"""The log of a training, and how the driver shows it."""

import json
from pathlib import Path

import pytest

from jobs.cli import duration
from jobs.runs import LOG_NAME, METRICS_NAME
from jobs.train.launch import following
from jobs.train.log import TrainingLog, line, summary, waiting_summary
from tests.jobs.train.small import metrics, no_room

VALUES = {
    "step": 60,
    "steps": 100,
    "epoch": 3,
    "phase": "adversarial",
    "accuracy": 0.51,
    "target": 0.5,
    "area_weight": 4.25,
    "joint_share": 0.4,
    "area": 0.21,
    "corruption_loss": 1.5,
    "classifier_loss": 0.9,
    "images_per_second": 812.3,
    "waiting": 0.012,
    "eta_seconds": 3723,
}


def test_a_line_names_all_that_is_watched_and_ends_with_the_notes() -> None:
    assert line(VALUES) == (
        "step 60/100 | epoch 4 | joint 40% | corruption loss 1.500 | classifier loss 0.900 | "
        "masked accuracy 0.510 (target 0.500) | lambda 4.25 | area 0.210 | 812 images/s | "
        "waiting 1.2% | ETA 1:02:03"
    )
    imitating = line(VALUES | {"imitation_loss": 0.52})
    assert "| corruption loss 1.500 | imitation loss 0.520 | classifier loss" in imitating
    noted = line(VALUES | {"notes": ["masks are empty", "and more"]})
    assert noted == f"{line(VALUES)} | NOTE: masks are empty | NOTE: and more"


def test_durations_under_an_hour_show_minutes() -> None:
    assert [duration(seconds) for seconds in (0, 61, 3600)] == ["0:00", "1:01", "1:00:00"]


def test_resumed_metrics_have_every_step_once_and_the_log_tells_what_happened(
    tmp_path: Path,
) -> None:
    log = TrainingLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write(VALUES | {"step": step})
    log.close()
    with (tmp_path / METRICS_NAME).open("a") as file:
        file.write('null\n{"step": 40, "ph')  # killed while writing
    log = TrainingLog(tmp_path, 20)
    log.write(VALUES | {"step": 30, "accuracy": 0.6})
    log.close()
    steps = [(values["step"], values["accuracy"]) for values in metrics(tmp_path)]
    assert steps == [(10, 0.51), (20, 0.51), (30, 0.6)]
    lines = (tmp_path / LOG_NAME).read_text().splitlines()
    assert [text.split("/")[0] for text in lines] == ["step 10", "step 20", "step 30", "step 30"]


def test_lines_are_shown_once_each_in_order_from_the_start_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / LOG_NAME
    path.write_text("of an earlier command\n")
    with following(str(path)), path.open("a") as file:
        for number in range(1000):
            file.write(f"line {number}\n")
            if number % 7 == 0:
                file.flush()
    assert capsys.readouterr().out == "".join(f"line {number}\n" for number in range(1000))


def test_the_waiting_share_leaves_the_loaders_start_apart(tmp_path: Path) -> None:
    lines = [
        {"phase": "warmup", "seconds": 12.0, "waiting": 0.25, "first_batch_seconds": 2.0},
        {"phase": "warmup", "seconds": 10.0, "waiting": 0.0, "first_batch_seconds": 0.0},
        {"phase": "adversarial", "seconds": 10.0, "waiting": 0.02, "first_batch_seconds": 0.0},
    ]
    (tmp_path / METRICS_NAME).write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert waiting_summary(tmp_path) == (
        "waiting for data: warmup 5.0%, adversarial 2.0%; for the first batches 2.0 s"
    )


def test_the_summary_tells_each_phase_and_where_it_ended(tmp_path: Path) -> None:
    def interval(step: int, phase: str, **more: float) -> dict:
        timed = {"seconds": 10.0, "images_per_second": 64.0 * step}
        return {"step": step, "phase": phase, "classifier_loss": 1.0, **timed, **more}

    lines = [
        interval(1, "warmup", accuracy=0.5),
        interval(2, "warmup", accuracy=0.6),
        interval(
            4, "adversarial", accuracy=0.5, context_accuracy=0.25, swapped_accuracy=0.35, area=0.3
        ),
        interval(5, "adversarial", accuracy=0.4, area=0.2),
    ]
    (tmp_path / METRICS_NAME).write_text("".join(json.dumps(x) + "\n" for x in lines))
    rows = [text.split() for text in summary(tmp_path).splitlines()[2:]]
    assert rows[0][:6] == ["warmup", "2", "0:20", "96", "0.6", "-"]
    assert rows[1][:8] == ["adversarial", "3", "0:20", "288", "0.4", "-", "0.25", "0.35"]
    assert rows[1][9] == "0.2"


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    for step in (1, 2):
        log.write(VALUES | {"step": step})
    with no_room(), pytest.raises(OSError, match=f"{tmp_path}/{METRICS_NAME}"):
        log.write(VALUES)


def test_intervals_reach_rays_metrics(tmp_path: Path, ray_local: None) -> None:
    log = TrainingLog(tmp_path, 0)
    log.write(VALUES)
    log.close()
    names = {gauge.info["name"] for gauge in log.gauges.values()}
    assert {"aln_accuracy", "aln_classifier_loss"} <= names
