"""The flags of jobs.train, the values that its presets give them, and what to change where a
training collapses."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jobs.cli import check_bounds, option
from jobs.loading import LoadingConfig
from model.localization import Rule
from model.settings import LOGIT_LIMIT, Confusion, Objective

# Of flags that are not given; "small" are the defaults themselves.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "photos": {
        "sides": (224, 320),
        "co_trained": "last",
        "confusion": "true-logit",
        "imitation_weight": 10.0,
        "evidence_share": 0.35,
        "target_share": 0.22,
        "area_start": 0.5,
        "area_least": 0.2,
        "gumbel_noise": False,
        "adversary_side": 128,
        "warmup_epochs": 1,
        "epochs": 1,
        "batch_size": 32,
        "controller_rate": 0.012,
        "warmup_rate": 1e-2,  # of a new head, which alone trains then
        "classifier_rate": 5e-5,
        "precision": "bfloat16",
    },
    "paper": {
        "target": 0.1,
        "area_power": 1,
        "area_start": 0.35,
        "clean_weight": 0.0,
        "averaging": 0.0,
        "logit_limit": 0.0,
    },
}
REMEDIES = {  # of the signs in model/collapse.py
    "full": "raise --target-share (0.65 worked on photographs) or --target",
    "empty": "lower --area-start or the target",
    "closed": "raise --corruption-rate, --controller-rate or the target, or lower "
    "--imitation-weight",
    "open": "lower --corruption-rate or the target, or raise --classifier-rate",
    "chance": "change --warmup-rate or --classifier-rate, and look at the labels with jobs.inspect",
}


class Group:
    """A part of the configuration."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class NetsConfig(Group):
    """Shape of the nets, under the names of `jobs.runs.ModelConfig`."""

    network: str | None = option(
        None,
        help="a pretrained network that both nets are over: efficientnet-lite0 to 2, timm:NAME or "
        "torchvision:NAME (default: nets from scratch)",
    )
    sides: tuple[int, ...] = option(
        (),
        low=64,
        multiple_of=32,
        help="of images as --network sees them; the last in training",
    )
    decoder_width: int = option(
        96, low=16, multiple_of=16, help="channels of the corruption net over --network"
    )
    co_trained: Literal["none", "last", "all"] = option(
        "all",
        help="what of the classifier trains after the warm-up: none (the paper's section 3.4), of "
        "--network the last stages (1/32 of the sides), or all",
    )
    rule: Rule | None = option(
        None,
        help="box rule of jobs.localize and of tables (default: the paper's; over a network Otsu's "
        "or medoid, by how well boxes at the first and the last side agree)",
    )
    net_width: int = option(24, low=8, multiple_of=8, help="channels of the nets' first layers")
    residual_blocks: int = option(
        0, low=0, help="after each of the classifier's layers but the first (paper: 0)"
    )
    guide: bool = option(
        False, help="the corruption net also sees the clean classifier's last features (paper: no)"
    )
    bottleneck: int = option(256, low=1, help="units of the corruption net's fully connected layer")
    logit_limit: float = option(
        LOGIT_LIMIT, low=0, help="bound of the corruption net's logits (paper: 0, none)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network is None:
            if self.sides or self.co_trained == "last":
                raise ValueError("--sides and --co-trained last are about a --network; name one")
        elif not self.sides:
            raise ValueError("--network needs --sides, such as 224 320, or --preset photos")
        elif self.guide or self.residual_blocks or not self.logit_limit:
            raise ValueError(
                "--network takes the place of --guide and --residual-blocks, and needs a "
                "--logit-limit; leave them out"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Group):
    """What the nets minimize."""

    confusion: Confusion = option(
        "top",
        help="what confuses: the top logit against the others (the paper's), the true class's "
        "logit, or its log-probability",
    )
    area_power: int = option(2, low=1, high=2, help="power of the masked area (paper: 1)")
    clean_weight: float = option(
        1.0, low=0, help="weight of clean images in the classifier's adversarial loss (paper: 0)"
    )
    imitation_weight: float = option(
        0.0,
        low=0,
        help="weight of the masks' distance from LayerCAM of the clean classifier (paper: 0)",
    )
    adversary_side: int | None = option(
        None, low=32, help="side of the images that the co-trained classifier sees (default: as is)"
    )
    evidence_share: float = option(
        0.25, above=0, below=1, help="mask probability that imitation wants of average evidence"
    )
    superpixel_masks: bool = option(True, help="off: each pixel is masked by itself")
    gumbel_noise: bool = option(True, help="off: soft masks, probabilities instead of samples")

    def objective(self) -> Objective:
        """Return the settings of the losses."""
        weights = (self.clean_weight, self.imitation_weight)
        return Objective(
            self.confusion,
            self.area_power,
            *weights,
            evidence_share=self.evidence_share,
            soft=not self.gumbel_noise,
            adversary_side=self.adversary_side,
        )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Group):
    """How the two nets are kept in balance."""

    target: float | None = option(
        None, above=0, below=1, help="accuracy on masked images to keep (the paper's is 0.1)"
    )
    target_share: float = option(
        0.5, above=0, below=1, help="without --target: from chance (0) to the clean accuracy (1)"
    )
    area_start: float = option(
        1.0, above=0, help="first weight of the area over the corruption loss without masks"
    )
    area_least: float = option(
        0.0, low=0, high=1, help="least weight of the area, as a share of the first (paper: 0)"
    )
    controller_rate: float = option(
        0.006, above=0, below=1, help="relative change of the area weight per step"
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig(Group):
    """How long and how fast the nets train."""

    warmup_epochs: int = option(
        25,
        low=1,
        help="epochs of the classifier alone, on clean images (without, masks collapse); of "
        "--network: of imitation alone, and of a new head for classes that it does not know",
    )
    warmup_from: str | None = option(
        None,
        help="a run on the same set, with whose clean classifier to begin instead of a warm-up",
    )
    start_from: Literal["shipped"] | None = option(
        None,
        help="begin with the decoder that comes with the project, over the same --network, on "
        "whatever classes",
    )
    epochs: int = option(10, low=0, help="epochs of adversarial training after that")
    batch_size: int = option(64, low=1, help="images per step over all workers")
    network_weights: Path | None = option(
        None, help="weights file of --network (default: those of its package)"
    )
    seed: int = option(0, low=0, help="of weights, order, crops and mask samples")
    warmup_rate: float = option(1e-3, above=0, help="peak learning rate of the warm-up")
    corruption_rate: float = option(2e-3, above=0, help="learning rate of the corruption net")
    classifier_rate: float = option(1e-3, above=0, help="of the classifier, adversarial")
    averaging: float = option(
        0.99, low=0, below=1, help="decay of the corruption net's average, per step (paper: 0)"
    )
    precision: Literal["float32", "bfloat16"] = option(
        "float32", help="of the nets' convolutions; weights and sums stay float32"
    )


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig(Group):
    """What a training runs on; it may change when a run goes on."""

    workers: str = option(
        "2",
        help="training processes of one GPU or CPU core each; MIN:MAX: as many as the cluster has, "
        "going on from the last checkpoint when that changes",
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", help="cpu, cuda, or auto: cuda where the cluster has GPUs"
    )
    graphs: bool = option(True, help="on a GPU: record each kind of step once and replay it")
    resident: bool | None = option(
        None,
        help="keep all train images in the memory of each worker's GPU (default: where they take "
        "at most half of what is free)",
    )
    verify_shards: bool = option(
        False, help="first check every byte of a local set's train shards by SHA-256"
    )
    max_failures: int = option(
        2, low=0, help="deaths of workers to recover from, each from the last checkpoint"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.workers)
        if not numbers or self.worker_range[0] > self.worker_range[1]:
            raise ValueError(f"--workers {self.workers} is out of range: from 1, or MIN:MAX")

    @property
    def worker_range(self) -> tuple[int, int]:
        """MIN and MAX of --workers MIN:MAX, the number twice without a range."""
        fewest, _, most = self.workers.partition(":")
        return int(fewest), int(most or fewest)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Group):
    """What a run writes down, and when it stops; it may change when a run goes on."""

    log_interval: int = option(20, low=1, help="steps between lines of the log")
    checkpoint_interval: int = option(
        500, low=1, help="steps between checkpoints within an epoch; each epoch ends with one"
    )
    keep_checkpoints: int = option(
        2, low=2, help="newest checkpoints to keep, so that one is left where another is damaged"
    )
    collapse_steps: int = option(
        1000,
        low=5,
        help="steps on end with full or empty masks, a stuck gate or an accuracy at chance, after "
        "which training stops; after a fifth of them the log says so",
    )
    stop_on_collapse: bool = option(True, help="off: only say so in the log")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; `docs/method.md` explains each choice."""

    output: str = option(help="folder or URI for checkpoints, metrics and the trained nets")
    preset: Literal["small", "photos", "paper"] = option(
        "small",
        help="defaults of the flags below: what measured best on small images with nets from "
        "scratch; on photographs with --network, where it is the default; or the paper",
    )
    loading: LoadingConfig
    nets: NetsConfig = field(default_factory=NetsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if self.nets.network is not None and self.optimization.warmup_from is not None:
            raise ValueError("--warmup-from is for nets from scratch; leave it out with --network")
        if self.nets.network is None and self.optimization.network_weights is not None:
            raise ValueError("--network-weights needs the name of the network: --network")


def by_flag(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration without its groups: by the flags' names alone."""
    values: dict[str, Any] = {}
    for name, value in configuration.items():
        values |= by_flag(value) if isinstance(value, Mapping) else {name: value}
    return values
