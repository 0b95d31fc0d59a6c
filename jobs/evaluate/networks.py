"""Networks from elsewhere: any torchvision or timm convnet with a local weights file, as rows of
the table. Both packages are an optional extra, imported only where such a network is asked for.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.masking import normalize
from pipeline.errors import NAMED, UserError
from pipeline.sources.labels import class_lines

SMALLEST_SIZE = 64  # most networks divide the side by 32: below, one feature is the whole image
NESTED = ("state_dict", "model")  # where training scripts keep the weights in their checkpoints
# Densenet's official files name layers norm.1 that are now called norm1.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A classifier from elsewhere, and how it is fed.

    name: such as torchvision:resnet50. module: its logits, in evaluation mode. layer: the module
    within whose output class activation maps read, the features before the global pooling.
    size: (height, width) that it is fed. mean, std: per channel, of pixels in 0..255. outputs:
    int64 [classes of the data set], which output is which class.
    """

    name: str
    module: nn.Module
    layer: nn.Module
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    outputs: np.ndarray


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _import_error(package: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(
        f"networks of {package} need the packages torchvision and timm ({reason}). Install them "
        "with pip install '.[networks]'; torchvision must be the build that fits the installed "
        f"torch {torch.__version__}."
    )


def _unknown(package: str, name: str, known: list[str]) -> UserError:
    near = difflib.get_close_matches(name, known, NAMED)
    hint = f" Near it: {', '.join(near)}." if near else ""
    return UserError(f"{package} knows no classifier {name!r}.{hint}")


def _build(kind: str, name: str, outputs: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network of random weights, and its usual `size`, `mean` and `std` (in 0..1)."""
    if kind == "torchvision":
        try:
            from torchvision import models
        except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
            raise _import_error(kind, error) from error
        known = models.list_models(module=models)
        if name not in known:
            raise _unknown(kind, name, known)
        options: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):  # as the official weights are used
            options = {"transform_input": True, "init_weights": False}
        module = models.get_model(name, weights=None, num_classes=outputs, **options)
        usual = models.get_model_weights(name).DEFAULT.transforms()
        return module, {"size": usual.crop_size[0], "mean": usual.mean, "std": usual.std}
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise _import_error(kind, error) from error
    if not timm.is_model(name):
        raise _unknown(kind, name, timm.list_models())
    module = timm.create_model(name, pretrained=False, num_classes=outputs)
    usual = module.pretrained_cfg
    return module, {"size": usual["input_size"][1], "mean": usual["mean"], "std": usual["std"]}


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file by name. Raises UserError for a file that is none."""
    if not path.is_file():
        raise UserError(f"weights file {path} is missing; nothing is downloaded.")
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


def _load_weights(name: str, module: nn.Module, path: Path, outputs: int) -> None:
    """Fill the module from the file. Raises UserError where they do not fit in every name."""
    read, own = _read_weights(path), module.state_dict()
    # Counters of training steps: older files lack them, and evaluation does not read them.
    missing = [n for n in own if n not in read and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in read if n not in own]
    reshaped = [
        f"{n} {list(read[n].shape)} instead of {list(own[n].shape)}"
        for n in own
        if n in read and read[n].shape != own[n].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    found = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]
    if found:
        raise UserError(
            f"weights file {path} does not fit {name} with {outputs} outputs: {'; '.join(found)}. "
            "Give the file of this network, and where it knows other classes than the data set "
            "also the file of its classes."
        )
    module.load_state_dict(read, strict=False)


def _read_classes(path: Path) -> list[str]:
    """Read the first word of each line: a wnid per line, or LOC_synset_mapping.txt."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"file of the network's classes {path} cannot be read: {error}") from error
    wnids = [wnid for _, wnid, _ in class_lines(text)]
    places: dict[str, int] = {}
    for place, wnid in enumerate(wnids, 1):
        if wnid in places:
            raise UserError(
                f"{path} names {wnid} as class {places[wnid]} and as class {place}; each output "
                "of the network has one class."
            )
        places[wnid] = place
    return wnids


def _features_layer(name: str, module: nn.Module, size: int) -> nn.Module:
    """Return the module whose output is the last with positions, adaptive pooling aside.

    Found by feeding an empty image. Raises UserError for a network that cannot be fed this size
    or whose last positions are not a square map [B, C, h, w], as those of a transformer.
    """
    last: list[tuple[nn.Module, torch.Size]] = []

    def note(module: nn.Module, *call: Any) -> None:
        output = call[1]
        pooling = isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d)
        if torch.is_tensor(output) and output.ndim > 2 and not pooling and output[0, 0].numel() > 1:
            last[:] = [(module, output.shape)]

    handles = [part.register_forward_hook(note) for part in module.modules()]
    try:
        with torch.no_grad():
            module(torch.zeros((1, 3, size, size)))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"{name} cannot be fed images of {size} x {size} pixels ({str(error).splitlines()[0]})."
            " Choose another --network-size, or leave it out."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not last or len(last[0][1]) != 4 or last[0][1][2] != last[0][1][3]:
        raise UserError(
            f"{name} has no map of features before its pooling, which class activation maps read; "
            "give a convolutional network, such as torchvision:resnet50 or timm:convnext_tiny."
        )
    return last[0][0]


def load_network(
    name: str,
    weights: Path,
    classes: tuple[str, ...],
    network_classes: Path | None,
    size: int | None,
) -> Network:
    """Load a torchvision or timm classifier with its weights, on the CPU; nothing is downloaded.

    name: torchvision:NAME or timm:NAME. weights: .safetensors, or .pth or .pt of tensors, plain or
    under `state_dict` or `model`. classes: the data set's wnids in order. network_classes: a file
    with the wnid of each of the network's outputs, a line each (LOC_synset_mapping.txt will do for
    networks of ILSVRC); None where the outputs are the data set's classes in order. size: side in
    pixels that it is fed; None for its usual one. GoogLeNet and Inception of torchvision are fed
    as their official weights want it (`transform_input`). Raises UserError for whatever does not
    fit.
    """
    kind, _, model = name.partition(":")
    if kind not in ("torchvision", "timm") or not model:
        raise UserError(f"--network {name!r} is neither torchvision:NAME nor timm:NAME.")
    if size is not None and size < SMALLEST_SIZE:
        raise UserError(
            f"--network-size {size} is below {SMALLEST_SIZE} pixels, where hardly a feature would "
            "have a place; small images are enlarged to the size given."
        )
    known = list(classes) if network_classes is None else _read_classes(network_classes)
    places = {wnid: place for place, wnid in enumerate(known)}
    unknown = [wnid for wnid in classes if wnid not in places]
    if unknown:
        raise UserError(
            f"{name} does not know {len(unknown)} of the data set's {len(classes)} classes: "
            f"{_some(unknown)} are not in {network_classes}. Evaluate a network that knows them."
        )
    module, usual = _build(kind, model, len(known))
    _load_weights(name, module, weights, len(known))
    module.eval()
    side = size or usual["size"]
    mean_r, mean_g, mean_b = (255 * float(value) for value in usual["mean"])
    std_r, std_g, std_b = (255 * float(value) for value in usual["std"])
    return Network(
        name=name,
        module=module,
        layer=_features_layer(name, module, side),
        size=(side, side),
        mean=(mean_r, mean_g, mean_b),
        std=(std_r, std_g, std_b),
        outputs=np.array([places[wnid] for wnid in classes], np.int64),
    )


def resized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Float [B, C, H, W] at another size, bilinearly: where it shrinks, each pixel is a weighted
    mean of all that lie under it, so that none is skipped; where it grows, none is repeated."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    return functional.interpolate(
        maps, size=size, mode="bilinear", align_corners=False, antialias=True
    )


def prepare(network: Network, images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] on the module's device -> normalized float32 at the network's size."""
    mean, std = (
        torch.tensor(values, device=images.device) for values in (network.mean, network.std)
    )
    return normalize(resized(images.to(torch.float32), network.size), mean, std)


def network_logits(network: Network, x: Tensor) -> Tensor:
    """Prepared images -> logits [B, classes of the data set], in the data set's order."""
    with torch.no_grad():
        return network.module(x)[:, torch.from_numpy(network.outputs).to(x.device)]
