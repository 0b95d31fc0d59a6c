"""What the ranks do together: add up their steps, check that they agree, and write once.

Each net's gradients are sums over the rank's images divided by the global number of images, so
one sum over the ranks is the whole synchronization: gradients, losses and the accuracy that
drives the controller travel in one vector per step.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.train.state import TrainingError, TrainingState
from model.step import Step


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _add_up(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor summed over all ranks; every rank gets the same bits."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if _several_ranks():
        dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def reduce_sums(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sums by name, added up over all ranks."""
    names = sorted(sums)
    return dict(zip(names, _add_up([sums[name] for name in names]), strict=True))


def reduce_step(step: Step) -> Step:
    """Return a step's gradients and sums, added up over all ranks in one go."""
    corruption, classifier = step.corruption_gradients, step.classifier_gradients
    names, cut = sorted(step.sums), len(corruption or ())
    gradients = [*(corruption or ()), *(classifier or ())]
    reduced = _add_up([*gradients, *(step.sums[name] for name in names)])
    return Step(
        corruption_gradients=tuple(reduced[:cut]) if corruption else None,
        classifier_gradients=tuple(reduced[cut : len(gradients)]) if classifier else None,
        sums=dict(zip(names, reduced[len(gradients) :], strict=True)),
    )


def _describe(rank: int, state: TrainingState, digest: str) -> str:
    controller = state.controller
    balance = (
        f"lambda {controller.area_weight!r}, accuracy {controller.accuracy!r}, "
        f"{'joint' if controller.joint else 'corruption only'}"
        if controller is not None
        else "no controller yet"
    )
    return f"rank {rank}: step {state.step}, {balance}, weights {digest[:12]}"


def check_ranks(state: TrainingState, device: torch.device) -> None:
    """Raise TrainingError, on every rank, where controllers or weights differ in any bit.

    A hash of both is reduced to its smallest and largest value over the ranks; only where these
    differ are the states sent, to be shown.
    """
    if not _several_ranks():
        return
    hashed = hashlib.sha256()
    for net in state.nets().values():
        for parameter in net.parameters():
            hashed.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    weights = hashed.hexdigest()
    controller = asdict(state.controller) if state.controller else None
    hashed.update(repr((state.step, state.target, controller, state.collapse)).encode())
    number = int.from_bytes(hashed.digest()[:7], "big")
    bounds = torch.tensor([number, -number], device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MIN)
    lowest, highest = bounds.tolist()
    if lowest == -highest:
        return
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, _describe(dist.get_rank(), state, weights))
    raise TrainingError(
        f"the workers no longer have the same state ({'; '.join(texts)}): training them further "
        "would mix different nets. The last checkpoint is sound, the same command goes on from "
        "it; if it happens again, a GPU or a node computes wrongly"
    )


def on_first_rank(action: Callable[[], None], what: str, device: torch.device) -> None:
    """Let rank 0 write something. Where it cannot, every rank raises TrainingError."""
    failure: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failure[0] = f"{what} cannot be written: {error.strerror or error} ({error.filename})"
    if _several_ranks():
        dist.broadcast_object_list(failure, src=0, device=device)
    if failure[0] is not None:
        raise TrainingError(
            f"{failure[0]}. Make room on the disk; the same command goes on from the last "
            "checkpoint"
        )
