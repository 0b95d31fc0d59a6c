"""`python -m jobs.shipped`: from a finished run, the localizer that comes with the project.
shipped/decoder.safetensors holds the corruption net's decoder alone: the network below it comes
with its package, and so do its 1000 classes. shipped/decoder.json says what it is made from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import cli
from pipeline.errors import UserError
from pipeline.evaluation.results import read_evaluation
from pipeline.shards.format import sha256_file
from pipeline.sources.labels import read_names

if TYPE_CHECKING:  # the flags are read without torch, which takes seconds to load
    from torch import Tensor

    from jobs.runs import Nets

SHIPPED = cli.ROOT / "shipped" / "decoder.json"  # beside it decoder.safetensors
FIGURES = ("n", "gt_known", "mean_iou", "top1_loc", "top1_cls")


@dataclass(frozen=True, kw_only=True)
class ShipConfig:
    """What is shipped, and what is recorded of it."""

    run: Path = cli.option(help="folder of a finished jobs.train --network")
    images: str = cli.option(help="in words, what it was trained on; for the record")
    evaluations: tuple[Path, ...] = cli.option((), help="of the run; their figures are recorded")
    output: Path = cli.option(SHIPPED.parent, help="folder for decoder.safetensors and .json")


def nets_hash(run: Path | str | None) -> str:
    """Return the SHA-256 that tells a run's nets, or the shipped ones, from others."""
    from jobs.runs import model_hash

    return sha256_file(SHIPPED) if run is None else model_hash(run)


def open_nets(run: Path | str | None, *, accurate: bool = False) -> "Nets":
    """Return a run's nets, or the shipped ones, as `load_nets`."""
    from jobs.runs import load_nets

    if run is not None:
        return load_nets(run, accurate=accurate)
    return load_shipped(accurate=accurate)


def load_shipped(path: Path = SHIPPED, *, accurate: bool = False) -> "Nets":
    """Read the shipped decoder over the network of its package, onto the CPU, in evaluation mode.
    Its classifiers are that network. Raises UserError for damaged files or a missing package."""
    from jobs.networks import load_network
    from jobs.runs import new_nets, shape_of_nets
    from model.decoder import FeatureCorruptionNet

    tensors, content = _read(path)
    classes, names = _classes()
    config = shape_of_nets(path, content, classes=classes, class_names=names)
    assert config.network is not None
    network = load_network(config.network, classes, names, size=config.sides[-1])
    nets = new_nets(config, network.classifier)
    assert isinstance(nets.corruption, FeatureCorruptionNet)
    nets.corruption.decoder.load_state_dict(tensors)
    nets.corruption.looks = config.rule if accurate else None
    nets.corruption.eval()
    return nets


def shipped_decoder(network: str | None, width: int) -> "dict[str, Tensor]":
    """Return the shipped decoder's weights. Raises UserError for another network or width."""
    tensors, content = _read(SHIPPED)
    for name, value in (("network", network), ("decoder_width", width)):
        shipped = content["config"][name]
        if shipped != value:
            raise UserError(f"--start-from shipped needs {cli.flag(name)} {shipped}, not {value}")
    return tensors


def _read(path: Path) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    from jobs.runs import DamagedError, read_weights

    try:
        return read_weights(path)
    except DamagedError as error:
        raise UserError(f"{error}; restore it: git checkout -- {path.parent}") from error


def _classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the wnids of ILSVRC's classes, and the first name of each."""
    from jobs.networks import ILSVRC

    names = read_names(ILSVRC.read_bytes(), str(ILSVRC))
    return tuple(names), tuple(text.split(",")[0] for text in names.values())


def ship(config: ShipConfig) -> dict[str, Any]:
    """Write the decoder of a run and its record. Returns the record. Raises UserError for nets
    that are over no pretrained network, and for an evaluation of another run."""
    from jobs.runs import MODEL_FORMAT, MODEL_NAME, RUN_NAME, load_nets, read_content, write_weights
    from model.decoder import FeatureCorruptionNet

    nets, source = load_nets(config.run), config.run / MODEL_NAME
    if not isinstance(nets.corruption, FeatureCorruptionNet):
        raise UserError(f"{config.run} has nets from scratch; give a run of jobs.train --network")
    trained = read_content(source)["record"]
    record = {
        "images": config.images,
        "data_sha256": json.loads((config.run / RUN_NAME).read_bytes())["data_sha256"],
        "model_sha256": sha256_file(source),
        **trained,
        "configuration": _without_paths(trained["configuration"]),
        "evaluations": [_figures(folder, sha256_file(source)) for folder in config.evaluations],
    }
    shape = asdict(nets.config) | {"co_trained": "none"}  # the classifier is the network itself
    del shape["classes"], shape["class_names"]
    content = {"format": MODEL_FORMAT, "config": shape, "record": record}
    write_weights(config.output / SHIPPED.name, nets.corruption.decoder.state_dict(), content)
    return record


def _without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what holds on one machine alone."""
    return {
        name: _without_paths(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if not (isinstance(value, str) and "/" in value)
    }


def _figures(folder: Path, model_sha256: str) -> dict[str, Any]:
    """Return the figures of an evaluation for the run's own box rule and the network's classes."""
    evaluation = read_evaluation(folder)
    metrics = evaluation.metrics
    if metrics.get("model_sha256") != model_sha256:
        raise UserError(f"{folder} is an evaluation of another run")
    (row,) = (
        row
        for row in evaluation.rows
        if (row.row.map, row.row.rule, row.row.classes) == ("aln", metrics["rule"], "clean")
    )
    chosen = {name: row.figures[name] for name in FIGURES}
    accurate = metrics["configuration"].get("accurate", False)
    return {"split": metrics["split"], "rule": metrics["rule"], "accurate": accurate, **chosen}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with its flags (`--help` lists them)."""
    config = cli.parse(ShipConfig, argv, __doc__ or "")
    record = ship(config)
    load_shipped(config.output / SHIPPED.name)  # as its users will
    for figures in record["evaluations"]:
        print(", ".join(f"{name} {value}" for name, value in figures.items()))
    print(f"written: {config.output / SHIPPED.name} and the decoder beside it")


if __name__ == "__main__":
    cli.run(main)
