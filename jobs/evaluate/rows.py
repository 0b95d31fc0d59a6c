"""The rows of the table: which boxes, classes and maps each one's figures come from."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from model.localization import RULE_TEXTS, RULES


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row. box, classes, map: names in `jobs.scoring.Predictions`; map: of the maps that the
    figures over thresholds and pixels come from. run: which run it belongs to, None for rows that
    need none. paper: its figures in the paper's Table 1 on ILSVRC val, metric 1 (GT-known, see
    docs/method.md) and metric 2 (top-1 localization)."""

    title: str
    box: str
    classes: str | None
    map: str | None = None
    paper: tuple[float | None, float | None] | None = None
    run: int | None = None


# The paper's Table 1 calls the first "Max box" and CAM "Global Average Pooling".
PAPER: dict[str, tuple[float | None, float | None]] = {
    "whole_image": (0.410, 0.343),
    "gradient": (None, 0.387),
    "lrp": (0.422, None),
    "cam": (0.519, 0.436),
    "aln": (0.565, 0.455),
}
MAP_TITLES = {"gradient": "Gradient saliency", "lrp": "LRP", "cam": "CAM"}
RUN_MAP_TITLES = MAP_TITLES | {"layercam": "LayerCAM of superpixels"}  # model/evidence.py
OTHER_RULES = tuple(rule for rule in RULES if rule != "paper")
ORDER = (
    "whole_image",
    "centred_box",
    "mean_map",
    *(
        f"{network}{name}{rule}"
        for network, titles in (("", RUN_MAP_TITLES), ("network_", MAP_TITLES))
        for name in titles
        for rule in ("", *(f"_{rule}" for rule in OTHER_RULES))
    ),
    *(
        f"aln{classes}{rule}"
        for classes in ("", "_clean_class", "_network_class", "_other_class")
        for rule in ("", *(f"_{rule}" for rule in OTHER_RULES))
    ),
    "score_maps",
    "predictions",
)


def suffix(run: int) -> str:
    """What the names of a run's rows and columns end in: nothing for the first, _2 for the
    second."""
    return "" if run == 0 else f"_{run + 1}"


def _by_each_rule(method: Method, name: str, end: str = "") -> dict[str, Method]:
    """A map's row by the paper's box rule, NAME, and those by the others, NAME_RULE; then `end`."""
    others = {
        f"{name}_{rule}{end}": replace(
            method,
            title=f"{method.title}, {RULE_TEXTS[rule]}",
            box=f"{method.box}_{rule}",
            paper=None,
        )
        for rule in OTHER_RULES
    }
    return {f"{name}{end}": method} | others


def run_methods(
    run: int, label: str, *, baselines: bool, others: dict[str, str]
) -> dict[str, Method]:
    """The rows of one run: ALN with its own classes, the clean classifier's and those of `others`
    (name in `Predictions.classes` -> what it is called); the baselines; all by each box rule.

    label: stands behind the titles where two runs are compared.
    """
    end = suffix(run)
    clean, own, aln = f"clean_classifier{end}", f"classifier{end}", f"aln{end}"
    method = Method(title="ALN", box=aln, classes=own, map=aln, paper=PAPER["aln"])
    rows = _by_each_rule(method, "aln", end)
    classes = {"clean": (clean, "clean classifier")} | {n: (n, t) for n, t in others.items()}
    for name, (source, text) in classes.items():
        method = Method(title=f"ALN, {text}'s class", box=aln, classes=source, map=aln)
        rows |= _by_each_rule(method, f"aln_{name}_class", end)
    if baselines:
        for name, title in RUN_MAP_TITLES.items():
            box = name + end
            method = Method(title=title, box=box, classes=clean, map=box, paper=PAPER.get(name))
            rows |= _by_each_rule(method, name, end)
    return {n: replace(m, title=m.title + label, run=run) for n, m in rows.items()}


def network_methods(network: str) -> dict[str, Method]:
    """The rows of a network from elsewhere."""
    rows: dict[str, Method] = {}
    for name, title in MAP_TITLES.items():
        box = f"network_{name}"
        method = Method(title=f"{title}, {network}", box=box, classes="network", map=box)
        rows |= _by_each_rule(method, box)
    return rows


def ordered(methods: dict[str, Method]) -> dict[str, Method]:
    """The rows in the table's order, a second run's behind the first's."""

    def place(name: str) -> tuple[bool, int]:
        base = name.removesuffix(suffix(1))
        return base != name, ORDER.index(base)

    return {name: methods[name] for name in sorted(methods, key=place)}


def best_known_classes(names: Collection[str]) -> str | None:
    """The classes that rows without a classifier of their own are scored with, if any."""
    return next((n for n in ("clean_classifier", "network", "other") if n in names), None)
