"""`python -m benchmarks.evaluation`: what an evaluation costs per image, stage by stage.

The stages run in this process in one thread; then the whole job runs, one and two Ray tasks at a
time. The nets have random weights and the paper's four layers, the images are generated: neither
changes the cost. The paper evaluates an image in 93 ms.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import hardware, quiet, write_result
from jobs import cli
from jobs.evaluate.__main__ import evaluate
from jobs.evaluate.config import EvaluateConfig
from jobs.evaluate.maps import MAPS, Inputs, MapSource, finished
from jobs.evaluate.scorer import map_truth, score_maps
from jobs.loading import LoadingConfig
from jobs.runs import Nets, colour_statistics, load_nets, new_classifier, new_corruption, save_nets
from jobs.train.config import TrainConfig
from jobs.train.trainer import model_config
from model.localization import RULES, Rule
from model.masking import normalize
from pipeline.evaluation.sweep import quantize, stretch
from pipeline.evaluation.truth import ground_truth_of
from pipeline.loading.loader import Loader
from pipeline.shards.format import Manifest, read_manifest
from pipeline.shards.ledger import read_ledger
from pipeline.shards.make import preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.synthetic import SyntheticConfig, write_synthetic

PAPER_MS = 93.0
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How much to measure, and where the result goes."""

    images: int = cli.option(2000, help="generated images")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


def write_run(folder: Path, manifest: Manifest) -> Path:
    """Write a run folder with the default nets, untrained."""
    config = model_config(
        TrainConfig(loading=LoadingConfig(data="unused"), output=str(folder)), manifest
    )
    torch.manual_seed(0)
    nets = Nets(
        config=config,
        corruption=new_corruption(config),
        classifier=new_classifier(config),
        clean_classifier=new_classifier(config),
    )
    folder.mkdir()
    save_nets(folder, nets, {})
    return folder


def stage_costs(data: Path, run: Path) -> dict[str, float]:
    """Return the milliseconds of CPU time per image of each stage in one thread; the median."""
    torch.set_num_threads(1)
    manifest, nets = read_manifest(str(data)), load_nets(run)
    ledger = read_ledger(str(data), "val")
    known = ground_truth_of(ledger, manifest.classes, manifest.class_names)
    truth = map_truth(known, ledger["row"].to_numpy(), "devkit", 0)

    def load() -> Any:
        return list(Loader(str(data), manifest).evaluation("val", 100, 0, 4))

    batch = load()[-1]
    images = np.searchsorted(truth.rows, batch.rows.numpy())
    x = Inputs(
        images=normalize(batch.images, *colour_statistics(nets.config, batch.images.device)),
        labels=batch.labels,
        segments=batch.segments,
        superpixels=manifest.max_superpixels,
    )
    maps = run_map(MAPS["aln"], nets, x)

    def score(*rules: Rule) -> Callable[[], Any]:
        return lambda: score_maps(maps, quantize(stretch(maps)), images, truth, rules)

    def classify() -> Any:
        with torch.no_grad():
            return nets.clean_classifier(x.images)

    stages: dict[str, Callable[[], Any]] = {"a classifier": classify}
    for source in (source for source in MAPS.values() if source.of_run is not None):
        stages[source.title] = partial(run_map, source, nets, x)
    stages["a map's box, sweep and AUC"] = score("paper")
    stages["the same by every box rule"] = score(*RULES)
    count = len(batch.labels)
    costs = {"load, with start": cpu_seconds(load) / 4 / count}
    costs |= {name: cpu_seconds(stage) / count for name, stage in stages.items()}
    return {name: 1000 * seconds for name, seconds in costs.items()}


def run_map(source: MapSource, nets: Nets, inputs: Inputs) -> np.ndarray:
    """Return a map as it is scored."""
    assert source.of_run is not None
    return finished(source.of_run(nets, inputs), blurred=source.blurred)


def cpu_seconds(stage: Callable[[], Any]) -> float:
    """Return the median CPU time of a stage, after one call that does not count."""
    stage()
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        stage()
        seconds.append(time.process_time() - start)
    return sorted(seconds)[REPEATS // 2]


def job_rates(data: Path, run: Path, images: int) -> dict[str, float]:
    """Return the images per second of the job's tasks, the best of three, Ray started before."""
    rates: dict[str, float] = {}
    for name, baselines in (("ALN", False), ("all maps", True)):
        for workers in (1, 2) * REPEATS:
            ends: list[float] = []

            def progress(*_: int, ends: list[float] = ends) -> None:
                ends.append(time.perf_counter())

            config = EvaluateConfig(
                data=str(data),
                run=run,
                output=data.parent / "evaluation",
                baselines=baselines,
                workers=workers,
                shards=8,
            )
            started = time.perf_counter()
            evaluate(config, progress)
            key = f"{name}, {workers} at a time"
            rates[key] = max(rates.get(key, 0.0), images / (ends[-1] - started))
    return rates


def main() -> None:
    """Measure, print and write the results."""
    config = cli.parse(BenchConfig, None, __doc__ or "")
    cli.connect_ray()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic = SyntheticConfig(train_images=64, val_images=config.images)
        write_synthetic(folder / "images", synthetic)
        asked = PreprocessConfig(
            source=str(folder / "images"), output=str(folder / "shards"), superpixels=196
        )
        preprocess(asked, quiet, cli.connect_ray)
        run = write_run(folder / "run", read_manifest(str(folder / "shards")))
        rates = job_rates(folder / "shards", run, config.images)
        costs = stage_costs(folder / "shards", run)
    speedup = PAPER_MS * rates["ALN, 1 at a time"] / 1000
    print(cli.table(["stage", "CPU ms/image"], [[k, f"{v:.3f}"] for k, v in costs.items()]))
    print(cli.table(["the job's tasks", "images/s"], [[k, f"{v:.0f}"] for k, v in rates.items()]))
    print(f"the paper's 93 ms / ours for ALN on one core: {speedup:.1f}")
    content = {
        "hardware": hardware(),
        "milliseconds_per_image": costs,
        "images_per_second": rates,
        "paper_ms_over_ours": speedup,
    }
    write_result(config.output, "evaluation", content)


if __name__ == "__main__":
    cli.run(main)
