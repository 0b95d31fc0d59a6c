"""RUN/model.pt: the trained nets with everything needed to use them again."""

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.cli import UserError
from model.classifier import Classifier
from model.corruption import CorruptionNet
from pipeline.shards import write_atomically

MODEL_NAME = "model.pt"
MODEL_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the nets, and how images are normalized (mean and std per channel, in 0..255)."""

    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    height: int
    width: int
    net_width: int
    bottleneck: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    superpixels: int
    compactness: float


@dataclass(frozen=True, kw_only=True)
class Nets:
    """corruption: the averaged corruption net. classifier: the co-trained one.
    clean_classifier: the same architecture trained on clean images alone."""

    config: ModelConfig
    corruption: CorruptionNet
    classifier: Classifier
    clean_classifier: Classifier


def colour_statistics(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, float32 [3] each, in 0..255, on the device."""
    return torch.tensor(config.mean, device=device), torch.tensor(config.std, device=device)


def new_corruption(config: ModelConfig) -> CorruptionNet:
    """A corruption net with random weights from torch's global generator."""
    return CorruptionNet((config.height, config.width), config.net_width, config.bottleneck)


def new_classifier(config: ModelConfig) -> Classifier:
    """A classifier with random weights from torch's global generator."""
    return Classifier(len(config.classes), config.net_width)


def save_nets(run: Path, nets: Nets, record: dict[str, Any]) -> None:
    """Write RUN/model.pt atomically; `record` (configuration, commit, versions) goes with it."""
    buffer = io.BytesIO()
    content = {
        "format": MODEL_FORMAT,
        "config": asdict(nets.config),
        "corruption": nets.corruption.state_dict(),
        "classifier": nets.classifier.state_dict(),
        "clean_classifier": nets.clean_classifier.state_dict(),
        "record": record,
    }
    torch.save(content, buffer)
    write_atomically(run / MODEL_NAME, buffer.getvalue())


def load_nets(run: Path) -> Nets:
    """Read RUN/model.pt onto the CPU, in evaluation mode. Raises UserError for a missing,
    damaged or foreign file."""
    path = run / MODEL_NAME
    if not path.is_file():
        raise UserError(
            f"{run} holds no {MODEL_NAME}: no training has finished there. "
            f"Run: python -m jobs.train --data SHARDS --output {run}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format"]
        if version == MODEL_FORMAT:
            return _nets(content)
    except Exception as error:  # torch raises many types for damaged files
        raise UserError(f"{path} cannot be read ({type(error).__name__}); train again.") from error
    raise UserError(f"{path} has format {version}; this program reads {MODEL_FORMAT}.")


def _nets(content: dict[str, Any]) -> Nets:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list | tuple) else value
        for name, value in content["config"].items()
    }
    config = ModelConfig(**values)
    nets = Nets(
        config=config,
        corruption=new_corruption(config).eval(),
        classifier=new_classifier(config).eval(),
        clean_classifier=new_classifier(config).eval(),
    )
    nets.corruption.load_state_dict(content["corruption"])
    nets.classifier.load_state_dict(content["classifier"])
    nets.clean_classifier.load_state_dict(content["clean_classifier"])
    return nets
