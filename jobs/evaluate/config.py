"""The flags of `python -m jobs.evaluate`."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from jobs.cli import check_bounds, flag, option
from model.localization import Rule
from pipeline.evaluation.protocols import PROTOCOLS
from pipeline.evaluation.results import (
    IMAGES_NAME,
    MAPS_NAME,
    METRICS_NAME,
    NEW_MAPS_NAME,
    PREDICTIONS_NAME,
)
from pipeline.loading.cache import DEFAULT_LIMIT, check_use
from pipeline.storage import absolute

SOURCES = ("run", "network", "score_maps", "predictions")
NEEDS = {  # a flag: of those that make use of it one is given
    "run": ("data",),
    "network": ("data",),
    "cache": ("data",),
    "cache_limit": ("data",),
    "split": ("data",),
    "classes": ("ground_truth",),
    "image_sizes": ("ground_truth",),
    "network_weights": ("network",),
    "network_classes": ("network",),
    "network_size": ("network",),
    "baselines": ("run",),
    "accurate": ("run",),
    "ten_crops": ("run", "network"),
    "batch_size": ("run", "network"),
    "shards": ("run", "network"),
    "workers": ("run", "network", "score_maps"),
    "rule": ("run", "network", "score_maps"),
}
WRITTEN = (METRICS_NAME, PREDICTIONS_NAME, IMAGES_NAME, MAPS_NAME, NEW_MAPS_NAME)
PATHS = ("score_maps", "network_weights", "network_classes", "cache")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, on what, and how it is divided."""

    data: str | None = option(None, help="shards that jobs.preprocess wrote: a folder, or a URI")
    cache: Path | None = option(
        None, help="folder for shards of remote --data (default: in the user's cache folder)"
    )
    cache_limit: float = option(
        DEFAULT_LIMIT, above=0, help="GiB that the files in it may take together"
    )
    ground_truth: Path | None = option(
        None,
        help="instead of --data: a folder of wsolevaluation metadata or of ILSVRC XML files, or a "
        "Kaggle solution CSV",
    )
    run: Path | str | None = option(
        None, help="evaluate the nets in this folder or URI of jobs.train"
    )
    network: str | None = option(
        None,
        help="evaluate a network: efficientnet-lite0 to 2, timm:NAME or torchvision:NAME",
    )
    network_weights: Path | None = option(
        None, help="weights file of --network (default: its package's, or timm's download)"
    )
    network_classes: Path | None = option(
        None,
        help="a wnid per line, in the order of --network's outputs (default: the data's, or the "
        "1000 of ILSVRC)",
    )
    network_size: int | None = option(
        None, low=1, help="side in pixels that --network is fed (default: its own)"
    )
    score_maps: Path | None = option(
        None, help="evaluate a folder of score maps ID.npy in [0, 1], all of one size"
    )
    predictions: Path | None = option(
        None, help="evaluate boxes with classes: Kaggle .csv, or .parquet"
    )
    output: Path | str = option(help="folder or URI for figures, predictions, maps, report.html")
    split: str = option("val", help="split of --data to evaluate")
    protocol: Literal["devkit", "exclusive", "int224"] = option(
        "devkit", help="; ".join(f"{name}: {p.text}" for name, p in PROTOCOLS.items())
    )
    rule: Rule | None = option(
        None,
        help="box rule of the printed table; the files and the page have all (default: the run's, "
        "else the paper's)",
    )
    baselines: bool = option(
        True, help="beside --run's ALN also maps of its clean classifier: CAM and others"
    )
    accurate: bool = option(
        False,
        help="average maps over all of the run's --sides and over mirror images, then look again "
        "at the part around the box, enlarged (nets over a pretrained network; 5 times slower)",
    )
    ten_crops: bool = option(
        False,
        help="classes (not maps) of --run and --network from ten crops of each image, their "
        "probabilities averaged: corners and centre, 7/8 of the sides, each also mirrored",
    )
    classifier: Path | None = option(
        None,
        help="another classifier's best classes (CSV or Parquet), for a row with ALN's boxes, and "
        "without --run for all rows that have none of their own",
    )
    classes: Path | None = option(
        None,
        help="a wnid per line (LOC_synset_mapping.txt), where the ground truth has numbers only",
    )
    image_sizes: Path | None = option(
        None, help="lines id,width,height, where the ground truth has none (a Kaggle CSV)"
    )
    centred_box: tuple[float, ...] | None = option(
        None,
        above=0,
        high=1,
        help="height and width of the centred box as shares (default: best on train boxes)",
    )
    batch_size: int = option(100, low=1, help="images the nets see at once")
    workers: int | None = option(
        None,
        low=1,
        help="tasks at once (default: one per CPU, or four per GPU where there are any)",
    )
    shards: int | None = option(
        None, low=1, help="tasks of the split, at most one per batch (default: 4 per worker)"
    )
    seed: int = option(
        0, low=0, help="of the bootstrap, of whose box is another's, of random pictures"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        check_use(self.data, self.cache, self.cache_limit)
        if (self.data is None) == (self.ground_truth is None):
            raise ValueError("give either --data (shards) or --ground-truth (files), one of them")
        given = [flag(name) for name in SOURCES if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are {len(given)} sources, and an evaluation has one; "
                "evaluate each into a folder of its own, then compare them: "
                "python -m jobs.report FOLDER FOLDER --output report.html"
            )
        for field in fields(self):
            users = NEEDS.get(field.name)
            if (
                users
                and getattr(self, field.name) != field.default
                and not any(getattr(self, user) for user in users)
            ):
                raise ValueError(
                    f"{flag(field.name)} is of use only with {' or '.join(map(flag, users))}; give "
                    "that, or leave it out"
                )
        if self.classifier and self.network:
            raise ValueError(
                "--classifier beside --network: every row has the network's classes; leave it out"
            )
        if self.centred_box is not None and len(self.centred_box) not in (1, 2):
            raise ValueError(f"--centred-box {self.centred_box} must be one or two shares")
        written = {Path(absolute(self.output), name) for name in WRITTEN}
        for name in ("ground_truth", "score_maps", "predictions", "classifier"):
            path = getattr(self, name)
            if path and written & {path.resolve(), *path.resolve().parents}:
                raise ValueError(
                    f"{flag(name)} {path} is what an evaluation into --output {self.output} "
                    "replaces; give another --output"
                )

    def resolved(self) -> "EvaluateConfig":
        """Return this with absolute paths: tasks may run in another folder than the driver."""
        given = {name: getattr(self, name) for name in PATHS}
        paths: dict[str, Any] = {n: path.resolve() for n, path in given.items() if path is not None}
        for name in ("data", "run", "output"):
            if (location := getattr(self, name)) is not None:
                paths[name] = absolute(location)
        return replace(self, **paths)
