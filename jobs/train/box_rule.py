"""The box rule of a run over a pretrained network, chosen without boxes."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from jobs.loading import LoadingConfig
from jobs.runs import Nets, colour_statistics
from model.decoder import FeatureCorruptionNet
from model.localization import Rule, box_ious, localize
from model.masking import normalize
from pipeline.loading.loader import Loader
from pipeline.shards.format import Manifest

BATCHES, BATCH_SIZE = 16, 16
MARGIN = 0.025  # docs/log.md has the nets that it comes from


def agreement(nets: Nets, batches: Iterable[Tensor]) -> dict[Rule, float]:
    """Return by box rule the mean IoU between an image's box at the first of the net's sides and at
    the last. batches: uint8 [B, 3, H, W]."""
    corruption = nets.corruption
    assert isinstance(corruption, FeatureCorruptionNet)
    ious: dict[Rule, list[np.ndarray]] = {"otsu": [], "medoid": []}
    for images in batches:
        x = normalize(images, *colour_statistics(nets.config, images.device))
        with torch.no_grad():
            maps = [
                corruption.view(x, side).float().cpu().numpy()
                for side in (corruption.sides[0], corruption.sides[-1])
            ]
        for rule, of_rule in ious.items():
            first, last = (localize(values, rule)[0] for values in maps)
            of_rule.append(box_ious(first, last))
    return {rule: float(np.concatenate(values).mean()) for rule, values in ious.items()}


def choose_rule(agreements: dict[Rule, float]) -> Rule:
    """Return medoid, the better rule of maps that are nearly black and white, where its boxes agree
    almost as well as Otsu's, which suits smoother maps."""
    return "medoid" if agreements["medoid"] >= agreements["otsu"] - MARGIN else "otsu"


def training_images(
    config: LoadingConfig, manifest: Manifest, device: torch.device
) -> Iterable[Tensor]:
    """Yield batches of images as stored, evenly spaced over the train split."""
    loader = Loader(config.data, manifest, device, config.cache_config())
    batches = -(-manifest.splits["train"].images // BATCH_SIZE)
    for number in sorted({batches * i // BATCHES for i in range(BATCHES)}):
        yield next(loader.evaluation("train", BATCH_SIZE, number, number + 1)).images
