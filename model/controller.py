"""Balancing the two nets (paper, section 2.4): the area weight lambda, and who trains next.

A pure function of reduced numbers: every rank that feeds it the same sums has the same state,
bit for bit, and so takes the same branch.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """target: the accuracy on masked images to keep, in (0, 1).
    rate: relative change of lambda per step. smoothing: weight of the past in the running
    accuracy that moves lambda."""

    target: float
    rate: float = 0.006
    smoothing: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"target accuracy {self.target} must lie between 0 and 1")
        if not 0 < self.rate < 1 or not 0 <= self.smoothing < 1:
            raise ValueError(
                f"rate {self.rate} must lie in (0, 1) and smoothing {self.smoothing} in [0, 1)"
            )


@dataclass(frozen=True, kw_only=True)
class ControllerState:
    """area_weight: lambda. accuracy: running accuracy on masked images.
    joint: whether the next step trains the classifier too."""

    area_weight: float
    accuracy: float
    joint: bool = False


def update(
    state: ControllerState, config: ControllerConfig, correct: float, count: float
) -> ControllerState:
    """Return the state after a step in which `correct` of `count` masked images, summed over all
    ranks, were classified right.

    The running accuracy above the target lowers lambda (so more is masked), below raises it.
    The batch's own accuracy opens the gate: above the target only the corruption net trains
    next, otherwise both.
    """
    if count <= 0:
        raise ValueError(f"the controller needs at least one image, got a count of {count}")
    batch = correct / count
    accuracy = config.smoothing * state.accuracy + (1 - config.smoothing) * batch
    factor = 1 - config.rate if accuracy > config.target else 1 + config.rate
    return replace(
        state,
        area_weight=state.area_weight * factor,
        accuracy=accuracy,
        joint=batch <= config.target,
    )


def relative_target(chance: float, clean: float, share: float) -> float:
    """Return a target accuracy `share` of the way from chance to the accuracy on clean images.

    The paper's 10 % is for 1000 classes; what must be undercut is the classifier's accuracy
    without the context's help, which lies between the two.
    """
    return chance + share * (clean - chance)
