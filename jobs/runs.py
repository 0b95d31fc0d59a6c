"""The files of a run that commands share: its nets, and how far a training has come."""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from jobs.networks import untrained_network
from model.classifier import Classifier
from model.corruption import CorruptionNet
from model.decoder import FeatureCorruptionNet
from model.localization import Rule
from model.pretrained import Part, PretrainedClassifier
from model.saliency import AnyClassifier
from model.settings import LOGIT_LIMIT
from pipeline import storage
from pipeline.errors import UserError

MODEL_NAME = "model/model.json"  # model/model.safetensors holds the weights
MODEL_FORMAT = 2
RUN_NAME = "run.json"
LOG_NAME = "log.txt"  # only ever appended to, so that it can be followed; locked by a training
METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the nets (see their classes and the flags of jobs.train), and how images are
    normalized: mean and deviation per channel, in 0..255. network: None for nets from scratch."""

    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    height: int
    width: int
    net_width: int
    bottleneck: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    superpixels: int
    compactness: float
    logit_limit: float = LOGIT_LIMIT
    residual_blocks: int = 0
    guide: bool = False
    network: str | None = None
    sides: tuple[int, ...] = ()
    decoder_width: int = 96
    co_trained: Part = "all"
    rule: Rule = "paper"


@dataclass(frozen=True)
class Nets:
    """corruption: the averaged one. classifier: the co-trained one. clean_classifier: the same
    architecture trained on clean images alone."""

    config: ModelConfig
    corruption: CorruptionNet | FeatureCorruptionNet
    classifier: AnyClassifier
    clean_classifier: AnyClassifier

    def modules(self) -> dict[str, nn.Module]:
        """Return the nets by name."""
        return {name: net for name, net in vars(self).items() if isinstance(net, nn.Module)}


def colour_statistics(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation per channel, float32 [3] each, in 0..255, on the device."""
    return torch.tensor(config.mean, device=device), torch.tensor(config.std, device=device)


def new_corruption(config: ModelConfig) -> CorruptionNet:
    """Return a corruption net with random weights from torch's global generator."""
    size = (config.height, config.width)
    guide = None
    if config.guide:
        with torch.random.fork_rng(devices=[]):  # the rest is drawn as without a guide
            guide = new_classifier(config)
    return CorruptionNet(size, config.net_width, config.bottleneck, config.logit_limit, guide)


def new_classifier(config: ModelConfig) -> Classifier:
    """Return a classifier with random weights from torch's global generator."""
    return Classifier(len(config.classes), config.net_width, config.residual_blocks)


def new_nets(config: ModelConfig, pretrained: PretrainedClassifier | None = None) -> Nets:
    """Return nets as training begins with them. The classifiers are equal; those over a pretrained
    network share what is not co-trained. pretrained: the network, where it is already built."""
    if config.network is None:
        corruption, classifier = new_corruption(config), new_classifier(config)
        return Nets(config, corruption, classifier, copy.deepcopy(classifier))
    if pretrained is None:
        outputs = len(config.classes)
        pretrained = untrained_network(config.network, outputs, config.sides[-1]).classifier
    settings = (config.sides, config.decoder_width, config.logit_limit)
    corrupting = FeatureCorruptionNet(pretrained, *settings)
    return Nets(config, corrupting, pretrained.copy(config.co_trained), pretrained)


def net_tensors(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return all weights, named NET.PARAMETER; of a classifier over a pretrained network those that
    train, since it shares the others with the clean classifier."""
    tensors: dict[str, Tensor] = {}
    for name, net in nets.items():
        own = net.trained_tensors() if _shares(net, name) else net.state_dict()
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    return tensors


def _shares(net: nn.Module, name: str) -> TypeGuard[PretrainedClassifier]:
    return name == "classifier" and isinstance(net, PretrainedClassifier)


def load_net_tensors(nets: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Fill the nets from what `net_tensors` returned. Raises RuntimeError for other shapes."""
    for name, net in nets.items():
        start = f"{name}."
        own = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
        net.load_state_dict(own, strict=not _shares(net, name))


def save_nets(run: str | Path, nets: Nets, record: dict[str, Any]) -> None:
    """Write RUN/model/ with `record` (configuration, commit, versions), the JSON file last."""
    content = {"format": MODEL_FORMAT, "config": asdict(nets.config), "record": record}
    write_weights(storage.join(run, MODEL_NAME), net_tensors(nets.modules()), content)


def model_hash(run: str | Path) -> str:
    """Return the SHA-256, as hexadecimal digits, that tells a run's nets from others."""
    return hashlib.sha256(storage.read_bytes(storage.join(run, MODEL_NAME))).hexdigest()


def read_config(run: str | Path) -> ModelConfig:
    """Read the shape of a run's nets, and no weights. Raises UserError as `load_nets` does."""
    with _remedies(run):
        content = read_content(storage.join(run, MODEL_NAME))
    return shape_of_nets(storage.join(run, MODEL_NAME), content)


def shape_of_nets(path: str | Path, content: Mapping[str, Any], **values: Any) -> ModelConfig:
    """Return the shape of nets whose JSON file has this content, with values that are not in it.
    Raises UserError for a file of another format or version."""
    if content.get("format") != MODEL_FORMAT:
        raise UserError(f"{path} has format {content.get('format')}; {MODEL_FORMAT} is read.")
    values |= {k: tuple(v) if isinstance(v, list) else v for k, v in content["config"].items()}
    try:
        return ModelConfig(**values)
    except TypeError as error:
        raise _of_another_version(path) from error


def load_nets(run: str | Path, *, accurate: bool = False) -> Nets:
    """Read RUN/model/ onto the CPU, in evaluation mode. Raises UserError for missing, damaged or
    foreign files. accurate: of nets over a pretrained network, see FeatureCorruptionNet.looks."""
    path = storage.join(run, MODEL_NAME)
    with _remedies(run):
        tensors, content = read_weights(path)
    config = shape_of_nets(path, content)
    if accurate and config.network is None:
        raise UserError(f"--accurate is for nets over a pretrained network; those of {run} are not")
    nets = new_nets(config)
    for net in nets.modules().values():
        net.eval()
    try:
        load_net_tensors(nets.modules(), tensors)
    except RuntimeError as error:
        raise _of_another_version(path) from error
    if isinstance(nets.corruption, FeatureCorruptionNet):
        nets.corruption.looks = config.rule if accurate else None
    return nets


def _of_another_version(path: str | Path) -> UserError:
    return UserError(
        f"{path} describes other nets than this version has; use the version that its record "
        "names, or train anew"
    )


@contextmanager
def _remedies(run: str | Path) -> Iterator[None]:
    """Say what to do where a run's nets are missing or damaged."""
    path = storage.join(run, MODEL_NAME)
    if not storage.is_file(path):
        raise UserError(f"{run} holds no {MODEL_NAME}: {_unfinished(run)}")
    try:
        yield
    except DamagedError as error:
        raise UserError(
            f"{error}; copy the run again, or delete {storage.parent(path)} and train on from the "
            "last checkpoint by the same command"
        ) from error


def _unfinished(run: str | Path) -> str:
    """Return in words why a run holds no nets, and what to do."""
    if is_training(run):
        return f"it is still training, {_progress(run)}; wait until it has finished"
    if storage.is_file(storage.join(run, RUN_NAME)):
        return f"its training stopped {_progress(run)}; the same jobs.train command goes on"
    return f"no training has finished there. Run: python -m jobs.train --data SHARDS --output {run}"


def _progress(run: str | Path) -> str:
    """Return the last step that a run has logged, in words."""
    step = "before the first line of its log"
    with suppress(storage.MissingError):
        for text in storage.read_bytes(storage.join(run, METRICS_NAME)).splitlines():
            with suppress(ValueError, LookupError, TypeError):  # of a line that was cut off
                values = json.loads(text)
                step = f"at step {values['step']} of {values['steps']}"
    return step


def is_training(run: str | Path) -> bool:
    """Return whether a process trains in this folder, False of a URI, which cannot be locked."""
    if storage.is_remote(run):
        return False
    try:
        with storage.local_path(storage.join(run, LOG_NAME)).open("rb") as file:
            return not storage.lock(file, shared=True)
    except (FileNotFoundError, NotADirectoryError):
        return False


def check_training(run: str | Path) -> None:
    """Raise UserError where a process trains in this folder."""
    if is_training(run):
        raise _other_training(run)


def _other_training(run: str | Path) -> UserError:
    return UserError(f"another process trains in {run}, {_progress(run)}; wait for it, or end it")


@contextmanager
def exclusive_run(run: str | Path) -> Iterator[None]:
    """Make a run's folder and keep other trainings from it; not from a URI. Raises UserError."""
    with storage.locked_file(storage.join(run, LOG_NAME)) as is_alone:
        if not is_alone:
            raise _other_training(run)
        yield


class DamagedError(Exception):
    """A file that is missing or not what was written. The message says which and how."""


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_weights(
    path: str | Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]
) -> None:
    """Write the tensors beside the JSON file `path`, then `content` into it, with the size and
    SHA-256 of the tensors' file and the SHA-256 of itself. Raises OSError, of a URI UserError."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data, beside = safetensors.torch.save(plain), storage.with_suffix(path, ".safetensors")
    storage.make_folder(storage.parent(path))
    storage.remove(path)
    storage.write_atomically(beside, data)
    digest = hashlib.sha256(data).hexdigest()
    tensors_file = {"file": storage.name(beside), "bytes": len(data), "sha256": digest}
    whole = {**content, "tensors": tensors_file}
    whole["sha256"] = _content_hash(whole)
    storage.write_atomically(path, (json.dumps(whole, indent=1) + "\n").encode())


def read_content(path: str | Path) -> dict[str, Any]:
    """Read the JSON file of `write_weights`. Raises DamagedError."""
    try:
        data = storage.read_bytes(path)
    except storage.MissingError:
        raise DamagedError(f"{path} is missing") from None
    try:
        content = json.loads(data)
        stated = content.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not what was written ({type(error).__name__})") from error
    if _content_hash(content) != stated:
        raise DamagedError(f"{path} was changed after it was written (its SHA-256 is another)")
    return content


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors, onto the CPU, and the content. Raises DamagedError."""
    content, beside = read_content(path), storage.with_suffix(path, ".safetensors")
    stated = content["tensors"]
    try:
        data = storage.read_bytes(beside)
    except storage.MissingError:
        raise DamagedError(f"{beside} is missing") from None
    if len(data) != stated["bytes"]:
        raise DamagedError(f"{beside} has {len(data)} bytes instead of {stated['bytes']}")
    if hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise DamagedError(f"{beside} was changed after it was written (its SHA-256 is another)")
    try:
        return safetensors.torch.load(data), content
    except SafetensorError as error:
        raise DamagedError(f"{beside} is not a safetensors file ({error})") from error
