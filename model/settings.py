"""Settings of the method that are flags of commands, which read them without torch."""

from dataclasses import dataclass
from typing import Literal

LOGIT_LIMIT = 8.0  # bound of the logits: probabilities from 0.00034 to 0.99966

Confusion = Literal["top", "true-logit", "true-log-probability"]


@dataclass(frozen=True)
class Objective:
    """What the two nets minimize. The corruption net: `confusion_loss`, plus lambda times the
    masked area to the power `area_power`, plus `imitation_weight` times `imitation_loss`
    (probability `evidence_share` at average evidence, a logit greater by `evidence_sharpness` a
    deviation). The classifier: cross-entropy on masked images, plus `clean_weight` times that on
    clean ones. soft: masks are not sampled. adversary_side: of the images that the classifier sees,
    or None. The paper has top, power 1 and neither weight."""

    confusion: Confusion = "top"
    area_power: int = 2
    clean_weight: float = 1.0
    imitation_weight: float = 0.0
    evidence_sharpness: float = 2.0
    evidence_share: float = 0.25
    soft: bool = False
    adversary_side: int | None = None
