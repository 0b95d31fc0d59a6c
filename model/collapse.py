"""Signs that the fight has ended without a winner. A pure function of reduced numbers, like the
controller, so that all ranks stop at the same step."""

import math
from dataclasses import dataclass

FULL, EMPTY = 0.95, 0.005  # running mean of the masked area
CLOSED, OPEN = 0.01, 0.99  # running share of joint steps
SMOOTHING = 0.95  # weight of the past in the running numbers
MARGIN = 3.0  # standard deviations above chance that count as chance

TEXTS = {
    "full": "masks cover everything: the target is too low",
    "empty": "masks are empty: the area weighs too much",
    "closed": "the gate is stuck, only the corruption net trains: it does not lower the accuracy "
    "on masked images to the target",
    "open": "the gate is stuck, every step is joint: the accuracy on masked images does not come "
    "up to the target",
    "chance": "accuracy at chance: the classifier knows nothing",
}


@dataclass(frozen=True, kw_only=True)
class CollapseState:
    """area, joint, accuracy: running means or None. Others: steps on end that a sign has lasted."""

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
    """Return the state after a step over `count` images. area: mean masked share, None in the
    warm-up. joint: whether both nets trained. Chance is 1 / classes, up to three standard
    deviations of the running mean; it is no sign where the target lies there too."""
    chance = 1 / classes
    images = count * (1 + SMOOTHING) / (1 - SMOOTHING)  # that the running mean is worth
    highest = chance + MARGIN * math.sqrt(chance * (1 - chance) / images)
    accuracy = _running(state.accuracy, accuracy)
    area = None if area is None else _running(state.area, area)
    share = None if joint is None else _running(state.joint, float(joint))
    signs = {
        "full": area is not None and area > FULL,
        "empty": area is not None and area < EMPTY,
        "closed": share is not None and share < CLOSED,
        "open": share is not None and share > OPEN,
        "chance": accuracy <= highest and (target is None or target > highest),
    }
    counts = {name: getattr(state, name) + 1 if shows else 0 for name, shows in signs.items()}
    return CollapseState(accuracy=accuracy, area=area, joint=share, **counts)
