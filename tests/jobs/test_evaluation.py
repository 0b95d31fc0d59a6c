"""Evaluation of a small generated set with random nets, over Ray."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import evaluate as job
from jobs.cli import UserError
from jobs.evaluation import (
    EvaluateConfig,
    Evaluation,
    check_compatible,
    evaluate,
    predict,
    ranges,
)
from jobs.models import colour_statistics, load_nets, save_nets
from jobs.scoring import centred_shares, check_coverage, join_predictions, matrix, score
from model.adversarial import normalize
from pipeline.ledger import read_ledger
from pipeline.shards import Sample, read_card, read_shard, shard_paths

VAL_IMAGES = 24


def quiet(done: int, batches: int) -> None:
    pass


def config_for(data: Path, run: Path, **changes: object) -> EvaluateConfig:
    options: dict = {"data": data, "run": run, "output": data.parent / "eval", "batch_size": 3}
    return EvaluateConfig(**(options | changes))


@pytest.fixture(scope="module")
def evaluation(small_set: Path, random_run: Path, ray_local: None) -> Evaluation:
    return evaluate(config_for(small_set, random_run, workers=2, shards=1), quiet)


@pytest.fixture(scope="module")
def samples(small_set: Path) -> list[Sample]:
    card = read_card(small_set)
    paths = shard_paths(small_set, card, "val")
    return [sample for path in paths for sample in read_shard(path, card)]


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


def test_every_image_has_boxes_inside_it_and_best_classes_first(
    small_set: Path, evaluation: Evaluation
) -> None:
    predictions = evaluation.predictions
    ledger = read_ledger(small_set, "val")
    assert predictions["row"].to_pylist() == ledger["row"].to_pylist()
    width, height = predictions["width"].to_numpy(), predictions["height"].to_numpy()
    for name in ("whole_image", "centred_box", "cam", "gradient", "aln"):
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
        "cam",
        "gradient",
        "aln",
        "aln_clean_class",
    ]
    rows = evaluation.predictions.to_pylist()
    for name, row in metrics["methods"].items():
        box = "aln" if name == "aln_clean_class" else name
        net = "classifier" if name == "aln" else "clean_classifier"
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
        assert row["interval"]["gt_known"][0] <= row["gt_known"] <= row["interval"]["gt_known"][1]
    assert metrics["classifier"]["top1"] == metrics["methods"]["aln"]["top1_cls"]
    assert metrics["clean_classifier"]["top1"] == metrics["methods"]["cam"]["top1_cls"]
    assert metrics["classifier"]["top5"] >= metrics["classifier"]["top1"]


def test_images_without_known_boxes_count_for_classification_only(
    small_set: Path, evaluation: Evaluation
) -> None:
    card = read_card(small_set)
    columns = ["row", "key", "id", "label", "shard", "width", "height", "boxes"]
    ledger = evaluation.predictions.select(columns)
    boxes = ledger["boxes"].to_pylist()
    boxes[:10] = [[] for _ in range(10)]
    place = ledger.schema.get_field_index("boxes")
    ledger = ledger.set_column(place, "boxes", pa.array(boxes, ledger.schema.field("boxes").type))
    kept = [
        name
        for name in evaluation.predictions.column_names
        if name == "row" or name.endswith(("_classes", "_scores", "_found"))
    ]
    predicted = evaluation.predictions.select(kept)
    predicted = predicted.append_column("aln_box", evaluation.predictions["aln_box"])
    joined = join_predictions(ledger, predicted, (32, 32), (0.5, 0.5))
    assert joined["aln_iou"].to_pylist()[:10] == [None] * 10
    scored = score(joined, card, seed=0)
    aln, before = scored["methods"]["aln"], evaluation.metrics["methods"]["aln"]
    assert aln["n"] == VAL_IMAGES - 10
    assert aln["counts"]["images"] == VAL_IMAGES
    assert aln["top1_cls"] == before["top1_cls"]
    assert aln["mean_iou"] == pytest.approx(np.mean(joined["aln_iou"].to_pylist()[10:]), rel=1e-12)


def test_the_centred_box_is_fixed_on_train_boxes_or_said_to_be_half_the_area(
    small_set: Path, evaluation: Evaluation
) -> None:
    card = read_card(small_set)
    shares, source = centred_shares(small_set, card)
    assert "train split" in source
    assert evaluation.metrics["methods"]["centred_box"]["shares"] == {
        "height": shares[0],
        "width": shares[1],
    }
    without_train = replace(card, splits={"val": card.splits["val"]})
    (height, width), source = centred_shares(small_set, without_train)
    assert height * width == pytest.approx(0.5)
    assert "half" in source


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
    card = read_card(small_set)
    config = load_nets(random_run).config
    check_compatible(random_run, config, small_set, card)
    other = replace(config, classes=(*config.classes[1:], "n99999999"))
    with pytest.raises(UserError, match="checkpoint and shards with different classes") as caught:
        check_compatible(random_run, other, small_set, card)
    assert "7 of them in common" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"trained at 64x32.*holds 32x32"):
        check_compatible(random_run, replace(config, height=64), small_set, card)


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
        found[label] = predict(nets, images, segments, labels, superpixels=25, baselines=True)
    np.testing.assert_array_equal(found[0]["aln_box"], found[1]["aln_box"])
    assert (found[0]["cam_box"] != found[1]["cam_box"]).any()
    assert (found[0]["gradient_box"] != found[1]["gradient_box"]).any()


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
    assert list(metrics["methods"]) == ["whole_image", "centred_box", "aln", "aln_clean_class"]
    assert pq.read_table(output / "predictions.parquet").num_rows == VAL_IMAGES
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("method") and line.endswith(" n") for line in lines)
    assert lines[-1] == f"report: {output / 'report.html'}"
    aln = metrics["methods"]["aln"]
    (shown,) = [line.split() for line in lines if line.startswith("ALN  ")]
    assert shown[1:] == [
        *(f"{100 * aln[name]:.1f}%" for name in ("gt_known", "top1_loc", "top1_cls")),
        f"{aln['mean_iou']:.3f}",
        str(VAL_IMAGES),
    ]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data", "holds no dataset.json"),
        ("--run", "holds no model.pt"),
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
