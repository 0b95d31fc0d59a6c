"""`python -m jobs.demo`: the whole pipeline on generated images, through its commands."""

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
LOCALIZED = 3  # val images that jobs.localize draws


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Where the demo writes, and how large it is."""

    output: Path = cli.option(Path("demo"), help="folder for images, shards, run and report")
    train_images: int = cli.option(5000, low=1, help="generated train images")
    val_images: int = cli.option(1000, low=1, help="generated val images")
    warmup_epochs: int = cli.option(25, low=1, help="epochs of the classifier alone")
    epochs: int = cli.option(10, low=1, help="epochs of adversarial training")
    workers: int = cli.option(2, low=1, help="training processes")
    seed: int = cli.option(0, low=0, help="of training; the images are always the same")

    def __post_init__(self) -> None:
        cli.check_bounds(self)


def run_command(name: str, *arguments: Path, **flags: object) -> None:
    """Run a command as a user would, showing it. Raises UserError where it fails."""
    command = ["-m", f"jobs.{name}"]
    for field, value in flags.items():
        command += [cli.flag(field), str(value)]
    command += map(str, arguments)
    print(f"\n$ python {shlex.join(command)}", flush=True)
    result = subprocess.run([sys.executable, *command], check=False)
    if result.returncode:
        raise UserError(f"jobs.{name} failed with exit code {result.returncode}, see above")


def generate(output: Path, config: SyntheticConfig) -> None:
    """Write the generated images, unless an earlier demo wrote the same ones. Raises UserError
    where it wrote others, which would stay among the new ones."""
    done = output.with_name(DONE_NAME)  # beside the images, each of which is accounted for
    if done.is_file():
        if done.read_text() == repr(config):
            return
        raise UserError(f"{output} holds other images ({done.read_text()}); use a new --output")
    write_synthetic(output, config)
    write_atomically(done, repr(config).encode())


def demo(config: DemoConfig) -> None:
    """Generate, preprocess, train, localize a few images, and evaluate."""
    images, shards = config.output / "images", config.output / "shards"
    run, localized, evaluation = (
        config.output / f"{name}-{config.seed}" for name in ("run", "localized", "evaluation")
    )
    total = config.train_images + config.val_images
    print(f"drawing {total} images of 8 textured classes into {images}", flush=True)
    synthetic = SyntheticConfig(train_images=config.train_images, val_images=config.val_images)
    generate(images, synthetic)
    run_command("preprocess", source=images, output=shards, superpixels=SUPERPIXELS)
    run_command(
        "train",
        data=shards,
        output=run,
        workers=config.workers,
        warmup_epochs=config.warmup_epochs,
        epochs=config.epochs,
        seed=config.seed,
    )
    pictures = sorted((images / "val").glob("*.JPEG"))[:LOCALIZED]
    run_command("localize", *pictures, run=run, output=localized)
    run_command("evaluate", data=shards, run=run, output=evaluation)


def main() -> None:
    demo(cli.parse(DemoConfig, None, __doc__ or ""))


if __name__ == "__main__":
    cli.run(main)
