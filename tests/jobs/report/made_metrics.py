"""The content of a metrics.json, made from invented boxes' IoUs, for tests of the report."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

IOU_GRID = np.arange(1, 20) / 20
SIZE_EDGES = (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0)
SHAPES = {  # of the Beta distribution that a row's IoUs are drawn from
    "whole_image": (1.2, 2.0),
    "centred_box": (1.9, 1.8),
    "mean_map": (1.8, 1.8),
    "gradient": (3.0, 1.9),
    "lrp": (2.6, 2.0),
    "cam": (2.2, 2.0),
    "layercam": (2.7, 2.1),
    "aln": (3.4, 1.6),
    "aln_mean": (2.8, 1.9),
    "aln_quantile": (3.0, 2.0),
}
CONSTANT = ("whole_image", "centred_box", "mean_map")
ALN_ROWS = ("aln", "aln_mean", "aln_quantile", "aln_clean_class")
RUN_ROWS = ("gradient", "lrp", "cam", "layercam", *ALN_ROWS)
TITLES = {
    "whole_image": "Whole image",
    "centred_box": "Centred box",
    "mean_map": "Mean map",
    "gradient": "Gradient saliency, blurred",
    "lrp": "LRP",
    "cam": "CAM",
    "layercam": "LayerCAM of superpixels",
    "aln": "ALN",
    "aln_mean": "ALN, threshold mean",
    "aln_quantile": "ALN, area quantile",
    "aln_clean_class": "ALN, clean classifier's class",
}
PAPER = {
    "whole_image": {"metric1": 0.41, "metric2": 0.343},
    "aln": {"metric1": 0.565, "metric2": 0.455},
}


def _figures(ious: np.ndarray, right: np.ndarray | None) -> dict[str, Any]:
    n = len(ious)
    hit = ious >= 0.5
    kinds = np.random.default_rng(n)
    return {
        "gt_known": float(hit.mean()) if n else None,
        "top1_loc": None if right is None or not n else float((hit & right).mean()),
        "top1_cls": None if right is None or not n else float(right.mean()),
        "mean_iou": float(ious.mean()) if n else None,
        "n": n,
        "errors": _errors(kinds, hit, right),
    }


def _errors(rng: np.random.Generator, hit: np.ndarray, right: np.ndarray | None) -> dict[str, int]:
    kinds = ("too_small", "too_large", "several_instances", "elsewhere", "nothing_found")
    wrong = rng.multinomial(int((~hit).sum()), [0.4, 0.3, 0.15, 0.1, 0.05])
    class_wrong = 0 if right is None else int((hit & ~right).sum())
    found = {"right": int(hit.sum()) - class_wrong, "class_wrong": class_wrong}
    return found | dict(zip(kinds, wrong.tolist(), strict=True))


def _curves(rng: np.random.Generator, ious: np.ndarray, from_map: bool) -> dict[str, Any]:
    thresholds = np.linspace(0, 1, 101)
    peak, width = rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.5)
    shape = np.exp(-(((thresholds - peak) / width) ** 2))
    corloc = {
        level: ((ious >= float(level)).mean() * shape).tolist() for level in ("0.3", "0.5", "0.7")
    }
    return {
        "iou": IOU_GRID.tolist(),
        "gt_known": [float((ious >= level).mean()) for level in IOU_GRID],
        "thresholds": thresholds.tolist() if from_map else None,
        "corloc": corloc if from_map else None,
    }


def _row(
    rng: np.random.Generator,
    ious: np.ndarray,
    right: np.ndarray | None,
    labels: np.ndarray,
    wnids: list[str],
    from_map: bool,
) -> dict[str, Any]:
    whole = _figures(ious, right)
    sizes = np.searchsorted(SIZE_EDGES, rng.random(len(ious)) ** 2, side="left") - 1
    halves = rng.random((2, len(ious))) < 0.5

    def part(chosen: np.ndarray) -> dict[str, Any]:
        return _figures(ious[chosen], None if right is None else right[chosen])

    def around(value: float | None) -> list[float] | None:
        return None if value is None else [max(value - 0.02, 0.0), min(value + 0.02, 1.0)]

    row = whole | {
        "top5_loc": None if right is None else whole["top1_loc"] * 1.05,
        "top5_cls": None if right is None else min(whole["top1_cls"] * 1.1, 1.0),
        "max_box_acc": whole["gt_known"] if from_map else None,
        "max_box_acc_v2": whole["gt_known"] if from_map else None,
        "max_box_acc_threshold": 0.35 if from_map else None,
        "auc": 0.8 if from_map else None,
        "auc_other": 0.72 if from_map else None,
        "auc_gap": 0.08 if from_map else None,
        "counts": {"images": len(ious), "with_boxes": len(ious)},
        "box_sizes": [
            {"low": low, "high": high, **part(sizes == i)}
            for i, (low, high) in enumerate(itertools.pairwise(SIZE_EDGES))
        ],
        "subsets": {"small_boxes": part(halves[0]), "off_centre": part(halves[1])},
        "protocols": {
            name: _figures(ious + shift, right)
            for name, shift in (
                ("devkit", 0.0),
                ("exclusive", -0.004),
                ("int224", 0.003),
                ("devkit, first box", -0.02),
            )
        },
        "curves": _curves(rng, ious, from_map),
        "classes": {wnid: part(labels == i) for i, wnid in enumerate(wnids)},
        "from_map": from_map,
    }
    row["interval"] = {
        name: around(row[name])
        for name in ("gt_known", "top1_loc", "top5_loc", "top1_cls", "top5_cls", "mean_iou")
    }
    return row


def _classes(name: str) -> str:
    suffix = "_2" if name.endswith("_2") else ""
    own = name.startswith("aln") and "clean_class" not in name
    return ("classifier" if own else "clean_classifier") + suffix


def made_metrics(
    *, runs: int = 1, images: int = 500, classes: int = 8, seed: int = 0
) -> dict[str, Any]:
    """metrics.json's content for `runs` runs (none: constant boxes without classes)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    wnids = [f"n{i:08d}" for i in range(classes)]
    methods: dict[str, dict[str, Any]] = {}
    names = [name for name in SHAPES if name in CONSTANT]
    names += [name + suffix for suffix in ("", "_2")[:runs] for name in RUN_ROWS]
    for name in names:
        base = name.removesuffix("_2")
        right = rng.random(images) < 0.75 if runs else None
        if base == "aln_clean_class":
            ious = methods[name.replace("_clean_class", "")]["ious"]
        else:
            ious = rng.beta(*SHAPES[base], images)
        methods[name] = _row(rng, ious, right, labels, wnids, base in RUN_ROWS)
        methods[name] |= {
            "ious": ious,
            "title": TITLES[base] + (", run 2" if name != base else ""),
            "run": None if base in CONSTANT else int(name != base),
            "class_from": _classes(name) if runs else None,
            "paper": PAPER.get(base),
        }
    for name, row in methods.items():
        del row["ious"]
        if name.startswith("aln_") and name != "aln_2":  # the same map, another box or class
            own = methods["aln_2" if name.endswith("_2") else "aln"]["curves"]
            row["curves"] |= {"corloc": own["corloc"]}
    classifiers = {
        name: {"top1": 0.88, "top5": 0.99} for name in ("classifier", "clean_classifier") if runs
    }
    return {
        "format": 1,
        "split": "val",
        "images": images,
        "rejected": 0,
        "protocol": "devkit",
        "box_rule": "threshold 0.7 mean + 0.3 max; box of the largest 8-connected component",
        "seed": seed,
        "runs": [f"runs/trial-{i}" for i in range(runs)],
        "methods": methods,
        **classifiers,
        **({"class_names": {wnid: f"kind {i}" for i, wnid in enumerate(wnids)}} if runs else {}),
        "subsets": {"small_boxes": "the largest box is small", "off_centre": "no box is central"},
        "configuration": {"split": "val"},
        "commit": "0" * 40,
        "versions": {"numpy": "2.4.6"},
    }


def made_predictions(ious: Mapping[str, Sequence[float | None]]) -> pa.Table:
    """A predictions table of nothing but `X_iou` columns."""
    return pa.table(
        {f"{name}_iou": pa.array(values, pa.float64()) for name, values in ious.items()}
    )
