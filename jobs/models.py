"""RUN/model/: the trained nets with everything needed to use them again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.cli import UserError
from jobs.weights import DamagedError, read_weights, write_weights
from model.classifier import Classifier
from model.corruption import LOGIT_LIMIT, CorruptionNet

MODEL_NAME = "model/model.json"  # model/model.safetensors holds the weights
MODEL_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the nets, and how images are normalized (mean and std per channel, in 0..255).
    logit_limit: bound of the corruption net's logits, 0 for none. residual_blocks: of the
    classifier, after each layer but the first. guide: whether the corruption net holds the clean
    classifier and sees its last feature map."""

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
    logit_limit: float = LOGIT_LIMIT
    residual_blocks: int = 0
    guide: bool = False


@dataclass(frozen=True, kw_only=True)
class Nets:
    """corruption: the averaged corruption net. classifier: the co-trained one.
    clean_classifier: the same architecture trained on clean images alone."""

    config: ModelConfig
    corruption: CorruptionNet
    classifier: Classifier
    clean_classifier: Classifier

    def modules(self) -> dict[str, nn.Module]:
        """The nets by name."""
        return {
            "corruption": self.corruption,
            "classifier": self.classifier,
            "clean_classifier": self.clean_classifier,
        }


def colour_statistics(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, float32 [3] each, in 0..255, on the device."""
    return torch.tensor(config.mean, device=device), torch.tensor(config.std, device=device)


def new_corruption(config: ModelConfig) -> CorruptionNet:
    """A corruption net with random weights from torch's global generator."""
    size = (config.height, config.width)
    guide = None
    if config.guide:
        with torch.random.fork_rng(devices=[]):  # the rest is drawn as without a guide
            guide = new_classifier(config)
    return CorruptionNet(size, config.net_width, config.bottleneck, config.logit_limit, guide)


def new_classifier(config: ModelConfig) -> Classifier:
    """A classifier with random weights from torch's global generator."""
    return Classifier(len(config.classes), config.net_width, config.residual_blocks)


def net_tensors(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All weights, named NET.PARAMETER."""
    return {
        f"{name}.{key}": tensor
        for name, net in nets.items()
        for key, tensor in net.state_dict().items()
    }


def load_net_tensors(nets: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Fill the nets, in place, from what `net_tensors` named. Raises RuntimeError where they are
    of another shape."""
    for name, net in nets.items():
        start = f"{name}."
        own = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
        net.load_state_dict(own)


def save_nets(run: Path, nets: Nets, record: dict[str, Any]) -> None:
    """Write RUN/model/; `record` (configuration, commit, versions) goes with it. The JSON file
    is there only once all is."""
    content = {"format": MODEL_FORMAT, "config": asdict(nets.config), "record": record}
    write_weights(run / MODEL_NAME, net_tensors(nets.modules()), content)


def load_nets(run: Path) -> Nets:
    """Read RUN/model/ onto the CPU, in evaluation mode. Raises UserError for missing, damaged or
    foreign files."""
    path = run / MODEL_NAME
    if not path.is_file():
        raise UserError(
            f"{run} holds no {MODEL_NAME}: no training has finished there. "
            f"Run: python -m jobs.train --data SHARDS --output {run}"
        )
    try:
        tensors, content = read_weights(path)
    except DamagedError as error:
        raise UserError(
            f"{error}; copy the run again, or delete {path.parent} and give the training's command "
            "again: it goes on from the last checkpoint"
        ) from error
    if content.get("format") != MODEL_FORMAT:
        raise UserError(
            f"{path} has format {content.get('format')}; this program reads {MODEL_FORMAT}."
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in content["config"].items()
    }
    config = ModelConfig(**values)
    nets = Nets(
        config=config,
        corruption=new_corruption(config).eval(),
        classifier=new_classifier(config).eval(),
        clean_classifier=new_classifier(config).eval(),
    )
    load_net_tensors(nets.modules(), tensors)
    return nets
