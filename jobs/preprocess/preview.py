"""`SHARDS/<split>/preview.jpg`: samples of a split with superpixels and true boxes."""

import numpy as np

from jobs.pictures import Cell, draw_grid, encode_jpeg
from pipeline import storage
from pipeline.shards.format import Manifest, read_sample

PREVIEW_NAME = "preview.jpg"
SAMPLES = 24


def write_previews(output: str, manifest: Manifest) -> list[str]:
    """Draw every split of the set at `output` that has no picture; return the locations."""
    written = []
    for split, entry in manifest.splits.items():
        location = storage.join(output, split, PREVIEW_NAME)
        if entry.images and not storage.is_file(location):
            picture = draw_grid(_cells(output, manifest, split), f"{split}: {entry.images} images")
            storage.write_atomically(location, encode_jpeg(picture))
            written.append(location)
    return written


def _cells(output: str, manifest: Manifest, split: str) -> list[Cell]:
    """Read random samples, in the set's order."""
    entry = manifest.splits[split]
    ends = np.cumsum([shard.images for shard in entry.shards])
    cells = []
    for index in np.sort(np.random.default_rng(0).permutation(entry.images)[:SAMPLES]).tolist():
        shard = entry.shards[int(np.searchsorted(ends, index, side="right"))]
        first = int(ends[entry.shards.index(shard)]) - shard.images
        location = storage.join(output, split, shard.name)
        sample = read_sample(location, index - first, manifest)
        sides = np.tile([sample.meta["width"], sample.meta["height"]], 2)
        boxes = np.array(sample.meta["boxes"]).reshape(-1, 4) + np.array([0, 0, 1, 1])
        cells.append(
            Cell(
                image=sample.image,
                segments=sample.segments,
                name=manifest.class_names[sample.label],
                note=f"{sample.meta['id']}, {sides[0]}x{sides[1]}",
                boxes=(boxes / sides).tolist(),
            )
        )
    return cells
