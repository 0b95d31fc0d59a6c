"""`python -m jobs.train`: adversarial training on Ray Train, resumable by the same command."""

import os
from collections.abc import Sequence
from dataclasses import replace

from jobs import cli
from jobs.loading import choose_device
from jobs.train.config import PRESETS, TrainConfig
from pipeline.shards.format import MANIFEST_NAME, read_manifest
from pipeline.storage import absolute, is_file, join


def train(config: TrainConfig) -> None:
    """Train to the end, from the last checkpoint where there is one. Raises UserError with the
    cause where training cannot go on."""
    # Here: they need torch and Ray Train, which take seconds to load.
    from jobs.runs import MODEL_NAME, RUN_NAME, check_training
    from jobs.shipped import shipped_decoder
    from jobs.train.checks import (
        check_data,
        check_output,
        check_warmup,
        claimed_output,
        describe_run,
    )
    from jobs.train.launch import check_resources, launch
    from jobs.train.log import summary, waiting_summary
    from jobs.train.state import pretrained_network

    loading = replace(config.loading, data=absolute(config.loading.data))
    warmup_from, weights = config.optimization.warmup_from, config.optimization.network_weights
    optimization = replace(
        config.optimization,
        warmup_from=warmup_from and absolute(warmup_from),
        network_weights=weights and weights.resolve(),
    )
    output = absolute(config.output)
    config = replace(config, output=output, loading=loading, optimization=optimization)
    manifest = read_manifest(config.loading.data)
    check_data(config, manifest)
    check_warmup(config, manifest)
    if config.optimization.start_from:
        shipped_decoder(config.nets.network, config.nets.decoder_width)
    pretrained_network(config, manifest)  # so that what does not fit is one line here
    record = cli.record(config)
    content = describe_run(config, manifest, record)
    check_output(output, content)
    model = join(output, MODEL_NAME)
    if is_file(model):
        print(f"{model} is there already: nothing left to train")
        return
    check_training(output)
    if not os.environ.get("RAY_ADDRESS"):
        choose_device(config.resources.device)
    cli.connect_ray()
    check_resources(config.resources)
    with claimed_output(output, content) as run:
        cli.check_hosts(join(output, RUN_NAME), join(config.loading.data, MANIFEST_NAME))
        launch(config, record, run)
    print(summary(output), waiting_summary(output), sep="\n")
    print(f"trained nets: {model}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with its flags (`--help` lists them)."""
    train(cli.parse(TrainConfig, argv, __doc__ or "", PRESETS, {"network": "photos"}))


if __name__ == "__main__":
    cli.run(main)
