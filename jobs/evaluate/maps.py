"""The maps that nets make of images: a new one is a function in model/ and an entry of MAPS."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from jobs.locate import computes_bfloat16
from jobs.networks import Network, prepare
from jobs.runs import Nets, colour_statistics
from model.classifier import class_probabilities
from model.decoder import object_map, resize
from model.evidence import combined_cams, evidence
from model.masking import normalize
from model.pretrained import PretrainedClassifier
from model.relevance import layerwise_relevance
from model.saliency import blur, class_activation_map, gradient_saliency, layer_cams

if TYPE_CHECKING:  # importing it needs DALI, which tasks alone do
    from pipeline.loading.loader import Batch

MAP_BATCH = 16  # images whose gradients a network holds at once: 3 GB for a ResNet-50 at 224 px


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A batch as maps read it. images: normalized float32 [B, 3, H, W]. labels: int64 [B], the
    classes that the maps are of. segments: int64 [B, H, W], below `superpixels`."""

    images: Tensor
    labels: Tensor
    segments: Tensor
    superpixels: int


@dataclass(frozen=True, kw_only=True)
class MapSource:
    """A map: its title, and how it comes from our nets and from a network from elsewhere, float [B,
    H, W] each, or None. blurred: afterwards. paper: metrics 1 and 2 of its Table 1."""

    title: str
    of_run: Callable[[Nets, Inputs], Tensor] | None = None
    of_network: Callable[[PretrainedClassifier, Inputs], Tensor] | None = None
    blurred: bool = False
    paper: tuple[float | None, float | None] | None = None


def _aln(nets: Nets, x: Inputs) -> Tensor:
    device = x.images.device
    half = nets.config.network is not None and computes_bfloat16(device)  # as jobs.localize
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        return object_map(nets.corruption, x.images, x.segments, x.superpixels)


MAPS = {  # in the order of the table; our baselines are maps of the clean classifier
    "gradient": MapSource(
        title="Gradient saliency",
        of_run=lambda nets, x: gradient_saliency(nets.clean_classifier, x.images, x.labels),
        of_network=lambda net, x: gradient_saliency(net, x.images, x.labels),
        blurred=True,
        paper=(None, 0.387),
    ),
    "lrp": MapSource(
        title="LRP",
        of_run=lambda nets, x: layerwise_relevance(nets.clean_classifier, x.images, x.labels),
        of_network=lambda net, x: layerwise_relevance(net, x.images, x.labels),
        blurred=True,
        paper=(0.422, None),
    ),
    "cam": MapSource(  # "Global Average Pooling" in the paper's table
        title="CAM",
        of_run=lambda nets, x: class_activation_map(nets.clean_classifier, x.images, x.labels),
        of_network=lambda net, x: class_activation_map(net, x.images, x.labels),
        paper=(0.519, 0.436),
    ),
    "layercam": MapSource(
        title="LayerCAM of superpixels",
        of_run=lambda nets, x: evidence(
            nets.clean_classifier, x.images, x.labels, x.segments, x.superpixels
        ),
    ),
    "layercam of pixels": MapSource(
        title="LayerCAM",
        of_network=lambda net, x: combined_cams(layer_cams(net, x.images, x.labels)),
    ),
    "aln": MapSource(title="ALN", of_run=_aln, paper=(0.565, 0.455)),
}


def finished(maps: Tensor, *, blurred: bool) -> np.ndarray:
    """Return maps [B, H, W] as they are scored."""
    values = maps.cpu().numpy()
    return blur(values) if blurred else values


@dataclass(frozen=True, kw_only=True)
class RunSource:
    """Maps and classes of a run's nets. crops: see `class_probabilities`; baselines: whether all
    of MAPS, or "aln" alone."""

    nets: Nets
    superpixels: int
    baselines: bool
    crops: bool
    main_map: str = "aln"  # the one that is kept for pictures

    def predict(self, batch: "Batch") -> tuple[dict[str, Tensor], Iterator[tuple[str, np.ndarray]]]:
        """Return the probabilities of the classes, [B, C] by classifier, and the maps by name,
        float32 [B, H, W]."""
        nets = self.nets
        x = normalize(batch.images, *colour_statistics(nets.config, batch.images.device))
        x = x.contiguous(memory_format=torch.channels_last)  # on a CPU a quarter faster
        classifiers = {"clean": nets.clean_classifier, "co-trained": nets.classifier}
        with torch.inference_mode():
            probabilities = {
                name: class_probabilities(net, x, crops=self.crops)
                for name, net in classifiers.items()
            }
        inputs = Inputs(
            images=x, labels=batch.labels, segments=batch.segments, superpixels=self.superpixels
        )
        return probabilities, self._maps(inputs)

    def _maps(self, inputs: Inputs) -> Iterator[tuple[str, np.ndarray]]:
        for name, source in MAPS.items():
            if source.of_run is not None and (self.baselines or name == "aln"):
                yield name, finished(source.of_run(self.nets, inputs), blurred=source.blurred)


@dataclass(frozen=True, kw_only=True)
class NetworkSource:
    """Maps and classes of a network from elsewhere; superpixels, crops: as of `RunSource`."""

    network: Network
    superpixels: int
    crops: bool
    main_map: str = "cam"

    def predict(self, batch: "Batch") -> tuple[dict[str, Tensor], Iterator[tuple[str, np.ndarray]]]:
        """Return the same as `RunSource.predict`. Maps are computed at the network's size and
        resized to that of the images, then those that are blurred are, as those of our own
        classifier."""
        with torch.inference_mode():
            probabilities = class_probabilities(
                self.network.classifier, prepare(self.network, batch.images), crops=self.crops
            )
        return {"network": probabilities}, self._maps(batch)

    def _maps(self, batch: "Batch") -> Iterator[tuple[str, np.ndarray]]:
        sources = {name: source for name, source in MAPS.items() if source.of_network is not None}
        parts: dict[str, list[np.ndarray]] = {name: [] for name in sources}
        for first in range(0, len(batch.images), MAP_BATCH):
            some = slice(first, first + MAP_BATCH)
            inputs = Inputs(
                images=prepare(self.network, batch.images[some]),
                labels=batch.labels[some],
                segments=batch.segments[some],
                superpixels=self.superpixels,
            )
            for name, source in sources.items():
                assert source.of_network is not None
                values = source.of_network(self.network.classifier, inputs).unsqueeze(1)
                stored = resize(values, batch.images.shape[-2:]).squeeze(1)
                parts[name].append(finished(stored, blurred=source.blurred))
        yield from ((name, np.concatenate(arrays)) for name, arrays in parts.items())
