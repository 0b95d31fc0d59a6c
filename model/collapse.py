"""Signs that the fight has ended without a winner: masks that cover all or nothing, a gate that
stays where it is, a classifier that knows nothing.

A pure function of reduced numbers, like the controller: every rank that feeds it the same numbers
has the same state, bit for bit, and so stops at the same step.
"""

import math
from dataclasses import dataclass, replace

FULL, EMPTY = 0.95, 0.005  # running mean of the masked area
CLOSED, OPEN = 0.01, 0.99  # running share of joint steps
SMOOTHING = 0.95  # weight of the past in the running numbers
MARGIN = 3.0  # standard deviations above chance that count as chance

TEXTS = {
    "full": "masks cover everything: the target is too low",
    "empty": "masks are empty: the area weighs too much",
    "closed": "the gate is stuck, only the corruption net trains: it does not bring the accuracy "
    "on masked images down to the target",
    "open": "the gate is stuck, every step is joint: the accuracy on masked images does not come "
    "up to the target",
    "chance": "accuracy at chance: the classifier knows nothing",
}


@dataclass(frozen=True, kw_only=True)
class CollapseState:
    """area, joint, accuracy: running means, None before the first step of a phase. The others
    count for how many steps on end each sign has lasted."""

    area: float | None = None
    joint: float | None = None
    accuracy: float | None = None
    full: int = 0
    empty: int = 0
    closed: int = 0
    open: int = 0
    chance: int = 0

    def signs(self, steps: int) -> list[str]:
        """Return the names in TEXTS of the signs that have lasted for at least `steps` steps."""
        return [name for name in TEXTS if getattr(self, name) >= steps]


def _running(before: float | None, value: float) -> float:
    return value if before is None else SMOOTHING * before + (1 - SMOOTHING) * value


def watch(
    state: CollapseState,
    *,
    accuracy: float,
    count: int,
    classes: int,
    target: float | None = None,
    area: float | None = None,
    joint: bool | None = None,
) -> CollapseState:
    """Return the state after a step over `count` images.

    accuracy: of the classifier in this step. area: mean masked share, and joint: whether both
    nets trained; None in the warm-up, where there is no mask (joint also with a frozen
    classifier, whose gate means nothing). Chance is 1 / classes, up to three standard deviations
    of the running mean over the last steps' images; it is no sign where the target lies there too.
    """
    chance = 1 / classes
    images = count * (1 + SMOOTHING) / (1 - SMOOTHING)  # that the running mean is worth
    highest = chance + MARGIN * math.sqrt(chance * (1 - chance) / images)
    means = replace(
        state,
        accuracy=_running(state.accuracy, accuracy),
        area=None if area is None else _running(state.area, area),
        joint=None if joint is None else _running(state.joint, float(joint)),
    )
    assert means.accuracy is not None
    signs = {
        "full": means.area is not None and means.area > FULL,
        "empty": means.area is not None and means.area < EMPTY,
        "closed": means.joint is not None and means.joint < CLOSED,
        "open": means.joint is not None and means.joint > OPEN,
        "chance": means.accuracy <= highest and (target is None or target > highest),
    }
    counts = {name: getattr(state, name) + 1 if shows else 0 for name, shows in signs.items()}
    return replace(means, **counts)
