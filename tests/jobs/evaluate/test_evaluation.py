"""Evaluation of a small generated set with random nets, over Ray."""

import itertools
import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.exceptions import TaskCancelledError

from jobs.evaluate import __main__ as job
from jobs.evaluate.config import EvaluateConfig, Evaluation, check_compatible, evaluate
from jobs.evaluate.scoring import centred_shares, check_coverage, matrix
from jobs.evaluate.tasks import net_maps, ranges, run_parts
from jobs.runs import colour_statistics, load_nets, save_nets
from model.classifier import class_probabilities
from model.evidence import evidence
from model.masking import normalize
from pipeline.errors import UserError
from pipeline.shards.format import Sample, read_manifest
from pipeline.shards.ledger import read_ledger
from tests.jobs.kills import one_worker_killed
from tests.pipeline.made_set import stored_samples

VAL_IMAGES = 24


def quiet(done: int, batches: int) -> None:
    pass


def config_for(data: Path, run: Path, **changes: object) -> EvaluateConfig:
    output = data.parent / "eval"
    options: dict = {"data": str(data), "run": (run,), "output": output, "batch_size": 3}
    return EvaluateConfig(**(options | changes))


@pytest.fixture(scope="module")
def evaluation(small_set: Path, random_run: Path, ray_local: None) -> Evaluation:
    return evaluate(config_for(small_set, random_run, workers=2, shards=1), quiet)


@pytest.fixture(scope="module")
def samples(small_set: Path) -> list[Sample]:
    return stored_samples(small_set, "val")


def component_boxes(above: np.ndarray) -> np.ndarray:
    """Boxes [x0, y0, x1, y1], edges exclusive at the end, of the 8-connected components of a
    mask, the largest first; by spreading the lowest number until nothing changes."""
    numbers = np.where(above, np.arange(1, above.size + 1).reshape(above.shape), above.size + 1)
    while True:
        padded = np.pad(numbers, 1, constant_values=above.size + 1)
        shifts = [
            padded[y : y + len(above), x : x + len(above)] for y in range(3) for x in range(3)
        ]
        spread = np.where(above, np.min(shifts, axis=0), above.size + 1)
        if (spread == numbers).all():
            break
        numbers = spread
    found = []
    for number in np.unique(numbers[above]):
        ys, xs = np.nonzero(numbers == number)
        found.append((-len(ys), xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return np.array(sorted(found))[:, 1:]


@pytest.mark.parametrize(("batches", "shards"), [(1, 1), (5, 2), (7, 7), (3, 10), (100, 7)])
def test_ranges_cover_every_batch_once_and_differ_by_one(batches: int, shards: int) -> None:
    parts = ranges(batches, shards)
    assert [b for first, stop in parts for b in range(first, stop)] == list(range(batches))
    sizes = [stop - first for first, stop in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == min(shards, batches)


@pytest.mark.parametrize("shards", [2, 7])
def test_any_number_of_shards_gives_the_same_figures_to_the_last_digit(
    small_set: Path, random_run: Path, evaluation: Evaluation, shards: int
) -> None:
    seen = []
    config = config_for(small_set, random_run, workers=2, shards=shards)
    other = evaluate(config, lambda done, batches: seen.append((done, batches)))
    assert other.predictions.equals(evaluation.predictions)
    assert json.dumps(other.metrics | {"seconds": 0}) == json.dumps(
        evaluation.metrics | {"seconds": 0}
    )
    assert len(seen) == shards  # 24 images are 8 batches
    assert seen[-1] == (8, 8)
    assert seen == sorted(seen)


def test_ten_crops_change_classes_and_neither_maps_nor_boxes(
    small_set: Path, random_run: Path, samples: list[Sample], evaluation: Evaluation
) -> None:
    cropped = evaluate(config_for(small_set, random_run, workers=2, ten_crops=True), quiet)
    nets = load_nets(random_run)
    images = torch.from_numpy(np.stack([sample.image for sample in samples[:8]]))
    x = normalize(images.permute(0, 3, 1, 2), *colour_statistics(nets.config, images.device))
    for name in ("classifier", "clean_classifier"):
        expected = class_probabilities(getattr(nets, name), x, crops=True).amax(dim=1).tolist()
        scores = cropped.predictions[f"{name}_scores"].to_pylist()
        assert [best[0] for best in scores[:8]] == pytest.approx(expected, rel=1e-4)
        assert scores != evaluation.predictions[f"{name}_scores"].to_pylist()
    for column in ("aln_box", "cam_box", "lrp_box", "layercam_box"):
        assert cropped.predictions[column].equals(evaluation.predictions[column])


def test_ten_crops_without_nets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--ten-crops .* needs --run or --network"):
        EvaluateConfig(ground_truth=tmp_path, output=tmp_path, ten_crops=True)


def test_the_job_says_where_classes_are_from_ten_crops(
    small_set: Path,
    random_run: Path,
    tmp_path: Path,
    ray_local: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--data", small_set, "--run", random_run, "--no-baselines"]
    for output, more in ((tmp_path / "whole", []), (tmp_path / "crops", ["--ten-crops"])):
        job.main([str(flag) for flag in [*flags, "--output", output, *more]])
        said = "from ten crops of each image" in capsys.readouterr().out
        page = (output / "report.html").read_text()
        assert said == ("from ten crops of each image" in page) == bool(more)


def test_a_killed_worker_changes_no_figure(
    small_set: Path, random_run: Path, evaluation: Evaluation
) -> None:
    with one_worker_killed("predict_range") as killed:
        again = evaluate(config_for(small_set, random_run, workers=2, shards=8), quiet)
    assert len(killed) == 1
    assert again.predictions.equals(evaluation.predictions)
    assert json.dumps(again.metrics | {"seconds": 0}) == json.dumps(
        evaluation.metrics | {"seconds": 0}
    )


@pytest.mark.parametrize("deaf", [False, True])
def test_a_failed_part_stops_the_others_and_its_error_comes_as_it_is(
    ray_local: None, tmp_path: Path, deaf: bool
) -> None:
    """Even where the workers ignore interrupts, as those of a job in the background of a script
    do, by which Ray cancels."""
    running = tmp_path / "running"

    @ray.remote(num_cpus=1)
    def part(first: int) -> None:
        if first == 0:
            while not running.exists():
                time.sleep(0.05)
            raise UserError("the map of image 3 is missing")
        if deaf:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        running.touch()
        while True:  # one long sleep could not be interrupted
            time.sleep(0.05)

    submitted = []

    def submit(first: int, stop: int) -> ray.ObjectRef:
        submitted.append(part.remote(first))
        return submitted[-1]

    with pytest.raises(UserError, match=r"^the map of image 3 is missing$"):
        run_parts(submit, [(0, 1), (1, 2), (2, 3)], 2, quiet)
    assert len(submitted) == 2
    with pytest.raises(TaskCancelledError):
        ray.get(submitted[1])


def test_every_image_has_boxes_inside_it_and_best_classes_first(
    small_set: Path, evaluation: Evaluation
) -> None:
    predictions = evaluation.predictions
    ledger = read_ledger(small_set, "val")
    assert predictions["row"].to_pylist() == ledger["row"].to_pylist()
    width, height = predictions["width"].to_numpy(), predictions["height"].to_numpy()
    constant, maps = ("whole_image", "centred_box", "mean_map"), ("cam", "lrp", "gradient")
    for name in (*constant, *maps, "layercam", "aln"):
        boxes = matrix(predictions, f"{name}_box")
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] <= boxes[:, 2:]).all()
        assert (boxes[:, 2] < width).all()
        assert (boxes[:, 3] < height).all()
    for net in ("classifier", "clean_classifier"):
        scores = matrix(predictions, f"{net}_scores")
        assert (np.diff(scores, axis=1) <= 0).all()
        classes = matrix(predictions, f"{net}_classes")
        assert all(len(set(row)) == 5 for row in classes.tolist())


def test_predictions_equal_the_nets_on_each_image_by_itself(
    random_run: Path, samples: list[Sample], evaluation: Evaluation
) -> None:
    nets = load_nets(random_run)
    classes = matrix(evaluation.predictions, "classifier_classes")
    scores = matrix(evaluation.predictions, "classifier_scores")
    boxes = matrix(evaluation.predictions, "aln_box")
    for i, sample in enumerate(samples):
        image = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None].contiguous()
        x = normalize(image, *colour_statistics(nets.config, image.device))
        with torch.no_grad():
            probability = torch.softmax(nets.classifier(x), dim=1)[0].numpy()
            pixels = torch.sigmoid(nets.corruption(x))[0].numpy().astype(np.float64)
        assert classes[i].tolist() == np.argsort(-probability)[:5].tolist()
        np.testing.assert_allclose(scores[i], np.sort(probability)[::-1][:5], rtol=1e-5)
        averaged = np.zeros_like(pixels)
        for k in np.unique(sample.segments):
            averaged[sample.segments == k] = pixels[sample.segments == k].mean()
        above = averaged > 0.7 * averaged.mean() + 0.3 * averaged.max()
        ratios = np.array([sample.meta["width"], sample.meta["height"]] * 2) / 32
        candidates = component_boxes(above) * ratios
        errors = np.abs(candidates - (boxes[i] + [0, 0, 1, 1])).max(axis=1)
        assert errors[0] <= 0.5  # rounded to the nearest edge


def test_metrics_follow_from_the_predictions(small_set: Path, evaluation: Evaluation) -> None:
    """Recomputed from the parquet's columns by plain Python."""
    metrics = evaluation.metrics
    assert list(metrics["methods"]) == [
        "whole_image",
        "centred_box",
        "mean_map",
        *("gradient", "gradient_mean", "gradient_quantile"),
        *("lrp", "lrp_mean", "lrp_quantile"),
        *("cam", "cam_mean", "cam_quantile"),
        *("layercam", "layercam_mean", "layercam_quantile"),
        *("aln", "aln_mean", "aln_quantile"),
        *("aln_clean_class", "aln_clean_class_mean", "aln_clean_class_quantile"),
    ]
    rows = evaluation.predictions.to_pylist()
    for name, row in metrics["methods"].items():
        box = name.replace("_clean_class", "")
        net = "classifier" if name in ("aln", "aln_mean", "aln_quantile") else "clean_classifier"
        ious = []
        for image in rows:
            a, best = image[f"{box}_box"], 0.0
            for b in image["boxes"]:
                shared = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
                shared *= max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
                areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
                best = max(best, shared / (sum(areas) - shared))
            ious.append(best)
        right = [image[f"{net}_classes"][0] == image["label"] for image in rows]
        both = [iou >= 0.5 and r for iou, r in zip(ious, right, strict=True)]
        assert row["gt_known"] == sum(iou >= 0.5 for iou in ious) / VAL_IMAGES
        assert row["top1_loc"] == sum(both) / VAL_IMAGES
        assert row["top1_cls"] == sum(right) / VAL_IMAGES
        assert row["mean_iou"] == pytest.approx(sum(ious) / VAL_IMAGES, rel=1e-12)
        assert row["n"] == VAL_IMAGES
        assert sum(part["n"] for part in row["classes"].values()) == VAL_IMAGES
        assert sum(row["errors"].values()) == VAL_IMAGES
        assert row["errors"]["right"] == sum(both)
        assert row["interval"]["gt_known"][0] <= row["gt_known"] <= row["interval"]["gt_known"][1]
        assert row["protocols"]["devkit"]["gt_known"] == row["gt_known"]
        assert row["max_box_acc"] >= (0 if row["from_map"] else row["gt_known"])
    assert metrics["classifier"]["top1"] == metrics["methods"]["aln"]["top1_cls"]
    assert metrics["clean_classifier"]["top1"] == metrics["methods"]["cam"]["top1_cls"]
    assert metrics["classifier"]["top5"] >= metrics["classifier"]["top1"]


def test_the_auc_of_a_map_is_that_of_its_pixels_against_the_boxes(
    random_run: Path, samples: list[Sample], evaluation: Evaluation
) -> None:
    """By comparing every pixel inside the boxes with every one outside."""
    nets = load_nets(random_run)
    for i in (0, 7, 23):
        sample = samples[i]
        image = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None].contiguous()
        segments = torch.from_numpy(sample.segments.astype(np.int64))[None]
        labels = torch.tensor([sample.label])
        cam = net_maps(nets, image, segments, labels, 25, baselines=True, crops=False)[1]["cam"][
            0
        ].astype(np.float64)
        levels = np.floor((cam - cam.min()) / (cam.max() - cam.min()) * 255)
        inside = np.zeros((32, 32), bool)
        scale = 32 / np.array([sample.meta["width"], sample.meta["height"]] * 2)
        for box in np.array(sample.meta["boxes"]):
            x0, y0 = np.floor(box[:2] * scale[:2] + 0.5).astype(int)
            x1, y1 = np.floor((box[2:] + 1) * scale[2:] + 0.5).astype(int)
            inside[y0:y1, x0:x1] = True
        a, b = levels[inside][:, None], levels[~inside][None]
        expected = ((a > b) + 0.5 * (a == b)).mean()
        assert evaluation.predictions["cam_auc"][i].as_py() == pytest.approx(expected, abs=0.002)


def test_the_centred_box_is_fixed_on_train_boxes_or_said_to_be_half_the_area(
    small_set: Path, evaluation: Evaluation
) -> None:
    manifest = read_manifest(small_set)
    shares, source = centred_shares(str(small_set), manifest, None)
    assert "train split" in source
    row = evaluation.metrics["methods"]["centred_box"]
    assert row["shares"] == {"height": shares[0], "width": shares[1]}
    assert row["source"] == source
    without_train = replace(manifest, splits={"val": manifest.splits["val"]})
    (height, width), source = centred_shares(str(small_set), without_train, None)
    assert height * width == pytest.approx(0.5)
    assert "half" in source
    assert centred_shares(None, None, (0.5, 0.25))[0] == (0.5, 0.25)
    assert centred_shares(None, None, (0.5,))[0] == (0.5, 0.5)


def test_coverage_names_missing_double_and_unknown_rows() -> None:
    ledger = pa.table({"row": [4, 5, 6, 7], "id": ["a", "b", "c", "d"]})
    check_coverage(np.array([7, 4, 6, 5]), ledger)
    with pytest.raises(UserError, match=r"images missing: 1, ledger rows 5 \(b\)"):
        check_coverage(np.array([4, 6, 7]), ledger)
    with pytest.raises(
        UserError, match=r"images evaluated more than once: 2, ledger rows 4 \(a\), 6 \(c\)"
    ):
        check_coverage(np.array([4, 4, 5, 6, 6, 7]), ledger)
    with pytest.raises(UserError, match=r"images unknown to the ledger: 1, ledger rows 9"):
        check_coverage(np.array([4, 5, 6, 7, 9]), ledger)
    many = pa.table({"row": range(20), "id": [str(i) for i in range(20)]})
    with pytest.raises(UserError, match="and 15 more"):
        check_coverage(np.zeros(0, np.int64), many)


def test_nets_and_shards_of_different_classes_or_sizes_are_refused_in_one_line(
    small_set: Path, random_run: Path
) -> None:
    manifest = read_manifest(small_set)
    config = load_nets(random_run).config
    check_compatible(random_run, config, str(small_set), manifest)
    other = replace(config, classes=(*config.classes[1:], "n99999999"))
    with pytest.raises(UserError, match="checkpoint and shards with different classes") as caught:
        check_compatible(random_run, other, str(small_set), manifest)
    assert "7 of them in common" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"trained at 64x32.*holds 32x32"):
        check_compatible(random_run, replace(config, height=64), str(small_set), manifest)


def test_diverged_nets_are_one_clear_error_from_the_task(
    small_set: Path, random_run: Path, tmp_path: Path, ray_local: None
) -> None:
    nets = load_nets(random_run)
    with torch.no_grad():
        nets.corruption.output.weight.fill_(torch.nan)
    save_nets(tmp_path, nets, {})
    with pytest.raises(UserError, match=r"^ledger rows \d+ to \d+ of .*NaN") as caught:
        evaluate(config_for(small_set, tmp_path, workers=1, shards=1), quiet)
    assert "\n" not in str(caught.value)


def test_baseline_maps_are_of_the_given_class(random_run: Path, samples: list[Sample]) -> None:
    nets = load_nets(random_run)
    images = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2)
    segments = torch.from_numpy(np.stack([s.segments for s in samples]).astype(np.int64))
    found = {}
    for label in (0, 1):
        labels = torch.full((len(samples),), label)
        found[label] = net_maps(nets, images, segments, labels, 25, baselines=True, crops=False)[1]
    np.testing.assert_array_equal(found[0]["aln"], found[1]["aln"])
    x = normalize(images, *colour_statistics(nets.config, images.device))
    imitated = evidence(nets.clean_classifier, x, labels, segments, 25)
    np.testing.assert_allclose(found[1]["layercam"], imitated, atol=1e-4)
    for name in ("cam", "gradient", "lrp", "layercam"):
        assert (found[0][name] != found[1][name]).any()


@pytest.mark.parametrize("field", ["batch_size", "workers", "shards"])
def test_sizes_below_one_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} 0 must be at least 1"):
        config_for(Path("data"), Path("run"), **{field: 0})


def test_the_job_writes_table_metrics_predictions_and_report(
    small_set: Path,
    random_run: Path,
    tmp_path: Path,
    ray_local: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new" / "eval"
    flags = ["--data", small_set, "--run", random_run, "--output", output, "--no-baselines"]
    job.main([str(flag) for flag in flags])
    assert sorted(p.name for p in output.iterdir()) == [
        "metrics.json",
        "predictions.parquet",
        "report.html",
    ]
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["format"], metrics["split"], metrics["images"]) == (1, "val", VAL_IMAGES)
    assert metrics["protocol"] == "devkit"
    assert metrics["configuration"]["baselines"] is False
    assert list(metrics["methods"]) == [
        *("whole_image", "centred_box", "mean_map"),
        *("aln", "aln_mean", "aln_quantile"),
        *("aln_clean_class", "aln_clean_class_mean", "aln_clean_class_quantile"),
    ]
    assert pq.read_table(output / "predictions.parquet").num_rows == VAL_IMAGES
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("method") and "GT-known" in line for line in lines)
    assert lines[-1] == f"report: {output / 'report.html'}"
    aln = metrics["methods"]["aln"]
    (shown,) = [line.split() for line in lines if line.startswith("ALN  ")]
    assert shown[1:] == [
        *(f"{100 * aln[name]:.1f}%" for name in ("gt_known", "top1_loc", "top5_loc")),
        *(f"{100 * aln[name]:.1f}%" for name in ("max_box_acc", "max_box_acc_v2")),
        *(f"{aln[name]:.3f}" for name in ("mean_iou", "auc_gap")),
        str(VAL_IMAGES),
        *("56.5%", "45.5%"),  # the paper's
    ]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data", "holds no dataset.json"),
        ("--run", "holds no model/model.json"),
        ("--split", "has no split"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    small_set: Path, random_run: Path, tmp_path: Path, ray_local: None, flag: str, message: str
) -> None:
    output = tmp_path / "eval"
    flags = {"--data": str(small_set), "--run": str(random_run), "--output": str(output)}
    flags[flag] = str(tmp_path / "nothing")
    with pytest.raises(Exception, match=message) as caught:
        job.main(list(itertools.chain(*flags.items())))
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_two_runs_stand_side_by_side_and_the_same_run_twice_is_the_same(
    small_set: Path, random_run: Path, evaluation: Evaluation, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(random_run, copied)
    config = replace(config_for(small_set, random_run, workers=2), run=(random_run, copied))
    both = evaluate(config, quiet)
    methods = both.metrics["methods"]
    assert both.metrics["runs"] == [str(random_run), str(copied)]
    maps = ("cam", "cam_quantile", "layercam", "gradient", "lrp")
    for name in ("aln", "aln_mean", "aln_clean_class", *maps):
        first, second = methods[name], methods[f"{name}_2"]
        assert (first["run"], second["run"]) == (0, 1)
        assert first["gt_known"] == evaluation.metrics["methods"][name]["gt_known"]
        for figure in ("gt_known", "top1_loc", "mean_iou", "max_box_acc_v2", "auc_gap", "errors"):
            assert first[figure] == second[figure]
    assert both.predictions["aln_box"].equals(both.predictions["aln_2_box"])
    assert "whole_image_2" not in methods


def test_exported_boxes_read_back_give_the_same_figures(
    small_set: Path, random_run: Path, tmp_path: Path, ray_local: None
) -> None:
    folder = tmp_path / "exported"
    flags = ["--data", small_set, "--run", random_run, "--output", tmp_path / "a"]
    job.main([str(flag) for flag in [*flags, "--export", folder]])
    ours = json.loads((tmp_path / "a" / "metrics.json").read_text())["methods"]["aln"]
    (tmp_path / "classes.txt").write_text("\n".join(read_manifest(small_set).classes) + "\n")
    for suffix in (".csv", ".parquet"):
        output = tmp_path / f"b{suffix}"
        job.main(
            [
                *("--ground-truth", str(folder / "metadata")),
                *("--predictions", str(folder / "boxes" / f"aln{suffix}")),
                *("--classes", str(tmp_path / "classes.txt")),
                *("--output", str(output)),
            ]
        )
        theirs = json.loads((output / "metrics.json").read_text())["methods"]["predictions"]
        for figure in ("gt_known", "top1_loc", "top5_loc", "top1_cls", "mean_iou"):
            assert theirs[figure] == ours[figure]
        assert theirs["protocols"]["devkit, first box"] == ours["protocols"]["devkit, first box"]
    maps = sorted((folder / "score_maps" / "aln").rglob("*.npy"))
    assert len(maps) == VAL_IMAGES
    assert np.load(maps[0]).shape == (224, 224)


def test_another_classifiers_labels_give_their_own_row(
    small_set: Path, random_run: Path, evaluation: Evaluation, tmp_path: Path
) -> None:
    rows = evaluation.predictions
    pairs = zip(rows["id"].to_pylist(), rows["label"].to_pylist(), strict=True)
    lines = [f"{image},{label}" for image, label in pairs]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    config = config_for(small_set, random_run, workers=2, classifier=tmp_path / "labels.csv")
    row = evaluate(config, quiet).metrics["methods"]["aln_other_class"]
    assert row["top1_loc"] == row["gt_known"] == evaluation.metrics["methods"]["aln"]["gt_known"]
    assert row["top1_cls"] == 1.0
