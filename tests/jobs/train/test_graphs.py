"""The part of a step that a GPU records."""

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.train.graphs import Recordings, StepSettings, compute_step
from jobs.train.trainer import LAG, Trainer
from model.controller import ControllerState
from model.settings import Objective
from model.step import Step, trainable
from pipeline.loading.loader import Batch
from tests.jobs.train.small import batches_for, config_for, new_trainer


class Reads(TorchDispatchMode):
    """Counts values that the host asks a tensor for, but for those of the given tensors."""

    def __init__(self, but: list[torch.Tensor]) -> None:
        super().__init__()
        self.but, self.count = {id(tensor) for tensor in but}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        waits = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        if func in waits and id(args[0]) not in self.but:
            self.count += 1
        return func(*args, **(kwargs or {}))


def adam_steps(trainer: Trainer) -> list[torch.Tensor]:
    """Adam's own step counts, which a CPU's optimizer reads itself."""
    optimizers = trainer.state.optimizers.values()
    return [values["step"] for optimizer in optimizers for values in optimizer.state.values()]


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("imitating", [{}, {"guide": True, "imitation_weight": 5.0}])
def test_no_step_asks_a_fresh_tensor_for_its_value(
    small_set: Path, imitating: dict, joint: bool
) -> None:
    trainer = new_trainer(config_for(small_set, log_interval=1, **imitating))
    batches = batches_for(trainer)
    for _ in range(trainer.warmup_steps):
        trainer.train_step(batches)
    batch = next(batches)
    trainer.state.controller = ControllerState(area_weight=1.0, accuracy=0.5, joint=True)
    trainer.adversarial_step(batch)
    trainer.state.controller = ControllerState(area_weight=1.0, accuracy=0.5, joint=joint)
    with Reads(adam_steps(trainer)) as reads:
        trainer.warmup_step(batch)
        trainer.adversarial_step(batch)
    assert reads.count == 0
    with Reads(adam_steps(trainer)) as reads:
        trainer.state.pending[0].values[0].item()
    assert reads.count == 1, "the counter counts"


@pytest.mark.parametrize("name", [field.name for field in fields(StepSettings)])
def test_settings_that_differ_in_any_field_are_another_recording(name: str) -> None:
    settings = StepSettings(total=16, half=False)
    others = {"total": 17, "half": True, "objective": Objective(), "joint": True, "probing": True}
    other = replace(settings, **{name: others[name]})  # type: ignore[arg-type]
    assert len({settings, other, replace(settings)}) == 2


def test_a_step_is_recorded_once_for_its_settings_and_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: a recording that computes as it is replayed stands in for a graph."""
    recorded = []

    class Recording:
        def __init__(self, settings: str, tensors: tuple[torch.Tensor, ...]) -> None:
            recorded.append((settings, *(tuple(tensor.shape) for tensor in tensors)))
            self.tensors = tuple(torch.zeros_like(tensor) for tensor in tensors)
            self.graph, self.step = self, Step(sums={"sum": torch.zeros(())})

        def replay(self) -> None:
            self.step.sums["sum"] = sum((t.sum() for t in self.tensors), torch.zeros(()))

    recordings = Recordings(lambda settings, tensors: Step(sums={}))
    monkeypatch.setattr(recordings, "record", Recording)
    for settings, size, value in (("a", 2, 1.0), ("a", 2, 3.0), ("b", 2, 1.0), ("a", 4, 1.0)):
        step = recordings.compute(settings, (torch.full((size,), value), torch.tensor(0.5)))
        assert float(step.sums["sum"]) == size * value + 0.5
    assert recorded == [("a", (2,), ()), ("b", (2,), ()), ("a", (4,), ())]


@pytest.fixture(params=[{}, {"guide": True, "imitation_weight": 5.0}])
def on_gpu(small_set: Path, request: pytest.FixtureRequest) -> tuple[Trainer, Iterator[Batch]]:
    """A trainer on a GPU just past its warm-up, and its further batches."""
    trainer = new_trainer(config_for(small_set, **request.param), torch.device("cuda"))
    batches = batches_for(trainer)
    for _ in range(trainer.warmup_steps + LAG):
        trainer.train_step(batches)
    return trainer, batches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_no_step_waits_for_the_gpu(on_gpu: tuple[Trainer, Iterator[Batch]]) -> None:
    trainer, batches = on_gpu
    batch = next(batches)
    balance = ControllerState(area_weight=1.0, accuracy=0.5)

    def each_kind_of_step() -> None:
        trainer.warmup_step(batch)
        for joint in (True, False):
            trainer.state.controller = replace(balance, joint=joint)
            trainer.adversarial_step(batch)

    each_kind_of_step()  # recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        each_kind_of_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(step: Step) -> list[torch.Tensor]:
    return [*(step.corruption_gradients or ()), *(step.classifier_gradients or ())]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_replayed_step_is_the_launched_one_with_the_weights_and_the_batch_of_now(
    on_gpu: tuple[Trainer, Iterator[Batch]],
) -> None:
    trainer, batches = on_gpu
    last = 0.0
    for number, batch in enumerate(islice(batches, 6)):
        objective, joint = trainer.objective, number % 2 == 0
        settings = StepSettings(batch.total, False, objective, joint, probing=True)
        weight = torch.tensor(1.0 + number, device=trainer.device)
        tensors = (*trainer.adversarial_tensors(batch), weight)
        replayed = trainer.compute(settings, tensors)
        launched = compute_step(trainer.nets, trainer.colours, settings, tensors)
        pairs = list(zip(gradients(replayed), gradients(launched), strict=True))
        nets = (trainer.state.corruption, trainer.state.classifier)[: 1 + joint]
        assert len(pairs) == sum(len(trainable(net)) for net in nets)
        for a, b in pairs:
            assert float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-7
        assert set(replayed.sums) == set(launched.sums)
        for name, value in launched.sums.items():
            near = 1.0 if "correct" in name else 1e-6  # a logit may fall on the other side
            assert float(replayed.sums[name]) == pytest.approx(float(value), rel=1e-3, abs=near)
        now = float(replayed.sums["corruption_loss"])
        assert now != last, "another batch, other weights"
        last = now
        trainer.adversarial_step(batch)
