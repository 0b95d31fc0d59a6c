"""`python -m benchmarks.planning`: what a driver does for very many images, without any image.

Generated rows are listed and planned as `jobs.preprocess` does it, while the memory of this
process is watched. Then what grows with images or shards is measured in CPU time, and `bounds` says
how long each job takes on a number of nodes: the table of docs/scale.md.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.machine import hardware, write_result
from jobs import cli
from pipeline.loading.order import epoch_order
from pipeline.shards.format import Shard
from pipeline.shards.ledger import ShardFacts, merge_records, read_facts, write_record
from pipeline.shards.plan import Plan, PreprocessConfig, make_plan
from pipeline.sources.find import LAYOUTS
from pipeline.sources.listing import CHUNK, SCHEMA, Listing, ListingBuilder, stored
from pipeline.tasks import run_tasks

CLASSES = 1000
ROWS = 1000  # of a shard
SIZES = (1_281_167, 100_000_000, 1_000_000_000)
NODES = (1, 8, 64)  # of 16 cores and a GPU; these and the bandwidths are assumptions
CORES = 16
NETWORK = 1.25e9  # bytes/s of each node
STORAGE = 10e9  # bytes/s for all nodes together
SOURCE_BYTES, SAMPLE_BYTES = 110_000, 18_500  # of an ImageNet JPEG; of a sample at 64 px, raw
# Measured, docs/results.md: images/s of a core or a GPU at 64 px.
PREPROCESSED, TRAINED, EVALUATED = 681, 44_000, 164
LOADED = 56_000  # images/s of a worker's loader
SCORED = 20e-6  # CPU seconds of an evaluation of boxes for each image, docs/scale.md


@dataclass(frozen=True, kw_only=True)
class PlanningConfig:
    """How many rows, and where the figures go."""

    rows: int = cli.option(100_000_000, help="generated, of 100 bytes each: in TMPDIR twice")
    units: int = cli.option(500_000, help="rows with which costs per image are measured")
    tasks: int = cli.option(1000, help="Ray tasks, each with the rows of a shard")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


@contextmanager
def watched(peak: dict[str, float], name: str) -> Iterator[None]:
    """Note the CPU seconds of a block, and its peak memory in MiB.

    Memory is RssAnon and RssShmem of /proc/self/status every 50 ms: pages of mapped files, which
    the kernel takes back when others need memory, are not in it.
    """
    ended, started = threading.Event(), time.process_time()

    def watch() -> None:
        while not ended.wait(0.05):
            status = dict(
                x.split(":\t") for x in Path("/proc/self/status").read_text().splitlines()
            )
            used = sum(int(status[x].split()[0]) for x in ("RssAnon", "RssShmem")) / 1024
            peak[f"{name}_mib"] = max(used, peak.get(f"{name}_mib", 0.0))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    peak[f"{name}_cpu_s"] = time.process_time() - started


def generated(rows: int) -> pa.Table:
    """Return rows of SCHEMA as a layout lists them, of images of 1000 classes in turn."""
    wnids = pa.array([f"n{number:08d}" for number in range(CLASSES)])

    def chunk(first: int) -> pa.Table:
        numbers = np.arange(first, min(first + CHUNK, rows))
        texts = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 10, "0")
        names = pc.binary_join_element_wise(texts, ".JPEG", "")
        boxes = np.tile(np.array([10, 20, 109, 219], np.int32), len(numbers))
        columns = {
            "id": texts,
            "path": names,
            "wnid": wnids.take(pa.array(numbers % CLASSES)),
            "boxes": pa.ListArray.from_arrays(
                np.arange(len(numbers) + 1, dtype=np.int32),
                pa.FixedSizeListArray.from_arrays(pa.array(boxes), 4),
            ).cast(SCHEMA.field("boxes").type),
        }
        nothing = (pa.nulls(len(numbers), field.type) for field in SCHEMA)
        return pa.table(
            [columns.get(field.name, x) for field, x in zip(SCHEMA, nothing, strict=True)], SCHEMA
        )

    return pa.concat_tables([stored(chunk(first)) for first in range(0, rows, CHUNK)])


def plan_of(rows: int, folder: str) -> Plan:
    """List and plan generated rows."""
    LAYOUTS["generated"] = lambda files: Listing({"train": generated(rows)}, {})  # noqa: ARG005
    (Path(folder) / "source").mkdir()
    return make_plan(
        PreprocessConfig(source=f"{folder}/source", output=f"{folder}/out", layout="generated")
    )


def per_item(count: int, function: Any) -> float:
    """Return the CPU seconds of `function()` over a number of items."""
    started = time.process_time()
    function()
    return (time.process_time() - started) / count


def nothing(*arguments: object) -> None:
    """A task that does nothing with its arguments."""


def units(config: PlanningConfig, plan: Plan, folder: str) -> dict[str, float]:
    """Return CPU seconds of the driver: each image, each shard, each sample of an epoch."""
    numbers = np.random.default_rng(0).permutation(config.units).tolist()

    def list_them() -> None:
        builder = ListingBuilder()
        for x in numbers:
            builder.add(id=f"{x:010}", path=f"{x:010}.JPEG", wnid="n1", boxes=[(1, 2, 3, 4)])
        builder.table("id")

    tasks = plan.tasks[:: max(1, len(plan.tasks) // config.tasks)][: config.tasks]
    cli.connect_ray()
    for _ in run_tasks(nothing, range(100), lambda x: (x,)):  # workers start
        pass

    def run() -> None:
        for _ in run_tasks(nothing, tasks, lambda task: (task, plan.images(task))):
            pass

    one_row = {"split": "train", "key": "train-00000000", "id": "a", "path": "a.JPEG", "label": 1}
    one_row |= {
        "status": "ok",
        "boxes": [[1, 2, 3, 4]],
        "superpixels": 100,
        "width": 1,
        "height": 1,
    }
    shard = Shard(name="train-000000.tar", images=ROWS, bytes=10, sha256="0" * 64)
    facts = ShardFacts(shard=shard, index_bytes=1, pixels=1, sums=(1, 1, 1), squares=(1, 1, 1))
    rows = per_item(len(tasks), lambda: [*map(plan.images, tasks)])
    records = [f"{folder}/{number}.parquet" for number in range(100)]
    for record in records:
        write_record(record, [one_row] * ROWS, facts)
    return {
        "listed_image": per_item(len(numbers), list_them),
        "task_of_a_shard": per_item(len(tasks), run) - rows,
        "row_of_a_shard": rows / plan.order.size,  # looking for them takes time in all chunks
        "facts_of_a_shard": per_item(100, lambda: [*map(read_facts, records)]),
        "merge_of_a_shard": per_item(100, lambda: merge_records(records, folder, ["train"], 1000)),
        "sample_of_an_epoch": per_item(10**7, lambda: epoch_order([1000] * 10**4, 0, 0, None)),
    }


def bounds(cost: dict[str, float], images: int, nodes: int) -> dict[str, dict[str, float]]:
    """Return the seconds that each part of a job needs, were it alone; the longest bounds the job.

    cost: as `units` gives it. Preprocessing and evaluation are of all images, training is an epoch.
    What the driver does is in one process, so no node makes it faster.
    """
    shards, bandwidth = images / ROWS, min(nodes * NETWORK, STORAGE)
    finish = cost["facts_of_a_shard"] + cost["merge_of_a_shard"]
    return {
        "preprocess": {
            "computing": images / (nodes * CORES * PREPROCESSED),
            "storage": images * (SOURCE_BYTES + SAMPLE_BYTES) / bandwidth,
            "listing": images * cost["listed_image"],
            "Ray tasks": shards * (cost["task_of_a_shard"] + images * cost["row_of_a_shard"]),
            "ledger": shards * finish,
        },
        "train": {
            "computing": images / (nodes * TRAINED),
            "loader": images / (nodes * LOADED),
            "storage": images * SAMPLE_BYTES / bandwidth,
            "epoch's order": images * cost["sample_of_an_epoch"],
        },
        "evaluate": {
            "computing": images / (nodes * CORES * EVALUATED),
            "storage": images * SAMPLE_BYTES / bandwidth,
            "metrics": images * SCORED,
        },
    }


def show_bounds(cost: dict[str, float]) -> None:
    """Print the table of docs/scale.md: what bounds a job, and for how many seconds."""
    rows = []
    for images in SIZES:
        for nodes in NODES:
            jobs = bounds(cost, images, nodes).values()
            longest = [max((seconds, name) for name, seconds in x.items()) for x in jobs]
            cells = [f"{name}, {seconds / 60:.1f} min" for seconds, name in longest]
            rows.append([f"{images / 1e6:.6g} M", str(nodes), *cells])
    print(cli.table(["images", "nodes", "preprocess", "train, an epoch", "evaluate"], rows))


def main() -> None:
    config = cli.parse(PlanningConfig, None, __doc__ or "")
    peak: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        with watched(peak, "plan"):
            plan = plan_of(config.rows, folder)
        with watched(peak, "hundred_shards"):
            for task in plan.tasks[:: max(1, len(plan.tasks) // 100)][:100]:
                plan.images(task)
        print(json.dumps(peak))
        content: dict[str, Any] = {
            "hardware": hardware(),
            "rows": config.rows,
            "shards": len(plan.tasks),
        }
        content |= {"memory_and_cpu": peak, "cpu_seconds_of_each": units(config, plan, folder)}
    print(json.dumps(content, indent=1))
    show_bounds(content["cpu_seconds_of_each"])
    write_result(config.output, "planning", content)


if __name__ == "__main__":
    cli.run(main)
