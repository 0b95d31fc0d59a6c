"""The one source of an evaluation: a run, a network, score maps or boxes -> boxes and classes."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from jobs.evaluate.config import EvaluateConfig
from jobs.evaluate.inputs import Inputs
from jobs.evaluate.scorer import MapTruth, Part, ScoredMaps, given_parts, mean_map
from pipeline.errors import NAMED, UserError
from pipeline.evaluation.constant_boxes import centred_boxes, whole_image_boxes
from pipeline.evaluation.formats import (
    read_guesses,
    read_score_map,
    read_top_classes,
    score_map_path,
)
from pipeline.evaluation.metrics import renumbered_share, top_k
from pipeline.evaluation.protocols import SIDE
from pipeline.evaluation.results import write_maps
from pipeline.evaluation.scoring import Localization

WHOLE_IMAGE_PAPER = (0.410, 0.343)  # metrics 1 and 2 of the paper's Table 1, "Max box"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was evaluated. kind, name: as in metrics.json. localizations: in the table's order.
    classes: int64 [N, 5] by classifier, best first, -1 for none; scores: their probabilities.
    main: the maps whose mean is a row too, and the title of that row."""

    kind: str
    name: str
    localizations: tuple[Localization, ...] = ()
    classes: dict[str, np.ndarray] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    main: tuple[str, ScoredMaps] | None = None

    @property
    def known_classes(self) -> str | None:
        """The classes that rows without a classifier of their own count, if any."""
        return next((n for n in ("clean", "network", "file") if n in self.classes), None)


def read_source(config: EvaluateConfig, inputs: Inputs, progress: Progress) -> Source:
    """Return what the source says of every image. Raises UserError."""
    source = _read_source(config, inputs, progress)
    for name, flag in (("boxes", "predictions"), ("file", "classifier"), ("network", "network")):
        if name in source.classes:
            _check_numbering(source.classes[name], inputs.truth.labels, flag, getattr(config, flag))
    return source


def _check_numbering(classes: np.ndarray, labels: np.ndarray, flag: str, value: object) -> None:
    """Raise UserError where hardly any class is right, and most would be under other numbers."""
    right, renumbered = top_k(classes, labels, 1).mean(), renumbered_share(classes[:, 0], labels)
    if renumbered >= 0.5 and right <= renumbered / 10:
        remedy = "number them by the sorted wnids, from 0"
        if flag == "network":
            remedy = "give --network-classes in the order of its outputs"
        raise UserError(
            f"--{flag} {value} names the right class of {right:.1%} of the images, and of "
            f"{renumbered:.1%} if its classes are numbered in another order; {remedy}."
        )


def _read_source(config: EvaluateConfig, inputs: Inputs, progress: Progress) -> Source:
    classes: dict[str, np.ndarray] = {}
    if config.classifier is not None:
        classes["file"] = read_top_classes(config.classifier, inputs.truth)
    if config.run is not None or config.network is not None:
        return _nets(config, inputs, classes, progress)
    if config.score_maps is not None:
        return _score_maps(config, inputs, classes, progress)
    if config.predictions is not None:
        return _boxes(config.predictions, inputs, classes)
    return Source(kind="constant boxes", name="", classes=classes)


def _nets(
    config: EvaluateConfig, inputs: Inputs, classes: dict[str, np.ndarray], progress: Progress
) -> Source:
    from jobs.evaluate.maps import MAPS  # here: they need torch and Ray
    from jobs.evaluate.tasks import shard_parts

    assert inputs.maps is not None
    parts = shard_parts(config, inputs.maps, progress)
    part = _collect(parts, Path(config.output), inputs.maps, progress)
    classes = part.classes | classes
    ours = config.run is not None
    of_aln = tuple(name for name in ("co-trained", "clean", "file") if name in classes)
    localizations: list[Localization] = []
    for name, source in MAPS.items():
        if name in part.maps:
            own = of_aln if name == "aln" else ("clean" if ours else "network",)
            paper = source.paper if ours else None
            localizations += _localizations(name, source.title, part.maps[name], own, paper)
    return Source(
        kind="run" if ours else "network",
        name=str(config.run or config.network),
        localizations=tuple(localizations),
        classes=classes,
        scores=part.scores,
        main=("Mean of all ALN maps", part.maps["aln"]) if ours else None,
    )


def _score_maps(
    config: EvaluateConfig, inputs: Inputs, classes: dict[str, np.ndarray], progress: Progress
) -> Source:
    root, truth = config.score_maps, inputs.maps
    assert root is not None
    assert truth is not None
    first = read_score_map(score_map_path(root, truth.ids[0]), None)
    size = (SIDE, SIDE) if config.protocol == "int224" else (first.shape[0], first.shape[1])
    parts = given_parts(root, truth, size, config.workers or os.cpu_count() or 1)
    maps = _collect(parts, Path(config.output), truth, progress).maps["given"]
    localizations = _localizations("given", "Given score maps", maps, (*classes,) or (None,), None)
    return Source(
        kind="score maps",
        name=str(root),
        localizations=tuple(localizations),
        classes=classes,
        main=("Mean of all given maps", maps),
    )


def _boxes(path: Path, inputs: Inputs, classes: dict[str, np.ndarray]) -> Source:
    guesses = read_guesses(path, inputs.truth)
    own = "boxes" if (guesses.labels >= 0).any() else None
    localization = Localization(
        map="given",
        title="Given boxes",
        boxes=guesses.boxes[:, 0],
        grid=None,
        classes=(own,),
        guesses=guesses,
    )
    return Source(
        kind="boxes",
        name=str(path),
        localizations=(localization,),
        classes=classes | ({} if own is None else {own: guesses.labels}),
    )


def _localizations(
    name: str,
    title: str,
    maps: ScoredMaps,
    classes: tuple[str | None, ...],
    paper: tuple[float | None, float | None] | None,
) -> list[Localization]:
    """Return the boxes of one map by each rule. paper: of the paper's own rule."""
    return [
        Localization(
            map=name,
            rule=rule,
            title=title,
            classes=classes,
            paper=paper if rule == "paper" else None,
            boxes=boxes,
            grid=np.array(maps.counts.levels.shape),
            found=maps.found[rule],
            auc=maps.auc,
            auc_other=maps.auc_other,
            sweep=maps.counts.sweep,
        )
        for rule, boxes in maps.boxes.items()
    ]


def constant_boxes(
    source: Source, truth: MapTruth, shares: tuple[float, float]
) -> list[Localization]:
    """Return the boxes that are the same for every image: all of it, a centred box of these
    (height, width) shares, and that of the mean map."""
    classes, sizes = (source.known_classes,), truth.sizes
    result = [
        Localization(
            map="whole image",
            title="Whole image",
            classes=classes,
            paper=WHOLE_IMAGE_PAPER,
            boxes=whole_image_boxes(sizes),
            grid=sizes,
        ),
        Localization(
            map="centred box",
            title="Centred box",
            classes=classes,
            boxes=centred_boxes(sizes, shares),
            grid=sizes,
        ),
    ]
    if source.main is not None:
        title, maps = source.main
        result += _localizations("mean map", title, mean_map(maps.counts, truth), classes, None)
    return result


def _collect(parts: Iterable[Part], output: Path, truth: MapTruth, progress: Progress) -> Part:
    """Return the parts joined in order, and write the maps of each as it comes. Raises UserError
    unless they are of every image."""
    kept: list[Part] = []
    done = 0
    for part in parts:
        write_maps(output, int(np.searchsorted(truth.rows, part.rows[0])), part.file)
        kept.append(replace(part, file=b""))
        done += len(part.rows)
        progress(done, len(truth.ids))
    kept.sort(key=lambda part: int(part.rows[0]))
    whole = reduce(add, kept)
    check_coverage(whole.rows, truth.rows, truth.ids)
    return whole


def check_coverage(rows: np.ndarray, expected: np.ndarray, ids: Sequence[str]) -> None:
    """Raise UserError, naming images, unless each expected ledger row was scored exactly once."""
    unique, counts = np.unique(rows, return_counts=True)
    faults = {
        "missing": np.setdiff1d(expected, unique),
        "evaluated more than once": unique[counts > 1],
        "unknown to the ledger": np.setdiff1d(unique, expected),
    }
    names = dict(zip(expected.tolist(), ids, strict=True))
    for fault, wrong in faults.items():
        if len(wrong):
            some = [
                f"{row} ({names[row]})" if row in names else f"{row}"
                for row in wrong[:NAMED].tolist()
            ]
            more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            raise UserError(
                f"images {fault}: {len(wrong)}, ledger rows {', '.join(some)}{more}: "
                "figures over them would be wrong, so none were written. Shards and ledger do not "
                "belong together; run jobs.preprocess again."
            )
