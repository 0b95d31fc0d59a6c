"""What the ranks do together: add up their steps, check that they agree, and write once.

Gradients are already divided by the global number of images, so one sum over the ranks, of one
vector per step, is the whole synchronization.

`ranks` is their number when the group started. torch's group is not asked for it: Ray Train ends
that of workers which it is about to stop, and a rank would go on alone. Without a group every
function here raises ValueError.
"""

import hashlib
from collections.abc import Callable
from itertools import islice

import torch
import torch.distributed as dist

from jobs.train.state import TrainingError, TrainingState
from model.step import Step
from pipeline.errors import UserError


def reduce_step(step: Step, ranks: int) -> Step:
    """Return a step's gradients and sums, added up over all ranks; each gets the same bits."""
    corruption, classifier = step.corruption_gradients, step.classifier_gradients
    names = sorted(step.sums)
    tensors = [*(corruption or ()), *(classifier or ()), *(step.sums[name] for name in names)]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if ranks > 1:
        dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    reduced = iter([piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)])
    return Step(
        corruption_gradients=corruption and tuple(islice(reduced, len(corruption))),
        classifier_gradients=classifier and tuple(islice(reduced, len(classifier))),
        sums=dict(zip(names, reduced, strict=True)),
    )


def check_ranks(state: TrainingState, ranks: int) -> None:
    """Raise TrainingError, on every rank, where controllers or weights differ in any bit."""
    if ranks == 1:
        return
    hashed = hashlib.sha256()
    for net in state.nets().values():
        for parameter in net.parameters():
            hashed.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    hashed.update(repr((state.target, state.collapse)).encode())
    text = f"step {state.step}, {state.controller}, weights {hashed.hexdigest()[:12]}"
    texts = [""] * ranks
    dist.all_gather_object(texts, text)
    if len(set(texts)) > 1:
        states = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
        raise TrainingError(
            f"the workers no longer have the same state ({states}): training them further would "
            "mix different nets. The same command goes on from before that; if it happens again, a "
            "GPU or a node computes wrongly"
        )


def on_first_rank(action: Callable[[], None], what: str, ranks: int) -> None:
    """Let rank 0 write something. Where it cannot, every rank raises TrainingError."""
    failure: list[str | None] = [None]
    if ranks == 1 or dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failure[0] = (
                f"{what} cannot be written: {error.strerror or error} ({error.filename}). Make "
                "room on the disk; then the same command goes on"
            )
        except UserError as error:
            failure[0] = f"{what} cannot be written: {error}"
    if ranks > 1:
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise TrainingError(failure[0])
