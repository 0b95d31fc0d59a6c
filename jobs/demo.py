"""`python -m jobs.demo`: the whole pipeline on generated images, through the jobs themselves."""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from jobs import cli
from pipeline.errors import UserError
from pipeline.storage import write_atomically
from pipeline.synthetic import SyntheticConfig, write_synthetic

SUPERPIXELS = 196
DONE_NAME = "images.done"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Where the demo writes, and how large it is."""

    output: Path = cli.option(Path("demo"), help="folder for images, shards, run and report")
    train_images: int = cli.option(5000, help="generated train images")
    val_images: int = cli.option(1000, help="generated val images")
    warmup_epochs: int = cli.option(25, help="epochs of the classifier alone")
    epochs: int = cli.option(10, help="epochs of adversarial training")
    workers: int = cli.option(2, help="training processes")
    seed: int = cli.option(0, help="of training; the images are always the same")


def job(name: str, *arguments: str) -> None:
    """Run a job as a user would, showing the command. Raises UserError where it fails."""
    command = ["-m", f"jobs.{name}", *arguments]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    result = subprocess.run([sys.executable, *command], check=False)
    if result.returncode:
        raise UserError(f"jobs.{name} failed with exit code {result.returncode}, see above")


def generate(output: Path, config: SyntheticConfig) -> None:
    """Write the generated images, unless an earlier demo wrote the same ones. Raises UserError
    where it wrote others, which would stay among the new ones."""
    done = output / DONE_NAME
    if done.is_file():
        if done.read_text() == repr(config):
            return
        raise UserError(
            f"{output} holds other generated images ({done.read_text()}); use a new --output"
        )
    write_synthetic(output, config)
    write_atomically(done, repr(config).encode())


def demo(config: DemoConfig) -> None:
    """Generate, preprocess, train, evaluate, and localize a few images."""
    folder = config.output
    images, shards = folder / "images", folder / "shards"
    run, evaluation = folder / f"run-{config.seed}", folder / f"evaluation-{config.seed}"
    total = config.train_images + config.val_images
    print(f"drawing {total} images of 8 textured classes into {images}", flush=True)
    synthetic = SyntheticConfig(train_images=config.train_images, val_images=config.val_images)
    generate(images, synthetic)
    job(
        "preprocess",
        *("--source", str(images)),
        *("--output", str(shards)),
        *("--superpixels", str(SUPERPIXELS)),
    )
    job(
        "train",
        *("--data", str(shards)),
        *("--output", str(run)),
        *("--workers", str(config.workers)),
        *("--warmup-epochs", str(config.warmup_epochs)),
        *("--epochs", str(config.epochs)),
        *("--seed", str(config.seed)),
    )
    pictures = sorted((images / "val").glob("*.JPEG"))[:3]
    localized = folder / f"localized-{config.seed}"
    job("localize", "--run", str(run), "--output", str(localized), *map(str, pictures))
    job("evaluate", "--data", str(shards), "--run", str(run), "--output", str(evaluation))


def main() -> None:
    demo(cli.parse(DemoConfig, None, __doc__ or ""))


if __name__ == "__main__":
    cli.run(main)
