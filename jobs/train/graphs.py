"""The part of a step that a GPU records: a pure function, and the CUDA graphs made of it.

At 64 px a joint step is 660 to 980 short kernels, which a host launches more slowly than a GPU
runs them. So they are recorded once and launched together.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.masking import normalize
from model.settings import Objective
from model.step import (
    Inputs,
    Step,
    TrainingNets,
    adversarial_step,
    clean_step,
    imitation_step,
    probe,
)

TRIAL_CALLS = 3  # before the recording: libraries choose and load their kernels in the first ones

Colours = tuple[Tensor, Tensor]  # mean and deviation per channel, float32 [3] each, in 0..255


@dataclass(frozen=True)
class StepSettings:
    """All that a step depends on besides tensors. total: images over all ranks. objective: None in
    the warm-up of nets from scratch. joint: whether both nets train. probing: whether `probe` is
    called."""

    total: int
    half: bool
    objective: Objective | None = None
    joint: bool = False
    probing: bool = False


def memory_layout(device: torch.device) -> torch.memory_format:
    """Return the faster layout of images and convolutions' weights: channels last was measured
    1.13 times as fast on CPUs, and 0.90 to 0.95 times on a GPU (H200)."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def autocast(device: torch.device, half: bool) -> torch.autocast:
    """Return the context in which the nets run: of bfloat16 where `half`, else without effect."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def net_inputs(images: Tensor, colours: Colours) -> Tensor:
    """Return uint8 images [B, 3, H, W] as the nets want them: normalized, in the fast layout."""
    return normalize(images, *colours).contiguous(memory_format=memory_layout(images.device))


def compute_step(
    nets: TrainingNets, colours: Colours, settings: StepSettings, tensors: tuple[Tensor, ...]
) -> Step:
    """Return one rank's step.

    tensors: images uint8 [B, 3, H, W] and labels int64 [B]; after the warm-up, and in that of a
    pretrained network, also segments int64 [B, H, W] and noise float [B, K]; after it the area's
    weight, float []. It launches kernels alone: it
    neither waits for the GPU nor draws random numbers.
    """
    images, labels, *masking = tensors
    with autocast(images.device, settings.half):
        x = net_inputs(images, colours)
        if settings.objective is None:
            return clean_step(nets.classifier, x, labels, settings.total)
        segments, noise, *area_weight = masking
        batch, objective = Inputs(x, segments, labels, noise, settings.total), settings.objective
        if not area_weight:
            return imitation_step(nets, batch, objective)
        step = adversarial_step(nets, batch, objective, *area_weight, joint=settings.joint)
        if settings.probing and step.mask is not None:
            return replace(step, sums=step.sums | probe(nets, batch, objective, step.mask))
        return step


@dataclass(frozen=True)
class Recording:
    graph: torch.cuda.CUDAGraph
    tensors: tuple[Tensor, ...]
    step: Step


class Recordings:
    """Recordings of a function: one for each value of its settings and its tensors' shapes. It may
    depend on nothing else but tensors that are always changed in place, such as weights."""

    def __init__(self, work: Callable[[Any, tuple[Tensor, ...]], Step]) -> None:
        self.work = work
        self._recordings: dict[Hashable, Recording] = {}

    def compute(self, settings: Hashable, tensors: tuple[Tensor, ...]) -> Step:
        """Return `work(settings, tensors)`, valid until the next call: recordings share memory.
        Recording waits for the GPU, replaying does not."""
        key = (settings, *(tensor.shape for tensor in tensors))
        if key not in self._recordings:
            self._recordings[key] = self.record(settings, tensors)
        recording = self._recordings[key]
        for own, given in zip(recording.tensors, tensors, strict=True):
            own.copy_(given)
        recording.graph.replay()
        return recording.step

    def record(self, settings: Hashable, tensors: tuple[Tensor, ...]) -> Recording:
        """Record `work(settings, tensors)` on tensors of its own."""
        own = tuple(tensor.clone() for tensor in tensors)  # clone keeps the layout in memory
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(TRIAL_CALLS):
                self.work(settings, own)
        current.wait_stream(stream)
        earlier = next(iter(self._recordings.values()), None)
        pool = earlier.graph.pool() if earlier else None
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may allocate meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step = self.work(settings, own)
        return Recording(graph, own, step)
