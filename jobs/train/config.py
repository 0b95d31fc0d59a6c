"""The flags of jobs.train, and the values that its presets give them."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.cli import option
from jobs.loading import LoadingConfig
from model.corruption import LOGIT_LIMIT
from model.losses import Confusion

# Of flags that are not given; "best" are the defaults of TrainConfig themselves.
PRESETS: dict[str, dict[str, Any]] = {
    "best": {},
    "paper": {
        "target": 0.1,
        "area_power": 1,
        "area_start": 0.35,
        "clean_weight": 0.0,
        "averaging": 0.0,
        "logit_limit": 0.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoadingConfig):
    """How to train; `docs/method.md` explains each choice."""

    output: Path = option(help="folder for checkpoints, metrics and the trained nets")
    workers: str = option(
        "2",
        help="training processes, each with one GPU or one CPU core; MIN:MAX takes as many as the "
        "cluster has, and goes on from the last checkpoint when that changes",
    )
    preset: Literal["best", "paper"] = option(
        "best",
        help="defaults of the flags below: what measured best, or the paper read literally where "
        "that makes sense (docs/method.md has both)",
    )
    device: str = option("auto", help="cpu, cuda, or auto: cuda where the cluster has GPUs")
    warmup_epochs: int = option(25, help="epochs of the classifier alone, on clean images")
    warmup_from: Path | None = option(
        None,
        help="a run on the same set, past its warm-up, whose clean classifier to begin with: no "
        "warm-up then, whatever --warmup-epochs",
    )
    epochs: int = option(10, help="epochs of adversarial training after that")
    batch_size: int = option(64, help="images per step over all workers")
    seed: int = option(0, help="of weights, order, crops and mask samples")
    net_width: int = option(24, help="channels of the nets' first layers, a multiple of 8")
    residual_blocks: int = option(
        0, help="residual blocks after each of the classifier's layers but the first (paper: 0)"
    )
    guide: bool = option(
        False,
        help="the corruption net also sees the clean classifier's last feature map (paper: no)",
    )
    bottleneck: int = option(256, help="units of the corruption net's fully connected layer")
    warmup_rate: float = option(1e-3, help="peak learning rate of the warm-up")
    corruption_rate: float = option(2e-3, help="learning rate of the corruption net")
    classifier_rate: float = option(1e-3, help="learning rate of the classifier, adversarial")
    clean_weight: float = option(
        1.0, help="weight of clean images in the classifier's adversarial loss (paper: 0)"
    )
    target: float | None = option(
        None, help="accuracy on masked images to hold, 0 to 1 (the paper's is 0.1)"
    )
    target_share: float = option(
        0.5, help="without --target: its place between chance and the clean accuracy, 0 to 1"
    )
    area_power: int = option(2, help="power of the masked area in the loss (paper: 1)")
    area_start: float = option(
        1.0,
        help="first weight of the area, as a multiple of the corruption loss without masks",
    )
    controller_rate: float = option(0.006, help="relative change of the area weight per step")
    averaging: float = option(
        0.99, help="decay of the corruption net's running average, per step (paper: 0, none)"
    )
    logit_limit: float = option(
        LOGIT_LIMIT,
        help="bound of the corruption net's logits, beyond which masks could not come back "
        "(paper: 0, none)",
    )
    confusion: Confusion = option(
        "top",
        help="what confuses: the top logit against the others (the paper's), the true class's "
        "logit, or its log-probability",
    )
    complement_weight: float = option(
        0.0,
        help="weight, in the corruption net's loss, of the classifier's cross-entropy where only "
        "the masked part is shown (paper: 0)",
    )
    imitation_weight: float = option(
        0.0,
        help="weight, in the corruption net's loss, of its distance from what "
        "LayerCAM of the clean classifier says of the label (paper: 0)",
    )
    train_classifier: bool = option(
        True, help="off: the classifier stays frozen after the warm-up (the paper's section 3.4)"
    )
    superpixel_masks: bool = option(True, help="off: each pixel is masked by itself")
    gumbel_noise: bool = option(
        True, help="off: soft masks, the probabilities themselves instead of samples"
    )
    precision: Literal["float32", "bfloat16"] = option(
        "float32", help="of the nets' convolutions; weights and sums stay float32"
    )
    compile: bool = option(False, help="compile the nets (a C++ compiler, and a minute at start)")
    graphs: bool = option(
        True,
        help="on a GPU: record each kind of step once and replay it; off: launch its kernels one "
        "by one",
    )
    verify_shards: bool = option(
        False, help="first check every byte of a local set's train shards by SHA-256"
    )
    log_interval: int = option(20, help="steps between lines of the log")
    checkpoint_interval: int = option(
        500, help="steps between checkpoints within an epoch; at its end there is one anyway"
    )
    keep_checkpoints: int = option(2, help="checkpoints kept, the newest")
    max_failures: int = option(
        2, help="deaths of workers to recover from, each from the last checkpoint"
    )
    collapse_steps: int = option(
        1000,
        help="steps on end with masks of everything or nothing, a stuck gate or an accuracy at "
        "chance, after which training stops; after a fifth of them the log says so",
    )
    stop_on_collapse: bool = option(True, help="off: only say so in the log")
    mlflow: str | None = option(
        None, help="tracking URI of an MLflow server or folder to log to as well (pip: mlflow)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = "a number above 0"
        checks = {
            "workers": (
                re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.workers) is not None
                and self.fewest_workers <= self.most_workers,
                "a number from 1, or MIN:MAX",
            ),
            "epochs": (self.epochs >= 1, "from 1"),
            "batch_size": (self.batch_size >= 1, "from 1"),
            "log_interval": (self.log_interval >= 1, "from 1"),
            "bottleneck": (self.bottleneck >= 1, "from 1"),
            "residual_blocks": (self.residual_blocks >= 0, "from 0"),
            "seed": (self.seed >= 0, "from 0"),
            "max_failures": (self.max_failures >= 0, "from 0"),
            "checkpoint_interval": (self.checkpoint_interval >= 1, "from 1"),
            "keep_checkpoints": (
                self.keep_checkpoints >= 2,
                "from 2, so that one is left where the newest is damaged",
            ),
            "collapse_steps": (self.collapse_steps >= 5, "from 5"),
            "logit_limit": (0 <= self.logit_limit < math.inf, "a number from 0"),
            "complement_weight": (0 <= self.complement_weight < math.inf, "a number from 0"),
            "imitation_weight": (0 <= self.imitation_weight < math.inf, "a number from 0"),
            "net_width": (self.net_width >= 8 and self.net_width % 8 == 0, "a multiple of 8"),
            "warmup_epochs": (
                self.warmup_epochs >= 1,
                "from 1: without a warmed-up classifier the masks collapse to nothing and the "
                "gate never lets it learn",
            ),
            "warmup_rate": (0 < self.warmup_rate < math.inf, positive),
            "corruption_rate": (0 < self.corruption_rate < math.inf, positive),
            "classifier_rate": (0 < self.classifier_rate < math.inf, positive),
            "area_start": (0 < self.area_start < math.inf, positive),
            "clean_weight": (0 <= self.clean_weight < math.inf, "a number from 0"),
            "target": (self.target is None or 0 < self.target < 1, "between 0 and 1"),
            "target_share": (0 < self.target_share < 1, "between 0 and 1"),
            "controller_rate": (0 < self.controller_rate < 1, "between 0 and 1"),
            "averaging": (0 <= self.averaging < 1, "from 0, below 1"),
            "area_power": (self.area_power in (1, 2), "1 or 2"),
            "device": (self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {getattr(self, name)} is out of range: {allowed}")

    @property
    def fewest_workers(self) -> int:
        """MIN of --workers MIN:MAX, or the number."""
        return int(self.workers.partition(":")[0])

    @property
    def most_workers(self) -> int:
        """MAX of --workers MIN:MAX, or the number."""
        return int(self.workers.rpartition(":")[2])
