"""Scoring of boxes from any place: the real ILSVRC ground truth, and small cases by hand."""

import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.evaluate import __main__ as job
from jobs.evaluate import scorer
from jobs.evaluate.config import EvaluateConfig
from model.localization import RULES
from pipeline.errors import UserError
from pipeline.evaluation.results import Evaluation, Row, RowFigures, read_evaluation, write_maps
from pipeline.evaluation.truth import GroundTruth
from pipeline.storage import locked_file
from tests.pipeline.evaluation.files import write_metadata

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data" / "ilsvrc-val-boxes"


def quiet(done: int, total: int) -> None:
    pass


def scored(ground_truth: Path, output: Path, **options: object) -> Evaluation:
    values: dict = {"ground_truth": ground_truth, "output": output / "evaluation"} | options
    job.evaluate(EvaluateConfig(**values), quiet)
    return read_evaluation(output / "evaluation")


def row_of(evaluation: Evaluation, map: str) -> RowFigures:
    return next(row for row in evaluation.rows if row.row.map == map)


def write_boxes(
    folder: Path, truth: GroundTruth, boxes: list[list[list[int]]], labels: list[list[int]]
) -> Path:
    """Write guesses of each image, best first, as Parquet."""
    path = folder / "boxes.parquet"
    pq.write_table(pa.table({"id": truth.ids, "boxes": boxes, "labels": labels}), path)
    return path


def write_map(folder: Path, image_id: str, values: np.ndarray) -> None:
    path = folder / f"{image_id}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


@pytest.mark.skipif(not DATA.is_dir(), reason="ilsvrc-val-boxes is not in ../shared/data")
@pytest.mark.parametrize(
    ("protocol", "gt_known"), [("devkit", 40.70), ("exclusive", 40.34), ("int224", 41.11)]
)
def test_whole_image_boxes_on_the_real_ilsvrc_val_set(
    protocol: str, gt_known: float, tmp_path: Path
) -> None:
    evaluation = scored(DATA, tmp_path, protocol=protocol)
    whole = row_of(evaluation, "whole image")
    assert round(100 * whole.figures["gt_known"], 2) == gt_known
    assert whole.figures["n"] == 50_000
    if protocol == "devkit":  # a centred box of half the area
        centred = row_of(evaluation, "centred box").figures["gt_known"]
        assert round(100 * centred, 1) == 53.7


@pytest.fixture
def four(tmp_path: Path) -> GroundTruth:
    """Four images of 100 x 80 pixels with boxes by hand; the last one has two."""
    truth = GroundTruth(
        ids=tuple(f"val/image_{i}.JPEG" for i in range(4)),
        labels=np.array([0, 1, 2, 1]),
        sizes=np.array([[80, 100]] * 4),
        boxes=np.array(
            [[0, 0, 49, 39], [10, 10, 29, 29], [0, 0, 99, 79], [0, 0, 9, 9], [60, 40, 99, 79]]
        ),
        starts=np.array([0, 1, 2, 3, 5]),
        classes=("n00000001", "n00000002", "n00000003"),
        class_names=("one", "two", "three"),
    )
    write_metadata(tmp_path / "meta", truth)
    (tmp_path / "classes.txt").write_text("n00000001 one\nn00000002 two\nn00000003 three\n")
    return truth


def test_given_predictions_by_the_official_rule(four: GroundTruth, tmp_path: Path) -> None:
    boxes = [
        [[0, 0, 49, 39]],  # right
        [[10, 10, 29, 29], [10, 10, 29, 29]],  # the second guess has the class: top-5 only
        [[0, 0, 49, 39]],  # a quarter of the box: wrong
        [[20, 20, 30, 30], [60, 40, 99, 79]],  # the second guess has the box: top-5 only
    ]
    path = write_boxes(tmp_path, four, boxes, [[0], [0, 1], [2], [1, 1]])
    evaluation = scored(
        tmp_path / "meta", tmp_path, predictions=path, classes=tmp_path / "classes.txt"
    )
    assert evaluation.metrics["source"] == {"kind": "boxes", "name": str(path)}
    given = row_of(evaluation, "given")
    assert given.row == Row(map="given", rule=None, classes="boxes")
    row = given.figures
    assert row["gt_known"] == 2 / 4
    assert row["top1_loc"] == 1 / 4
    assert row["top5_loc"] == 3 / 4
    assert (row["top1_cls"], row["top5_cls"]) == (3 / 4, 1.0)
    assert row["errors"]["class_wrong"] == 1
    assert row["errors"]["too_small"] == 1
    assert row["errors"]["elsewhere"] == 1


@pytest.mark.parametrize(("flag", "row"), [("predictions", " 0 0 9 9"), ("classifier", "")])
def test_classes_by_wnid_need_a_list_of_them(
    four: GroundTruth, tmp_path: Path, flag: str, row: str
) -> None:
    path = tmp_path / "given.csv"
    path.write_text("".join(f"{image_id},n00000001{row}\n" for image_id in four.ids))
    with pytest.raises(UserError, match=r"given\.csv line 1 .*wnid.*--classes FILE"):
        scored(tmp_path / "meta", tmp_path, **{flag: path})


def test_score_maps_by_hand(four: GroundTruth, tmp_path: Path) -> None:
    """Maps that are .8 on a true box and .2 elsewhere, but for the last image: all .2."""
    for i in range(4):
        values = np.full((80, 100), 0.2, np.float32)
        x0, y0, x1, y1 = four.boxes[four.starts[i]]
        if i < 3:
            values[y0 : y1 + 1, x0 : x1 + 1] = 0.8
        write_map(tmp_path / "maps", four.ids[i], values)
    evaluation = scored(tmp_path / "meta", tmp_path, score_maps=tmp_path / "maps")
    given, lines = row_of(evaluation, "given"), evaluation.predictions("given", "paper")
    row = given.figures
    # the third map is .8 everywhere and the fourth .2 everywhere: flat, so the box is the image
    assert row["gt_known"] == 3 / 4
    assert row["counts"]["nothing_found"] == 2
    assert lines["found"].to_pylist() == [True, True, False, False]
    # from a threshold of .25 of the maximum, 51 of 204 levels, to 1 the first three are right
    assert row["max_box_acc"] == 3 / 4
    assert row["max_box_acc_threshold"] == 0.25
    assert row["max_box_acc_v2"] == 3 / 4
    assert lines["auc"].to_pylist()[:2] == [1.0, 1.0]
    assert given.subsets["small_boxes"]["n"] == 3
    levels = evaluation.maps([1])[1]
    assert np.unique(levels).tolist() == [51, 204]  # as they are, not stretched
    assert {r.row.rule: r.figures["gt_known"] for r in evaluation.rows if r.row.map == "given"} == (
        dict.fromkeys(RULES, 3 / 4)
    )


def test_the_sweep_at_224_pixels_by_hand(four: GroundTruth, tmp_path: Path) -> None:
    """A map's box is carried as x0, y0, x0 + width, y0 + height, clipped to 223, + 1 as the
    reference evaluator does; the truth is multiplied by 224 / side and truncated."""
    drawn = [
        [(0, 0, 109, 109, 255)],  # truth 0 0 49 39 of 100 x 80 -> 0 0 109 109; box 0 0 110 110
        [(22, 28, 63, 80, 255), (100, 100, 223, 223, 128)],  # truth 22 28 64 81: only from 128 on
        [(0, 0, 223, 223, 255)],  # truth 0 0 221 221; box clipped to 223
        # truths 0 0 20 25 and 134 112 221 221: the second contour, which is never the largest
        [(0, 30, 223, 100, 255), (134, 112, 222, 222, 255)],
    ]
    for image_id, boxes in zip(four.ids, drawn, strict=True):
        values = np.zeros((224, 224))
        for x0, y0, x1, y1, level in boxes:
            values[y0 : y1 + 1, x0 : x1 + 1] = level / 255
        write_map(tmp_path / "maps", image_id, values)
    options: dict = {"protocol": "int224", "score_maps": tmp_path / "maps"}
    evaluation = scored(tmp_path / "meta", tmp_path, **options)
    row = row_of(evaluation, "given").figures
    # below 128 / 255 the larger contour of image 1 hides the right one; int(.502 * 255) = 128
    assert row["max_box_acc"] == 3 / 4
    assert row["max_box_acc_threshold"] == 0.502
    assert row["max_box_acc_v2"] == 1.0  # over all contours every image is right, even at IoU .7
    assert evaluation.predictions("given", "paper")["iou"].to_pylist()[::2] == [
        110 * 110 / 111**2,
        222 * 222 / 224**2,
    ]


def test_a_classifiers_labels_are_those_of_rows_that_have_none(
    four: GroundTruth, tmp_path: Path
) -> None:
    path = tmp_path / "top.csv"
    path.write_text(
        "".join(f"{name},{label}\n" for name, label in zip(four.ids, "0021", strict=True))
    )
    evaluation = scored(tmp_path / "meta", tmp_path, classifier=path)
    whole = row_of(evaluation, "whole image")
    assert whole.row.classes == "file"
    shares = [whole.figures[name] for name in ("top1_cls", "gt_known", "top1_loc")]
    assert shares == [3 / 4, 1 / 4, 1 / 4]
    assert evaluation.metrics["classifiers"] == {"file": {"top1": 3 / 4, "top5": 3 / 4}}


@pytest.fixture
def forty(tmp_path: Path) -> GroundTruth:
    """Forty images of 300 x 200 pixels, four classes in turn, each with a box in a corner."""
    truth = GroundTruth(
        ids=tuple(f"val/{i}.JPEG" for i in range(40)),
        labels=np.arange(40) % 4,
        sizes=np.array([[200, 300]] * 40),
        boxes=np.array([[1, 1, 99 + i, 190] for i in range(40)]),
        starts=np.arange(41),
        classes=None,
        class_names=None,
    )
    write_metadata(tmp_path / "meta", truth)
    return truth


@pytest.mark.parametrize(
    ("renumbered", "wrong", "refused"),
    [
        ([1, 2, 3, 0], 0, True),  # counted from 1, in a ring: every class is another
        ([2, 3, 0, 1], 8, True),
        ([0, 1, 2, 3], 0, False),
        ([1, 0, 2, 3], 0, False),  # two classes confused
        ([1, 1, 1, 1], 0, False),  # always one class
    ],
)
def test_classes_in_another_order_are_refused(
    forty: GroundTruth, tmp_path: Path, renumbered: list[int], wrong: int, refused: bool
) -> None:
    named = np.array(renumbered)[forty.labels]
    named[:wrong] = forty.labels[:wrong][::-1]  # 3 2 1 0 for 0 1 2 3
    path = tmp_path / "top.csv"
    path.write_text("".join(f"{n},{c}\n" for n, c in zip(forty.ids, named, strict=True)))
    if refused:
        share = f"{1 - wrong / 40 if wrong == 0 else 0.8:.1%}"
        with pytest.raises(UserError, match=f"--classifier {path} .* 0.0% .* {share} .*order"):
            scored(tmp_path / "meta", tmp_path, classifier=path)
    else:
        scored(tmp_path / "meta", tmp_path, classifier=path)


@pytest.mark.parametrize(
    ("boxes", "doubt"),
    [
        ([[0, 0, 63, 63]] * 40, "beyond pixel 63"),
        ([[1, 1, 300, 200]] * 40, "no corner is 0"),
        ([[0, 0, 250, 150]] * 40, None),
    ],
)
def test_boxes_that_look_misread_are_noted(
    forty: GroundTruth, tmp_path: Path, boxes: list[list[int]], doubt: str | None
) -> None:
    path = write_boxes(tmp_path, forty, [[box] for box in boxes], [[0]] * 40)
    evaluation = scored(tmp_path / "meta", tmp_path, predictions=path)
    doubts = evaluation.metrics["doubts"]
    assert [f"{path}: " in text and (doubt or "") in text for text in doubts] == [True] * bool(
        doubt
    )
    assert all(f"doubtful: {text}" in job.notes(evaluation, "paper") for text in doubts)


def test_inverted_maps_are_noted(forty: GroundTruth, tmp_path: Path) -> None:
    for image_id, (x0, y0, x1, y1) in zip(forty.ids, forty.boxes.tolist(), strict=True):
        values = np.ones((20, 30))
        values[y0 // 10 : y1 // 10, x0 // 10 : x1 // 10] = 0
        write_map(tmp_path / "maps", image_id, values)
    evaluation = scored(tmp_path / "meta", tmp_path, score_maps=tmp_path / "maps")
    (doubt,) = evaluation.metrics["doubts"]
    assert "maps" in doubt
    assert "inverted" in doubt


def test_any_number_of_threads_scores_maps_alike(
    four: GroundTruth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "IMAGES_PER_PART", 1)
    rng = np.random.default_rng(0)
    for image_id in four.ids:
        write_map(tmp_path / "maps", image_id, rng.random((224, 224)) ** 3)
    evaluations = []
    progress: list[tuple[int, int]] = []
    for workers in (1, 3):
        config = EvaluateConfig(
            ground_truth=tmp_path / "meta",
            output=tmp_path / f"evaluation-{workers}",
            protocol="int224",
            score_maps=tmp_path / "maps",
            workers=workers,
        )
        evaluations.append(job.evaluate(config, lambda *counts: progress.append(counts)))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2
    first, second = evaluations
    assert first.rows == second.rows
    assert first.predictions("given", "paper").equals(second.predictions("given", "paper"))


def test_the_job_scores_ground_truth_alone(
    four: GroundTruth, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "eval"
    write_maps(output, 0, b"of an evaluation that was interrupted")
    words = ["--ground-truth", str(tmp_path / "meta"), "--output", str(output)]
    with (
        locked_file(output / job.LOCK_NAME),
        pytest.raises(UserError, match=f"another evaluation into {output}"),
    ):
        job.main(words)
    job.main(words)
    assert not (output / "maps").exists()
    evaluation = read_evaluation(output)
    whole = row_of(evaluation, "whole image").figures
    assert (whole["gt_known"], whole["top1_loc"]) == (1 / 4, None)
    assert [row.row.map for row in evaluation.rows] == ["whole image", "centred box"]
    assert evaluation.images()["boxes"].to_pylist()[3] == [[0, 0, 9, 9], [60, 40, 99, 79]]
    assert (output / "report.html").is_file()
    assert "Whole image" in capsys.readouterr().out


NEEDED = {"numpy", "numba", "llvmlite", "cv2", "pyarrow", "pipeline", "model", "jobs"}
PROGRAM = """
import importlib.abc, json, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in json.loads(sys.argv[1]):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Blocked())
from jobs.evaluate import __main__ as job
from jobs.evaluate import scorer
job.evaluate(job.EvaluateConfig(**{
    name: job.Path(value) for name, value in json.loads(sys.argv[2]).items()
}), lambda done, total: None)
"""


@pytest.mark.parametrize("source", ["predictions", "score_maps"])
def test_files_are_scored_with_few_packages(four: GroundTruth, tmp_path: Path, source: str) -> None:
    """Others are made unimportable, as where they are not installed."""
    boxes = write_boxes(tmp_path, four, [[[0, 0, 9, 9]]] * 4, [[0]] * 4)
    for image_id in four.ids:
        write_map(tmp_path / "maps", image_id, np.eye(10))
    given = {"predictions": boxes, "score_maps": tmp_path / "maps"}[source]
    options = {"ground_truth": tmp_path / "meta", "output": tmp_path / "out", source: given}
    blocked = sorted(packages_distributions().keys() - NEEDED)
    assert {"torch", "ray", "scipy", "pandas"} <= set(blocked)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(blocked), json.dumps(options, default=str)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert row_of(read_evaluation(tmp_path / "out"), "given").figures["n"] == 4


FILES, NONE = {"ground_truth": Path("b")}, Path("/none")
UNUSED: list[tuple[dict, str, dict]] = [  # of no use beside the first flags, without the second
    (FILES, "--data", {"run": NONE, "network": "n", "cache": NONE, "cache_limit": 2.0}),
    (FILES, "--data", {"split": "train"}),
    ({"data": "a"}, "--ground-truth", {"classes": NONE, "image_sizes": NONE}),
    (
        {"data": "a", "run": NONE},
        "--network",
        {"network_weights": NONE, "network_classes": NONE, "network_size": 9},
    ),
    (FILES, "--run", {"baselines": False}),
    (FILES, "--run or --network", {"ten_crops": True, "batch_size": 9, "shards": 9}),
    (
        FILES | {"predictions": NONE},
        "--run or --network or --score-maps",
        {"rule": "mean", "workers": 2},
    ),
]


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        *(
            (mode | {name: value}, f"^--{name.replace('_', '-')} is .*with {users};")
            for mode, users, options in UNUSED
            for name, value in options.items()
        ),
        ({}, "--data.*--ground-truth"),
        ({"data": "a", "ground_truth": Path("b")}, "--data.*--ground-truth"),
        ({"data": "a", "run": Path("r"), "network": "n"}, "--run and --network.*jobs.report"),
        ({"data": "a", "run": Path("r"), "score_maps": Path("s")}, "--run and --score-maps"),
        (
            {
                "data": "a",
                "classifier": Path("c"),
                "network": "timm:resnet18",
                "network_weights": Path("w"),
            },
            "--classifier.*--network",
        ),
        *(
            ({"ground_truth": Path("b"), name: Path("out") / path}, f"--{flag} out/.*--output out ")
            for name, flag, path in (
                ("score_maps", "score-maps", "maps"),
                ("score_maps", "score-maps", "maps.new/../maps/val"),
                ("predictions", "predictions", "predictions.parquet"),
                ("classifier", "classifier", "images.parquet"),
            )
        ),
        ({"data": "a", "centred_box": (0.5, 1.5)}, r"--centred-box 1\.5.*at most 1"),
        ({"data": "a", "centred_box": (0.5, 0.5, 0.5)}, "--centred-box.*one or two"),
        ({"data": "a", "batch_size": 0}, "--batch-size 0.*at least 1"),
        ({"data": "a", "workers": 0}, "--workers 0.*at least 1"),
        ({"data": "a", "cache_limit": 0.0}, "--cache-limit 0.*above 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(options: dict, facts: str) -> None:
    with pytest.raises(ValueError, match=facts):
        EvaluateConfig(output=Path("out"), **options)
