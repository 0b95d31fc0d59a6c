"""The flags of `python -m jobs.evaluate`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jobs.cli import check_bounds, flag, option
from model.localization import Rule
from pipeline.evaluation.protocols import PROTOCOLS
from pipeline.loading.cache import DEFAULT_LIMIT
from pipeline.storage import absolute

SOURCES = ("run", "network", "score_maps", "predictions")
PATHS = (
    *("output", "run", "score_maps", "export"),
    *("network_weights", "network_classes", "cache"),
)


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
    run: Path | None = option(None, help="evaluate the nets in this folder of jobs.train")
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
    output: Path = option(help="folder for the figures, predictions, maps and report.html")
    split: str = option("val", help="split of --data to evaluate")
    protocol: Literal["devkit", "exclusive", "int224"] = option(
        "devkit", help="; ".join(f"{name}: {p.text}" for name, p in PROTOCOLS.items())
    )
    rule: Rule = option(
        "paper", help="box rule of the printed table; the files and the page have all"
    )
    baselines: bool = option(
        True, help="beside --run's ALN also maps of its clean classifier: CAM and others"
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
    export: Path | None = option(
        None, help="folder for --run's score maps and boxes in the formats of others"
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
        if (self.data is None) == (self.ground_truth is None):
            raise ValueError("give either --data (shards) or --ground-truth (files), one of them")
        given = [flag(name) for name in SOURCES if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are {len(given)} sources, and an evaluation has one; "
                "evaluate each into a folder of its own, then compare them: "
                "python -m jobs.report FOLDER FOLDER --output report.html"
            )
        for name in ("run", "network"):
            if getattr(self, name) and self.data is None:
                raise ValueError(f"--{name} needs images: give --data SHARDS")
        for name in ("network_weights", "network_classes", "network_size"):
            if getattr(self, name) and not self.network:
                raise ValueError(f"{flag(name)} is about a network: it needs --network")
        if self.classifier and self.network:
            raise ValueError(
                "--classifier beside --network: every row has the network's classes; leave it out"
            )
        if self.export and not self.run:
            raise ValueError("--export writes what our nets predict: it needs --run")
        if self.ten_crops and not (self.run or self.network):
            raise ValueError(
                "--ten-crops is about the classes of nets: it needs --run or --network"
            )
        if self.centred_box is not None and len(self.centred_box) not in (1, 2):
            raise ValueError(f"--centred-box {self.centred_box} must be one or two shares")

    def resolved(self) -> "EvaluateConfig":
        """Return this with absolute paths: tasks may run in another folder than the driver."""
        given = {name: getattr(self, name) for name in PATHS}
        paths: dict[str, Any] = {n: path.resolve() for n, path in given.items() if path is not None}
        if self.data is not None:
            paths["data"] = absolute(self.data)
        return replace(self, **paths)
