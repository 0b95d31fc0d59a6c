"""report.html: one self-contained page with the figures, and pictures of what they come from."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from jobs.evaluation import EvaluateConfig
from jobs.models import Nets, colour_statistics, load_nets
from jobs.scoring import METHODS, matrix
from model.adversarial import normalize
from model.localization import mask_map
from pipeline.shards import DataError, Sample, read_card, read_shard

REPORT_NAME = "report.html"
TEMPLATE = "report.html.j2"
PER_GROUP = 9  # pictures of each of best, worst and random
BINS = 20  # of the IoU histograms
CHART = (200.0, 80.0)  # width and height of a histogram's plot, in SVG units
CLASS_ROWS = 60  # of the per-class table; with more classes, half best and half worst
CLASS_METHODS = ("gradient", "cam", "centred_box")  # shown beside ALN per class
JPEG_QUALITY = 90
LIKELY_MASKED = 0.5


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of the report. image, map, masked: data URIs at the stored size; width, height:
    original pixels, in which the boxes are. iou: None where no true box is known."""

    id: str
    label: str
    predicted: str
    score: float
    iou: float | None
    found: bool
    width: int
    height: int
    box: list[int]
    truths: list[list[int]]
    image: str
    map: str
    masked: str


def heat(values: np.ndarray) -> np.ndarray:
    """Colours for a map of probabilities: float [H, W] in [0, 1] -> RGB uint8 [H, W, 3].

    Dark blue is 0, yellow 1, the same in every picture.
    """
    grey = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[..., ::-1]


def choose(ious: np.ndarray, count: int, seed: int) -> dict[str, list[int]]:
    """Positions of the pictures to show: the `count` best and worst IoUs, and as many random
    others. ious: float64 [N], NaN where no box is known (never best or worst). Of equal IoUs the
    first images come. No image is shown twice."""
    known = np.flatnonzero(~np.isnan(ious))
    best = known[np.argsort(-ious[known], kind="stable")][:count]
    rest = np.setdiff1d(known, best)
    worst = rest[np.argsort(ious[rest], kind="stable")][:count]
    others = np.setdiff1d(np.arange(len(ious)), np.concatenate([best, worst]))
    drawn = np.random.default_rng(seed).permutation(others)[:count]
    groups = {"best": best, "worst": worst, "random": np.sort(drawn)}
    return {name: positions.tolist() for name, positions in groups.items()}


def _data_uri(image: np.ndarray, extension: str) -> str:
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if extension == "jpeg" else []
    encoded = cv2.imencode(f".{extension}", image[..., ::-1], options)[1].tobytes()
    return f"data:image/{extension};base64,{base64.b64encode(encoded).decode()}"


def _samples(config: EvaluateConfig, chosen: pa.Table) -> dict[int, Sample]:
    """The chosen ledger rows' samples, by row; each shard that holds one is read once."""
    card = read_card(config.data)
    wanted = set(chosen["row"].to_pylist())
    samples = {}
    for shard in sorted(set(chosen["shard"].to_pylist())):
        for sample in read_shard(config.data / config.split / shard, card):
            if sample.row in wanted:
                samples[sample.row] = sample
    if wanted - samples.keys():
        raise DataError(
            f"ledger rows {sorted(wanted - samples.keys())} are not in the shards that the ledger "
            f"of {config.data} names; run jobs.preprocess again."
        )
    return samples


def _images(nets: Nets, sample: Sample, superpixels: int) -> dict[str, str]:
    """The three pictures of a sample as data URIs."""
    x = torch.from_numpy(sample.image.copy()).permute(2, 0, 1).unsqueeze(0).contiguous()
    x = normalize(x, *colour_statistics(nets.config, x.device))
    segments = torch.from_numpy(sample.segments.astype(np.int64)).unsqueeze(0)
    with torch.no_grad():
        values = mask_map(nets.corruption, x, segments, superpixels)[0].numpy()
    grey = np.rint(nets.config.mean).astype(np.uint8)  # a masked pixel is the mean colour
    masked = np.where((values > LIKELY_MASKED)[..., None], grey, sample.image)
    return {
        "image": _data_uri(sample.image, "jpeg"),
        "map": _data_uri(heat(values), "png"),
        "masked": _data_uri(masked, "jpeg"),
    }


def report_pictures(config: EvaluateConfig, predictions: pa.Table) -> dict[str, list[Picture]]:
    """Best, worst and random images by ALN's IoU, from the shards; their maps are made anew."""
    card, nets = read_card(config.data), load_nets(config.run)
    groups = choose(predictions["aln_iou"].to_numpy(), PER_GROUP, config.seed)
    shown = [position for positions in groups.values() for position in positions]
    chosen = predictions.take(shown)
    samples = _samples(config, chosen)
    classes = matrix(chosen, "classifier_classes")
    boxes = matrix(chosen, "aln_box")
    pictures = {}
    for i, (position, row) in enumerate(zip(shown, chosen.to_pylist(), strict=True)):
        pictures[position] = Picture(
            id=row["id"],
            label=card.class_names[row["label"]],
            predicted=card.class_names[classes[i, 0]],
            score=row["classifier_scores"][0],
            iou=row["aln_iou"],
            found=row["aln_found"],
            width=row["width"],
            height=row["height"],
            box=boxes[i].tolist(),
            truths=row["boxes"] or [],
            **_images(nets, samples[row["row"]], card.max_superpixels),
        )
    return {
        name: [pictures[position] for position in positions] for name, positions in groups.items()
    }


def _histograms(metrics: dict[str, Any], predictions: pa.Table) -> list[dict[str, Any]]:
    """Bars of each method's IoUs, all on one scale; methods that share boxes are drawn once."""
    charts: list[dict[str, Any]] = []
    for name, row in metrics["methods"].items():
        if name != METHODS[name].box or not row["n"]:
            continue
        ious = pc.drop_null(predictions[f"{name}_iou"]).to_numpy()
        counts = np.histogram(ious, bins=BINS, range=(0, 1))[0]
        charts.append({"title": row["title"], "gt_known": row["gt_known"], "counts": counts})
    top = max((int(chart["counts"].max()) for chart in charts), default=1)
    width, height = CHART[0] / BINS, CHART[1]
    for chart in charts:
        chart["bars"] = [
            {
                "x": i * width + 0.5,
                "y": height - height * count / top,
                "width": width - 1,
                "height": height * count / top,
                "right": 2 * i >= BINS,
                "label": f"IoU {i / BINS:.2f} to {(i + 1) / BINS:.2f}: {count} images",
            }
            for i, count in enumerate(chart.pop("counts").tolist())
        ]
    return charts


def _class_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Per class ALN's figures and the others' GT-known, worst first; unknown ones last."""
    methods = metrics["methods"]
    rows = [
        {
            "name": metrics["class_names"][wnid],
            "wnid": wnid,
            **part,
            "others": [
                methods[name]["classes"][wnid]["gt_known"]
                for name in CLASS_METHODS
                if name in methods
            ],
        }
        for wnid, part in methods["aln"]["classes"].items()
    ]
    rows.sort(key=lambda row: (row["gt_known"] is None, row["gt_known"], row["wnid"]))
    return rows


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent without the sign, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def render(
    metrics: dict[str, Any], predictions: pa.Table, pictures: dict[str, list[Picture]]
) -> str:
    """The page: HTML that needs no other file and no script.

    metrics: the content of metrics.json; predictions: joined, see jobs/scoring.py; pictures: by
    group, see `report_pictures`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    class_rows = _class_rows(metrics)
    left_out = max(0, len(class_rows) - CLASS_ROWS)
    if left_out:
        class_rows = class_rows[: CLASS_ROWS // 2] + class_rows[-CLASS_ROWS // 2 :]
    others = [metrics["methods"][n]["title"] for n in CLASS_METHODS if n in metrics["methods"]]
    return environment.get_template(TEMPLATE).render(
        m=metrics,
        aln=metrics["methods"]["aln"],
        histograms=_histograms(metrics, predictions),
        chart=CHART,
        class_rows=class_rows,
        classes_left_out=left_out,
        class_columns=others,
        pictures=pictures,
        configuration=json.dumps(metrics["configuration"], indent=1),
        data_configuration=json.dumps(metrics["data_configuration"], indent=1),
    )
