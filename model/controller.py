"""Balancing the two nets (paper, section 2.4): the area weight lambda, and who trains next. A pure
function of reduced numbers, so that all ranks have the same state, bit for bit."""

from dataclasses import dataclass, replace

SMOOTHING = 0.95  # weight of the past in the running accuracy


@dataclass(frozen=True, kw_only=True)
class ControllerState:
    """area_weight: lambda, at least `least`. accuracy: running, on masked images. joint: whether
    the next step trains the classifier too."""

    area_weight: float
    least: float = 0.0
    accuracy: float
    joint: bool = False


def update(
    state: ControllerState, correct: float, count: int, *, target: float, rate: float
) -> ControllerState:
    """Return the state after a step in which `correct` of `count` masked images, over all ranks,
    were right. A running accuracy above `target` lowers lambda by the share `rate` (so more is
    masked), down to its least, otherwise lambda rises by it. A batch's own accuracy above it closes
    the gate: only the corruption net trains next."""
    batch = correct / count
    accuracy = SMOOTHING * state.accuracy + (1 - SMOOTHING) * batch
    factor = 1 - rate if accuracy > target else 1 + rate
    area_weight = max(state.area_weight * factor, state.least)
    return replace(state, area_weight=area_weight, accuracy=accuracy, joint=batch <= target)


def relative_target(chance: float, clean: float, share: float) -> float:
    """Return a target accuracy `share` of the way from chance to the accuracy on clean images: the
    accuracy without the context's help lies between. (The paper's 10 % is for 1000 classes.)"""
    return chance + share * (clean - chance)
