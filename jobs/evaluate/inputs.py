"""What an evaluation scores against: the ground truth, and what its images.parquet tells."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from jobs.evaluate.config import EvaluateConfig
from jobs.evaluate.scorer import MapTruth, map_truth
from pipeline.errors import UserError
from pipeline.evaluation.constant_boxes import HALF_AREA, fit_centred_box
from pipeline.evaluation.protocols import SIDE
from pipeline.evaluation.truth import GroundTruth, ground_truth_of, read_ground_truth
from pipeline.shards.format import Manifest, read_manifest, split_of
from pipeline.shards.ledger import read_ledger

if TYPE_CHECKING:  # importing it needs torch
    from jobs.runs import ModelConfig

NO_SIZES = "give --image-sizes FILE (lines id,width,height)"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is scored against. images: row, and of shards key and shard, of each image. maps: None
    where image sizes are unknown."""

    manifest: Manifest | None
    truth: GroundTruth
    images: pa.Table
    maps: MapTruth | None


def read_inputs(config: EvaluateConfig) -> Inputs:
    """Read the ground truth, and check that a run fits the shards. Raises UserError."""
    manifest = None
    if config.data is not None:
        manifest = read_manifest(config.data)
        if not split_of(manifest, config.split).images:
            raise UserError(
                f"split {config.split!r} of {config.data} has no images: nothing to evaluate."
            )
        if config.run is not None:
            from jobs.runs import read_config  # here: it needs torch

            check_compatible(config.run, read_config(config.run), config.data, manifest)
        names = ["row", "key", "id", "label", "shard", "width", "height", "boxes"]
        ledger = read_ledger(config.data, config.split, names)
        truth = ground_truth_of(ledger, manifest.classes, manifest.class_names)
        images = ledger.select(["row", "key", "shard"])
    else:
        assert config.ground_truth is not None
        truth = read_ground_truth(
            config.ground_truth, image_sizes=config.image_sizes, classes=config.classes
        )
        images = pa.table({"row": np.arange(len(truth.ids))})
    maps = None
    if truth.sizes is not None:
        maps = map_truth(truth, images["row"].to_numpy(), config.protocol, config.seed)
    elif config.score_maps is not None or config.protocol == "int224":
        raise UserError(
            f"{config.ground_truth} holds no image sizes, without which maps have no place and "
            f"images cannot be carried to {SIDE} px; {NO_SIZES}."
        )
    return Inputs(manifest=manifest, truth=truth, images=images, maps=maps)


def check_compatible(run: Path | str, config: "ModelConfig", data: str, manifest: Manifest) -> None:
    """Raise UserError, in one line, where nets and shards differ in classes or image size."""
    if config.classes != manifest.classes:
        both = set(config.classes) & set(manifest.classes)
        raise UserError(
            f"checkpoint and shards with different classes: {run} knows {len(config.classes)}, "
            f"{data} has {len(manifest.classes)}, {len(both)} of them in common; class indices "
            "would not mean the same. Evaluate on shards of the set that the run was trained on."
        )
    if (config.height, config.width) != (manifest.height, manifest.width):
        raise UserError(
            f"checkpoint and shards with different image sizes: {run} was trained at "
            f"{config.height}x{config.width}, {data} holds {manifest.height}x{manifest.width}. "
            f"Preprocess with --image-size {config.height}."
        )
    asked = manifest.configuration["superpixels"]
    compactness = manifest.configuration["compactness"]
    superpixels = max(manifest.max_superpixels, asked)
    if (superpixels, compactness) != (config.superpixels, config.compactness):
        raise UserError(
            f"checkpoint and shards with different superpixels: {run} was trained with "
            f"{config.superpixels} at compactness {config.compactness}, {data} has {asked} at "
            f"{compactness}; the masks would mean something else. Preprocess with --superpixels "
            f"{config.superpixels} --compactness {config.compactness}."
        )


def centred_shares(
    data: str | None, manifest: Manifest | None, given: tuple[float, ...] | None
) -> tuple[tuple[float, float], str]:
    """Return the (height, width) shares of the centred box, and in words where they come from."""
    if given:
        return (given[0], given[-1]), "given by --centred-box"
    if data is not None and manifest is not None and "train" in manifest.splits:
        ledger = read_ledger(data, "train", ["height", "width", "boxes"])
        sizes = np.stack([ledger["height"].to_numpy(), ledger["width"].to_numpy()], axis=1)
        boxes = [truth or [] for truth in ledger["boxes"].to_pylist()]
        shares = fit_centred_box(sizes.astype(int), boxes)
        if shares is not None:
            return shares, "best GT-known localization on the train split's boxes"
    return HALF_AREA, "half of the image's area, since no train image has a known box"


def class_names(truth: GroundTruth) -> dict[str, str]:
    """Return readable names by wnid; empty where classes are but numbers."""
    wnids = truth.classes or ()
    return dict(zip(wnids, truth.class_names or wnids, strict=True))
