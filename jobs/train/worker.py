"""The function that every Ray Train worker runs: from the last checkpoint to the trained nets."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch

from jobs.pictures import encode_png
from jobs.runs import save_nets
from jobs.train.box_rule import agreement, choose_rule, training_images
from jobs.train.checkpoints import FAULT_NAME, REQUEST_NAME, read_checkpoint, write_checkpoint
from jobs.train.checks import check_own, check_same_data
from jobs.train.cluster import Notices
from jobs.train.collectives import check_ranks, on_first_rank
from jobs.train.config import TrainConfig
from jobs.train.examples import Examples, draw_examples, load_examples
from jobs.train.log import TrainingLog
from jobs.train.state import TrainingError, fill_state, finished_nets, state_numbers, state_tensors
from jobs.train.trainer import Trainer
from pipeline.errors import UserError
from pipeline.loading.cache import NoRoomError
from pipeline.loading.loader import Loader
from pipeline.loading.order import Order
from pipeline.loading.resident import Resident, fits
from pipeline.shards.format import read_manifest
from pipeline.storage import UnreachableError, is_file, join, read_bytes, write_atomically


def resume(trainer: Trainer) -> list[str]:
    """Go on from the newest sound checkpoint of the run, where there is one. Returns notes for the
    log, none without a checkpoint. Raises TrainingError where all are damaged."""
    checkpoint = read_checkpoint(trainer.config.output)
    if checkpoint is None:
        return []
    fill_state(trainer.state, checkpoint.tensors, checkpoint.numbers)
    trainer.choose_trained()
    damaged = [f"damaged checkpoint not used: {text}" for text in checkpoint.damaged]
    return [*damaged, f"went on from the checkpoint of step {trainer.state.step}"]


def write_state(trainer: Trainer, examples: Examples | None = None) -> None:
    """Write a checkpoint, of weights that are finite and the same on all ranks, and a picture of
    the example images where this rank has them."""
    state, config = trainer.state, trainer.config
    trainer.check_weights()
    check_ranks(state, trainer.ranks)

    def write() -> None:
        tensors, numbers = state_tensors(state), state_numbers(state)
        keep = config.logging.keep_checkpoints
        write_checkpoint(config.output, state.step, tensors, numbers, keep)
        if trainer.log is not None and examples is not None and not trainer.warming_up:
            picture = draw_examples(examples, state.corruption_average, trainer.model)
            trainer.log.picture(state.step, picture, encode_png(picture))
        if trainer.log is not None:
            trainer.log.upload()

    on_first_rank(write, f"the checkpoint of step {state.step}", trainer.ranks)
    trainer.asked, trainer.kept = False, state.step


def run_training(config: TrainConfig, record: dict[str, Any], run: Mapping[str, Any]) -> None:
    """Train as one of Ray Train's ranks and, on rank 0, save the nets with `record`. run: what
    RUN/run.json says."""
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loading, optimization = config.loading, config.optimization
    check_same_data(loading.data, run)
    manifest = read_manifest(loading.data)
    trainer = Trainer(config, manifest, device, ranks)
    notes = resume(trainer)
    if optimization.warmup_from is not None and not notes:
        trainer.take_warmup(optimization.warmup_from)
        notes = [f"began with the clean classifier of {optimization.warmup_from}"]
    check_ranks(trainer.state, ranks)
    examples = None
    if rank == 0:
        trainer.log = TrainingLog(config.output, trainer.read_step)
        trainer.log.notes += notes
        examples = load_examples(loading, manifest, device)
    order = Order(
        batch_size=optimization.batch_size, seed=optimization.seed, window=loading.window(manifest)
    )
    loader = Loader(loading.data, manifest, device, loading.cache_config())
    resident = config.resources.resident
    if resident is None:
        resident = fits(manifest, device)
    batches = (Resident.read(loader) if resident else loader).train(
        order, loading.augmentation(), start=trainer.position, rank=rank, ranks=ranks
    )
    check_folder = partial(check_own, config.output, run)
    notices = Notices(rank, join(config.output, REQUEST_NAME))
    trainer.due = notices.due
    while trainer.state.step < trainer.steps:
        trainer.train_step(batches)
        if trainer.at_checkpoint:
            on_first_rank(check_folder, f"the checkpoint of step {trainer.state.step}", ranks)
            write_state(trainer, examples)
            notices.done()
    if trainer.log is not None:
        trainer.log.close()

    def save() -> None:
        check_folder()
        nets, content = finished_nets(trainer.state, trainer.model), record
        if config.nets.network is not None and config.nets.rule is None:
            agreements = agreement(nets, training_images(loading, manifest, device))
            nets = replace(nets, config=replace(nets.config, rule=choose_rule(agreements)))
            content = record | {"rule_agreement": agreements}
        save_nets(config.output, nets, content)

    on_first_rank(save, "the trained nets", ranks)


def train_worker(config: TrainConfig, record: dict[str, Any], run: Mapping[str, Any]) -> str | None:
    """Run a rank's training. A TrainingError, which all ranks meet at the same step, ends the run
    without another attempt: its message is returned. So does a UserError, which a rank may meet
    alone: it leaves its message to the next attempt. Anything else is to recover from."""
    fault = join(config.output, FAULT_NAME)
    if is_file(fault):
        return read_bytes(fault).decode()
    try:
        run_training(config, record, run)
    except TrainingError as error:
        return str(error)
    except UserError as error:
        if not isinstance(error, UnreachableError | NoRoomError):  # which may pass
            write_atomically(fault, str(error).encode())
        raise
    return None
