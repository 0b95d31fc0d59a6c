"""Evaluation of a small generated set with random nets, over Ray."""

import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy import ndimage

from jobs.evaluate import __main__ as job
from jobs.evaluate.config import EvaluateConfig
from jobs.evaluate.inputs import centred_shares, check_compatible
from jobs.evaluate.maps import RunSource
from jobs.evaluate.sources import check_coverage
from jobs.evaluate.tasks import ranges, read_files, score_range
from jobs.runs import Nets, colour_statistics, load_nets, read_config, save_nets
from model.classifier import class_probabilities
from model.evidence import evidence
from model.localization import RULES
from model.masking import normalize
from pipeline.errors import UserError
from pipeline.evaluation.results import Evaluation, Row, RowFigures, read_evaluation
from pipeline.loading.loader import Batch
from pipeline.shards.format import Sample, read_manifest
from pipeline.shards.ledger import read_ledger
from tests.e2e.commands import ROOT
from tests.pipeline.made_set import stored_samples

VAL_IMAGES = 24
BASELINES = ("gradient", "lrp", "cam", "layercam")


def quiet(done: int, total: int) -> None:
    pass


def config_for(data: Path, run: Path, output: Path, **changes: object) -> EvaluateConfig:
    options: dict = {"data": str(data), "run": run, "output": output, "batch_size": 3}
    return EvaluateConfig(**(options | {"workers": 2} | changes))


@pytest.fixture(scope="module")
def evaluation(
    small_set: Path, random_run: Path, ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> Evaluation:
    output = tmp_path_factory.mktemp("evaluation")
    return job.evaluate(config_for(small_set, random_run, output, shards=1), quiet)


@pytest.fixture(scope="module")
def samples(small_set: Path) -> list[Sample]:
    return stored_samples(small_set, "val")


def batch_of(samples: list[Sample]) -> Batch:
    return Batch(
        images=torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2),
        segments=torch.from_numpy(np.stack([s.segments for s in samples]).astype(np.int64)),
        labels=torch.tensor([s.label for s in samples]),
        rows=torch.tensor([s.row for s in samples]),
        total=len(samples),
        offset=0,
    )


def run_maps(nets: Nets, batch: Batch) -> dict[str, np.ndarray]:
    source = RunSource(nets=nets, superpixels=25, baselines=True, crops=False)
    return dict(source.predict(batch)[1])


def row_of(evaluation: Evaluation, **names: str | None) -> RowFigures:
    return next(row for row in evaluation.rows if row.row == Row(**names))  # type: ignore[arg-type]


def boxes_of(evaluation: Evaluation, name: str, rule: str | None) -> np.ndarray:
    return np.array(evaluation.predictions(name, rule)["box"].to_pylist())


def classes_of(evaluation: Evaluation, column: str, classifier: str) -> np.ndarray:
    return np.array([row[classifier] for row in evaluation.images()[column].to_pylist()])


def assert_same_files(first: Evaluation, second: Evaluation) -> None:
    assert first.rows == second.rows
    for name in ("images.parquet", "predictions.parquet"):
        assert Path(first.folder, name).read_bytes() == Path(second.folder, name).read_bytes()
    every = range(first.metrics["images"])
    maps, others = first.maps(every), second.maps(every)
    assert list(maps) == sorted(others) == list(every)
    assert all((values == others[image]).all() for image, values in maps.items())


@pytest.mark.parametrize(("batches", "shards"), [(1, 1), (5, 2), (7, 7), (3, 10), (100, 7)])
def test_ranges_cover_every_batch_once_and_differ_by_one(batches: int, shards: int) -> None:
    parts = ranges(batches, shards)
    assert [b for first, stop in parts for b in range(first, stop)] == list(range(batches))
    sizes = [stop - first for first, stop in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == min(shards, batches)


def test_any_number_of_tasks_gives_the_same_figures_to_the_last_digit(
    small_set: Path, random_run: Path, evaluation: Evaluation, tmp_path: Path
) -> None:
    progress: list[tuple[int, int]] = []
    config = config_for(small_set, random_run, tmp_path, shards=7)
    other = job.evaluate(config, lambda done, total: progress.append((done, total)))
    assert_same_files(other, evaluation)
    assert len({done for done, _ in progress if done}) == 7  # 24 images are 8 batches
    assert len(progress) > 7  # also while no task ends
    assert progress[-1] == (VAL_IMAGES, VAL_IMAGES)
    assert progress == sorted(progress)


@pytest.mark.parametrize("name", ["dataset.json", "model.json"])
def test_a_host_that_finds_other_shards_or_nets_is_named(
    name: str, small_set: Path, random_run: Path, tmp_path: Path
) -> None:
    config = config_for(small_set, random_run, tmp_path)
    hashes = read_files(config)
    (path,) = [path for path in hashes if path.endswith(f"/{name}")]
    with pytest.raises(UserError, match=rf"^host {platform.node()} finds another {path}"):
        score_range(config, Mock(), 0, 1, False, hashes | {path: "0" * 64})


def test_ten_crops_change_classes_and_neither_maps_nor_boxes(
    small_set: Path, random_run: Path, samples: list[Sample], evaluation: Evaluation, tmp_path: Path
) -> None:
    config = config_for(small_set, random_run, tmp_path, ten_crops=True)
    cropped = job.evaluate(config, quiet)
    nets = load_nets(random_run)
    images = batch_of(samples[:8]).images
    x = normalize(images, *colour_statistics(nets.config, images.device))
    for name, net in (("co-trained", nets.classifier), ("clean", nets.clean_classifier)):
        expected = class_probabilities(net, x, crops=True).amax(dim=1).tolist()
        scores = classes_of(cropped, "scores", name)
        assert scores[:8, 0].tolist() == pytest.approx(expected, rel=1e-4)
        assert (scores != classes_of(evaluation, "scores", name)).any()
    for name in ("aln", *BASELINES):
        assert cropped.predictions(name, "paper").equals(evaluation.predictions(name, "paper"))
    (line,) = [line for line in job.notes(cropped, "paper") if "ten crops" in line]
    assert line not in job.notes(evaluation, "paper")


def test_a_failed_task_stops_the_others_and_its_error_comes_as_it_is(
    small_set: Path, random_run: Path, tmp_path: Path, ray_local: None
) -> None:
    nets = load_nets(random_run)
    with torch.no_grad():
        nets.corruption.state_dict()["output.weight"].fill_(torch.nan)
    save_nets(tmp_path, nets, {})
    with pytest.raises(UserError, match=r"^ledger rows \d+ to \d+ of .*NaN") as caught:
        job.evaluate(config_for(small_set, tmp_path, tmp_path / "out", shards=4), quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_every_image_has_boxes_inside_it_and_best_classes_first(
    small_set: Path, evaluation: Evaluation
) -> None:
    images = evaluation.images()
    ledger = read_ledger(small_set, "val")
    for column in ("row", "id", "key", "label", "width", "height", "boxes"):
        assert images[column].to_pylist() == ledger[column].to_pylist()
    assert images["image"].to_pylist() == list(range(VAL_IMAGES))
    constant = [("whole image", None), ("centred box", None), ("mean map", "paper")]
    for name, rule in constant + [(m, r) for m in ("aln", *BASELINES) for r in RULES]:
        boxes = boxes_of(evaluation, name, rule)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] <= boxes[:, 2:]).all()
        assert (boxes[:, 2] < images["width"].to_numpy()).all()
        assert (boxes[:, 3] < images["height"].to_numpy()).all()
    for name in ("co-trained", "clean"):
        assert (np.diff(classes_of(evaluation, "scores", name), axis=1) <= 0).all()
        assert all(len(set(row)) == 5 for row in classes_of(evaluation, "classes", name).tolist())


def test_predictions_equal_the_nets_on_each_image_by_itself(
    random_run: Path, samples: list[Sample], evaluation: Evaluation
) -> None:
    nets = load_nets(random_run)
    classes, scores = (classes_of(evaluation, c, "co-trained") for c in ("classes", "scores"))
    boxes, maps = boxes_of(evaluation, "aln", "paper"), evaluation.maps(range(VAL_IMAGES))
    for i, sample in enumerate(samples):
        image = batch_of([sample]).images.contiguous()
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
        components, _ = ndimage.label(above, np.ones((3, 3)))
        ys, xs = np.nonzero(components == np.bincount(components[above]).argmax())
        largest = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        error = np.abs(largest * ratios - (boxes[i] + [0, 0, 1, 1])).max()
        assert error <= 0.5  # rounded to the nearest edge
        assert np.abs(maps[i] - 255 * averaged).max() < 1.01  # truncated


def test_metrics_follow_from_the_predictions(evaluation: Evaluation) -> None:
    """Recomputed from the files' columns by plain Python."""
    written = read_evaluation(evaluation.folder)
    assert list(written.rows) == list(evaluation.rows)
    rules: list[tuple[str, str | None]] = [(name, rule) for name in BASELINES for rule in RULES]
    constant: list[tuple[str, str | None]] = [("whole image", None), ("centred box", None)]
    assert [row.row for row in evaluation.rows] == [
        *(Row(map=m, rule=r, classes="clean") for m, r in [*constant, ("mean map", "paper")]),
        *(Row(map=m, rule=r, classes="clean") for m, r in rules),
        *(Row(map="aln", rule=r, classes=c) for r in RULES for c in ("co-trained", "clean")),
    ]
    images = evaluation.images().to_pylist()
    for row in evaluation.rows:
        figures = row.figures
        ious = []
        for image, a in zip(
            images, boxes_of(evaluation, row.row.map, row.row.rule).tolist(), strict=True
        ):
            best = 0.0
            for b in image["boxes"]:
                shared = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
                shared *= max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
                areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
                best = max(best, shared / (sum(areas) - shared))
            ious.append(best)
        assert evaluation.predictions(row.row.map, row.row.rule)["iou"].to_pylist() == ious
        right = [image["classes"][row.row.classes][0] == image["label"] for image in images]
        both = [iou >= 0.5 and r for iou, r in zip(ious, right, strict=True)]
        assert figures["gt_known"] == sum(iou >= 0.5 for iou in ious) / VAL_IMAGES
        assert figures["top1_loc"] == sum(both) / VAL_IMAGES
        assert figures["top1_cls"] == sum(right) / VAL_IMAGES
        assert figures["mean_iou"] == pytest.approx(sum(ious) / VAL_IMAGES, rel=1e-12)
        assert figures["n"] == VAL_IMAGES
        assert sum(figures["errors"].values()) == VAL_IMAGES
        assert figures["errors"]["right"] == sum(both)
        low, high = row.interval["gt_known"] or (1, 0)
        assert low <= figures["gt_known"] <= high
        assert figures["max_box_acc"] >= (0 if row.row.rule else figures["gt_known"])
        assert (row.paper is None) == (
            (row.row.map, row.row.classes) == ("aln", "clean")
            or row.row.map in ("centred box", "mean map", "layercam")
            or row.row.rule not in ("paper", None)
        )
    classifiers = evaluation.metrics["classifiers"]
    for name, classes in (("aln", "co-trained"), ("cam", "clean")):
        row = row_of(evaluation, map=name, rule="paper", classes=classes)
        assert classifiers[classes]["top1"] == row.figures["top1_cls"]
        assert classifiers[classes]["top5"] == row.figures["top5_cls"]


def test_the_auc_of_a_map_is_that_of_its_pixels_against_the_boxes(
    random_run: Path, samples: list[Sample], evaluation: Evaluation
) -> None:
    """By comparing every pixel inside the boxes with every one outside."""
    nets = load_nets(random_run)
    aucs = evaluation.predictions("cam", "paper")["auc"].to_pylist()
    for i in (0, 7, 23):
        sample = samples[i]
        cam = run_maps(nets, batch_of([sample]))["cam"][0].astype(np.float64)
        levels = np.floor((cam - cam.min()) / (cam.max() - cam.min()) * 255)
        inside = np.zeros((32, 32), bool)
        scale = 32 / np.array([sample.meta["width"], sample.meta["height"]] * 2)
        for box in np.array(sample.meta["boxes"]):
            x0, y0 = np.floor(box[:2] * scale[:2] + 0.5).astype(int)
            x1, y1 = np.floor((box[2:] + 1) * scale[2:] + 0.5).astype(int)
            inside[y0:y1, x0:x1] = True
        a, b = levels[inside][:, None], levels[~inside][None]
        expected = ((a > b) + 0.5 * (a == b)).mean()
        assert aucs[i] == pytest.approx(expected, abs=0.002)


def test_baseline_maps_are_of_the_given_class(random_run: Path, samples: list[Sample]) -> None:
    nets, batch = load_nets(random_run), batch_of(samples)
    zeros = replace(batch, labels=torch.zeros_like(batch.labels))
    first, second = run_maps(nets, zeros), run_maps(nets, replace(zeros, labels=zeros.labels + 1))
    np.testing.assert_array_equal(first["aln"], second["aln"])
    x = normalize(batch.images, *colour_statistics(nets.config, batch.images.device))
    imitated = evidence(nets.clean_classifier, x, zeros.labels + 1, batch.segments, 25)
    np.testing.assert_allclose(second["layercam"], imitated, atol=1e-4)
    for name in BASELINES:
        assert (first[name] != second[name]).any()


def test_the_centred_box_is_fixed_on_train_boxes_or_half_the_area(
    small_set: Path, evaluation: Evaluation
) -> None:
    manifest = read_manifest(small_set)
    shares, source = centred_shares(str(small_set), manifest, None)
    assert "train split" in source
    expected = {"height": shares[0], "width": shares[1], "source": source}
    assert evaluation.metrics["centred_box"] == expected
    without_train = replace(manifest, splits={"val": manifest.splits["val"]})
    (height, width), source = centred_shares(str(small_set), without_train, None)
    assert height * width == pytest.approx(0.5)
    assert "half" in source
    assert centred_shares(None, None, (0.5, 0.25))[0] == (0.5, 0.25)
    assert centred_shares(None, None, (0.5,))[0] == (0.5, 0.5)


def test_coverage_names_missing_double_and_unknown_rows() -> None:
    rows, ids = np.array([4, 5, 6, 7]), ("a", "b", "c", "d")
    check_coverage(np.array([7, 4, 6, 5]), rows, ids)
    for scored, fact in (
        ([4, 6, 7], r"images missing: 1, ledger rows 5 \(b\)"),
        ([4, 4, 5, 6, 6, 7], r"more than once: 2, ledger rows 4 \(a\), 6 \(c\)"),
        ([4, 5, 6, 7, 9], r"unknown to the ledger: 1, ledger rows 9"),
    ):
        with pytest.raises(UserError, match=fact):
            check_coverage(np.array(scored), rows, ids)
    with pytest.raises(UserError, match="and 15 more"):
        check_coverage(np.zeros(0, np.int64), np.arange(20), [str(i) for i in range(20)])


def test_nets_and_shards_that_do_not_fit_are_refused_in_one_line(
    small_set: Path, random_run: Path
) -> None:
    manifest = read_manifest(small_set)
    config = read_config(random_run)
    assert config == load_nets(random_run).config
    check_compatible(random_run, config, str(small_set), manifest)
    for changes, fact in (
        ({"classes": (*config.classes[1:], "n99999999")}, "8 classes|7 of them in common"),
        ({"height": 64}, r"64x32.*32x32.*--image-size 64"),
        ({"compactness": 1.5}, r"1\.5.*--superpixels 25 --compactness 1\.5"),
    ):
        different: Any = replace(config, **changes)
        with pytest.raises(UserError, match=fact) as caught:
            check_compatible(random_run, different, str(small_set), manifest)
        assert "\n" not in str(caught.value)


def test_the_job_prints_a_line_per_map_and_writes_files_and_page(
    small_set: Path,
    random_run: Path,
    tmp_path: Path,
    ray_local: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new" / "eval"
    flags = ["--data", small_set, "--run", random_run, "--output", output, "--rule", "mean"]
    job.main([str(flag) for flag in flags])
    names = {"images.parquet", "maps", "metrics.json", "predictions.parquet", "report.html"}
    assert {path.name for path in output.iterdir()} == {*names, job.LOCK_NAME}
    evaluation = read_evaluation(output)
    metrics = evaluation.metrics
    assert metrics["source"] == {"kind": "run", "name": str(random_run)}
    assert (metrics["split"], metrics["images"]) == ("val", VAL_IMAGES)
    assert metrics["configuration"]["rule"] == "mean"
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[-1] == f"report: {output / 'report.html'}"
    first = next(i for i, line in enumerate(lines) if "GT-known" in line)
    table = lines[first : first + 10]
    assert [len(line) <= 100 for line in table] == [True] * 10
    titles = [line[:23].strip() for line in table[2:]]
    assert titles == [
        *("Whole image", "Centred box", "Mean of all ALN maps"),
        *("Gradient saliency", "LRP", "CAM", "LayerCAM of superpixels", "ALN"),
    ]
    figures = row_of(evaluation, map="aln", rule="mean", classes="co-trained").figures
    shares = ("gt_known", "top1_loc", "top5_loc", "max_box_acc", "max_box_acc_v2")
    assert table[-1].split()[1:] == [
        *(f"{100 * figures[name]:.1f}" for name in shares),
        *(f"{figures[name]:.3f}" for name in ("mean_iou", "auc_gap")),
        *("-", "-"),
    ]
    assert table[2].split()[-2:] == ["41.0", "34.3"]  # the paper's


def test_boxes_as_a_file_have_the_figures_of_the_run_that_found_them(
    evaluations: tuple[Path, Path, Path],
) -> None:
    run, boxes = (read_evaluation(folder) for folder in evaluations[1:])
    ours = row_of(run, map="aln", rule="paper", classes="co-trained").figures
    theirs = row_of(boxes, map="given", rule=None, classes="boxes").figures
    for figure in ("gt_known", "top1_loc", "top5_loc", "top1_cls", "mean_iou"):
        assert theirs[figure] == ours[figure]


def test_another_classifiers_labels_give_alns_boxes_a_row(
    small_set: Path, random_run: Path, evaluation: Evaluation, tmp_path: Path
) -> None:
    images = evaluation.images()
    pairs = zip(images["id"].to_pylist(), images["label"].to_pylist(), strict=True)
    path = tmp_path / "labels.csv"
    path.write_text("".join(f"{image},{label}\n" for image, label in pairs))
    config = config_for(small_set, random_run, tmp_path, classifier=path, baselines=False)
    again = job.evaluate(config, quiet)
    assert {row.row.map for row in again.rows if row.row.classes == "file"} == {"aln"}
    figures = row_of(again, map="aln", rule="paper", classes="file").figures
    ours = row_of(evaluation, map="aln", rule="paper", classes="co-trained").figures
    assert figures["top1_loc"] == figures["gt_known"] == ours["gt_known"]
    assert figures["top1_cls"] == 1.0


def test_figures_of_each_class_come_from_the_files_as_documented(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = (ROOT / "docs" / "formats.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    (tmp_path / "EVALUATION").symlink_to(evaluation.folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    ious = evaluation.predictions("aln", "paper")["iou"].to_numpy()
    labels = evaluation.images()["label"].to_numpy()
    rows = {row["label"]: row for row in names["classes"].to_pylist()}
    assert sorted(rows) == np.unique(labels).tolist()
    for label, row in rows.items():
        own = ious[labels == label]
        assert row["gt_known_mean"] == sum(own >= 0.5) / len(own)
        assert row["iou_mean"] == pytest.approx(own.mean())
    figures = row_of(evaluation, map="aln", rule="paper", classes="co-trained").figures
    shares = [rows[label]["gt_known_mean"] for label in labels]
    assert np.mean(shares) == pytest.approx(figures["gt_known"])


def test_a_lost_page_is_one_line_with_the_reports_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.html .* metrics\.json") as caught:
        job.write_page(tmp_path)
    assert "\n" not in str(caught.value)
