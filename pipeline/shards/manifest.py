"""The manifest of a set, from the facts of its shards and the totals of its ledger."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.errors import UserError
from pipeline.shards.format import Manifest, Split
from pipeline.shards.ledger import ShardFacts, Totals
from pipeline.shards.plan import PreprocessConfig
from pipeline.shards.superpixels import label_dtype
from pipeline.sources.find import Source

Triple = tuple[float, float, float]


def make_manifest(
    collection: Source | Manifest,
    source: str,
    fingerprint: dict[str, Any],
    facts: Mapping[str, Sequence[ShardFacts]],
    totals: Mapping[str, Totals],
    ledger: str,
) -> Manifest:
    """Make the manifest of a set. collection: its classes and unread files. fingerprint:
    content of plan.json. facts: by split, in the order of the shards. ledger: the ledger's SHA-256.
    Raises UserError where no image was accepted."""
    config = PreprocessConfig(source=source, output="", **fingerprint["configuration"])
    # The train split comes first; a collection without one is normalized by what it has.
    mean, std = _mean_std(next(iter(facts.values())))
    return Manifest(
        classes=collection.classes,
        class_names=collection.class_names,
        height=config.height,
        width=config.width,
        image_format=config.image_format,
        segments_dtype=str(label_dtype(config.superpixels)),
        max_superpixels=max(total.max_superpixels for total in totals.values()),
        mean=mean,
        std=std,
        splits={
            split: Split(
                images=int(total.class_counts.sum()),
                rejected=total.rejected,
                shards=tuple(fact.shard for fact in facts[split] if fact.shard),
                class_counts=tuple(total.class_counts.tolist()),
            )
            for split, total in totals.items()
        },
        ledger=ledger,
        configuration=fingerprint["configuration"]
        | {"source": source, "layout": fingerprint["layout"]},
        versions=fingerprint["versions"],
        unread={reason: dict(files) for reason, files in collection.unread.items()},
    )


def differences(first: Manifest, second: Manifest) -> list[str]:
    """Return the names of the fields in which two manifests differ."""
    values, others = asdict(first), asdict(second)
    return [name for name in values if values[name] != others[name]]


def _mean_std(facts: Sequence[ShardFacts]) -> tuple[Triple, Triple]:
    """Return mean and deviation per channel, in 0..255. They are exact until the last division:
    sums are whole numbers, so that the order of the shards cannot matter."""
    pixels = sum(fact.pixels for fact in facts)
    if not pixels:
        raise UserError("no train image was accepted; the ledger names the reasons.")
    means, deviations = [], []
    for channel in range(3):
        total = sum(fact.sums[channel] for fact in facts)
        squares = sum(fact.squares[channel] for fact in facts)
        means.append(total / pixels)
        deviations.append(math.sqrt(pixels * squares - total**2) / pixels)
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])
