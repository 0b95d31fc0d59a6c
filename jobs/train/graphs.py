"""CUDA graphs: the kernels of a step, recorded once and launched together from then on.

At 64 px a joint step is 660 to 980 short kernels and copies (measured, by the nets' size), which a
host launches more slowly than a GPU runs them.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.step import Step

TRIAL_CALLS = 3  # before the recording: libraries choose and load their kernels in the first ones


@dataclass(frozen=True, kw_only=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    step: Step


@dataclass(kw_only=True)
class Recordings:
    """One recording for each kind of step. They share their memory, so a result holds only until
    the next call."""

    kinds: dict[Hashable, _Recording] = field(default_factory=dict)

    def compute(
        self, kind: Hashable, work: Callable[..., Step], inputs: tuple[Tensor, ...]
    ) -> Step:
        """`work(*inputs)`, which is called only the first time for a kind and a set of shapes.

        kind: names all that `work` depends on besides the inputs' values and tensors that are
        always changed in place, such as weights. work: launches kernels alone; it must neither
        wait for the GPU nor draw random numbers. Recording waits for the GPU, replaying does not.
        """
        key = (kind, *(tensor.shape for tensor in inputs))
        if key not in self.kinds:
            self.kinds[key] = self._record(work, inputs)
        recording = self.kinds[key]
        for held, given in zip(recording.inputs, inputs, strict=True):
            held.copy_(given)
        recording.graph.replay()
        return recording.step

    def _record(self, work: Callable[..., Step], inputs: tuple[Tensor, ...]) -> _Recording:
        held = tuple(tensor.clone() for tensor in inputs)  # clone keeps the layout in memory
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(TRIAL_CALLS):
                work(*held)
        current.wait_stream(stream)
        pool = next(iter(self.kinds.values())).graph.pool() if self.kinds else None
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may allocate meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step = work(*held)
        return _Recording(graph=graph, inputs=held, step=step)
