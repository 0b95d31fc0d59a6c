"""`python -m benchmarks.evaluation`: what an evaluation costs per image, stage by stage.

The stages run in this process in one thread, side by side; then the whole prediction runs as Ray
tasks, one and two at a time. The nets have random weights and the paper's four layers, the images
are generated: neither changes the cost. The paper evaluates an image in 93 ms.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.machine import hardware, quiet
from jobs import cli
from jobs.evaluate.config import EvaluateConfig, evaluate
from jobs.evaluate.maps import Scored, map_truth, score_maps
from jobs.loading import LoadingConfig
from jobs.runs import Nets, colour_statistics, load_nets, new_classifier, new_corruption, save_nets
from jobs.train.config import TrainConfig
from jobs.train.worker import model_config
from model.evidence import evidence
from model.localization import RULES
from model.masking import mask_map, normalize
from model.relevance import layerwise_relevance
from model.saliency import blur, class_activation_map, gradient_saliency
from pipeline.evaluation.truth import ground_truth_of
from pipeline.loading.loader import Loader
from pipeline.shards.format import Manifest, read_manifest
from pipeline.shards.ledger import read_ledger
from pipeline.shards.make import preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.synthetic import SyntheticConfig, write_synthetic

PAPER_MS = 93.0
REPEATS = 3
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How much to measure, and where the result goes."""

    images: int = cli.option(2000, help="generated images")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


def made_run(folder: Path, manifest: Manifest) -> Path:
    """A run folder with the default nets, untrained."""
    config = model_config(
        TrainConfig(loading=LoadingConfig(data="unused"), output=folder), manifest
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
    """Milliseconds of CPU time per image of each stage in one thread, over one batch of 100; the
    median."""
    torch.set_num_threads(1)
    manifest, nets = read_manifest(str(data)), load_nets(run)
    ledger = read_ledger(str(data), "val")
    known = ground_truth_of(ledger, manifest.classes, manifest.class_names)
    truth = map_truth(known, ledger["row"].to_numpy(), "devkit", 0)
    batches = list(Loader(str(data), manifest).evaluation("val", 100, 0, 4))
    batch = batches[-1]
    places = np.searchsorted(truth.rows, batch.rows.numpy())
    x = normalize(batch.images, *colour_statistics(nets.config, CPU))
    clean, labels = nets.clean_classifier, batch.labels
    count = len(labels)

    def load() -> Any:
        return list(Loader(str(data), manifest).evaluation("val", 100, 0, 4))

    def aln() -> np.ndarray:
        with torch.no_grad():
            return mask_map(nets.corruption, x, batch.segments, manifest.max_superpixels).numpy()

    def classify() -> Any:
        with torch.no_grad():
            return clean(x)

    values = aln()

    def score(rules: tuple[str, ...]) -> Callable[[], None]:
        return lambda: score_maps(Scored(), "aln", values, places, truth, rules=rules)

    work: dict[str, tuple[Callable[[], Any], int]] = {
        "load, four batches with start": (load, sum(len(b.labels) for b in batches)),
        "a classifier": (classify, count),
        "ALN's map": (aln, count),
        "gradient saliency, blurred": (
            lambda: blur(gradient_saliency(clean, x, labels).numpy()),
            count,
        ),
        "LRP, blurred": (lambda: blur(layerwise_relevance(clean, x, labels).numpy()), count),
        "CAM": (lambda: class_activation_map(clean, x, labels), count),
        "LayerCAM of superpixels": (
            lambda: evidence(clean, x, labels, batch.segments, manifest.max_superpixels),
            count,
        ),
        "a map's box, sweep and AUC": (score(("paper",)), count),
        "the same by every box rule": (score(tuple(RULES)), count),
    }
    costs = {}
    for name, (stage, images) in work.items():
        stage()
        seconds = []
        for _ in range(REPEATS):
            start = time.process_time()
            stage()
            seconds.append(time.process_time() - start)
        costs[name] = 1000 * sorted(seconds)[REPEATS // 2] / images
    return costs


def job_rates(data: Path, run: Path, images: int) -> dict[str, float]:
    """Images per second of the whole job's tasks, Ray and its workers already started."""
    rates: dict[str, float] = {}
    for name, baselines in (("ALN and constant rows", False), ("every row", True)):
        for workers in (1, 2, 1, 2, 1, 2):
            marks: list[tuple[float, int]] = []

            def progress(done: int, _: int, marks: list[tuple[float, int]] = marks) -> None:
                marks.append((time.perf_counter(), done))

            config = EvaluateConfig(
                data=str(data),
                run=(run,),
                output=data / "unused",
                baselines=baselines,
                workers=workers,
                shards=8,
            )
            started = time.perf_counter()
            evaluate(config, progress)
            key = f"{name}, {workers} at a time"
            rates[key] = max(rates.get(key, 0.0), images / (marks[-1][0] - started))
    return rates


def main() -> None:
    config = cli.parse(BenchConfig, None, __doc__ or "")
    ray.init(address="local", include_dashboard=False, logging_level="warning")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic = SyntheticConfig(train_images=64, val_images=config.images)
        write_synthetic(folder / "images", synthetic)
        asked = PreprocessConfig(
            source=str(folder / "images"), output=str(folder / "shards"), superpixels=196
        )
        preprocess(asked, quiet, cli.connect_ray)
        data = folder / "shards"
        run = made_run(folder / "run", read_manifest(str(data)))
        rates = job_rates(data, run, config.images)
        costs = stage_costs(data, run)
    ratios = {
        f"{name}: 2 at a time / 1": rates[f"{name}, 2 at a time"] / rates[f"{name}, 1 at a time"]
        for name in ("ALN and constant rows", "every row")
    }
    for name in ("ALN and constant rows", "every row"):
        ratios[f"{name}: the paper's 93 ms / ours on one core"] = (
            PAPER_MS * rates[f"{name}, 1 at a time"] / 1000
        )
    print(
        cli.table(
            ["stage, one thread", "CPU ms/image"], [[k, f"{v:.3f}"] for k, v in costs.items()]
        )
    )
    print(cli.table(["the job's tasks", "images/s"], [[k, f"{v:.0f}"] for k, v in rates.items()]))
    print(cli.table(["ratio", ""], [[k, f"{v:.2f}"] for k, v in ratios.items()]))
    content = {
        "hardware": hardware(),
        "milliseconds_per_image": costs,
        "images_per_second": rates,
        "ratios": ratios,
    }
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"{date.today().isoformat()}-evaluation.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
