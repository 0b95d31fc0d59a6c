"""The masks of the same few images through the whole of a run."""

import numpy as np
import torch
from torch import Tensor, nn

from jobs.loading import LoadingConfig
from jobs.pictures import enlarge, enlargement, heat, tile
from jobs.runs import ModelConfig, colour_statistics
from model.decoder import object_map
from model.masking import normalize
from pipeline.loading.loader import Loader
from pipeline.shards.format import Manifest

COUNT = 8
SIDE = 128  # pixels of an image in the picture, at least
GAP = 4


Examples = tuple[Tensor, Tensor]  # images uint8 [N, 3, H, W] and segments int64 [N, H, W]


def load_examples(config: LoadingConfig, manifest: Manifest, device: torch.device) -> Examples:
    """Return a few images, as stored, evenly spaced over the val split, or train where that is
    empty. Their boxes are not used."""
    val = manifest.splits.get("val")
    split = "val" if val is not None and val.images else "train"
    total = manifest.splits[split].images
    indices = sorted({total * number // COUNT for number in range(COUNT)})
    loader = Loader(config.data, manifest, device, config.cache_config())
    batches = [next(loader.evaluation(split, 1, index, index + 1)) for index in indices]
    images = torch.cat([batch.images for batch in batches])
    return images, torch.cat([batch.segments for batch in batches])


def draw_examples(examples: Examples, corruption: nn.Module, model: ModelConfig) -> np.ndarray:
    """Return an RGB uint8 picture of three rows: the images, the probability of masking each
    superpixel (dark blue 0, yellow 1), and the images faded to the mean colour by it."""
    images, segments = examples
    x = normalize(images, *colour_statistics(model, images.device))
    with torch.no_grad():
        maps = object_map(corruption, x, segments, model.superpixels).cpu().numpy()
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    shares = maps[..., None]
    faded = np.rint(shares * np.array(model.mean) + (1 - shares) * pixels).astype(np.uint8)
    scale = enlargement(model.height, model.width, SIDE)
    rows = (pixels, [heat(values) for values in maps], faded)
    return tile([[enlarge(picture, scale) for picture in row] for row in rows], GAP)
