"""Real gloo processes: what ranks compute together equals what one computes alone."""

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jobs.loading import LoadingConfig
from jobs.runs import ModelConfig
from jobs.train.collectives import check_ranks, on_first_rank, reduce_step
from jobs.train.config import TrainConfig
from jobs.train.state import TrainingError, TrainingState, apply_gradients, new_state
from model.classifier import Classifier
from model.controller import ControllerState, update
from model.corruption import CorruptionNet
from model.masking import gumbel_difference
from model.settings import Objective
from model.step import Inputs, Step, TrainingNets, adversarial_step, clean_step

pytestmark = pytest.mark.slow
IMAGES = 8
SPLITS = {1: [8], 2: [4, 4], 3: [1, 5, 2]}


def _enter(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    works = (two_steps, agreement)
    results = {work.__name__: work(rank, ranks) for work in works}
    dist.destroy_process_group()
    results[without_the_group.__name__] = without_the_group(ranks)
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each function below returns on every rank, each a process of one gloo group."""
    get_context("forkserver").set_forkserver_preload([__name__])  # imported once for all
    by_ranks = {}
    for ranks in SPLITS:
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        mp.start_processes(_enter, (ranks, str(folder)), nprocs=ranks, start_method="forkserver")
        by_ranks[ranks] = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    return by_ranks


def two_steps(rank: int, ranks: int) -> dict[str, Any]:
    """A warm-up step and two joint adversarial ones on this rank's uneven part of a batch."""
    torch.manual_seed(0)
    corruption, classifier = CorruptionNet((32, 32), 8, 16).double(), Classifier(3, 8).double()
    nets = TrainingNets(corruption, classifier, classifier)
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3) for net in (corruption, classifier)]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
    segments = torch.randint(0, 16, (IMAGES, 32, 32), generator=generator)
    labels = torch.randint(0, 3, (IMAGES,), generator=generator)
    first = sum(SPLITS[ranks][:rank])
    part = slice(first, first + SPLITS[ranks][rank])
    state = ControllerState(area_weight=1.0, accuracy=0.3)
    step = reduce_step(clean_step(classifier, images[part], labels[part], IMAGES), ranks)
    apply_gradients(classifier, optimizers[1], step.classifier_gradients, 1e-3)
    for _ in range(2):
        noise = gumbel_difference((IMAGES, 16), generator).double()
        batch = Inputs(images[part], segments[part], labels[part], noise[part], IMAGES)
        weight = torch.tensor(state.area_weight)
        step = reduce_step(adversarial_step(nets, batch, Objective(), weight, joint=True), ranks)
        apply_gradients(corruption, optimizers[0], step.corruption_gradients, 1e-3)
        apply_gradients(classifier, optimizers[1], step.classifier_gradients, 1e-3)
        state = update(state, float(step.sums["correct"]), IMAGES, target=0.4, rate=0.006)
    parameters = (*corruption.parameters(), *classifier.parameters())
    return {
        "weights": torch.cat([p.detach().flatten() for p in parameters]),
        "sums": {name: float(value) for name, value in step.sums.items()},
        "controller": (state.area_weight, state.accuracy, state.joint),
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_parts_of_a_batch_equal_one_rank_with_the_whole_and_each_other(
    ranks: int, results: dict[int, list[dict[str, Any]]]
) -> None:
    alone = results[1][0]["two_steps"]
    together = [result["two_steps"] for result in results[ranks]]
    for result in together:
        torch.testing.assert_close(result["weights"], alone["weights"], rtol=1e-7, atol=1e-9)
        assert result["sums"] == pytest.approx(alone["sums"], rel=1e-9)
        assert result["controller"] == alone["controller"]
        assert torch.equal(result["weights"], together[0]["weights"]), "to the last bit"


def small_state() -> TrainingState:
    """The state of small nets before their first step."""
    model = ModelConfig(
        classes=("a", "b"),
        class_names=("a", "b"),
        height=32,
        width=32,
        net_width=8,
        bottleneck=16,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        superpixels=16,
        compactness=10.0,
    )
    config = TrainConfig(loading=LoadingConfig(data="shards"), output="run")
    return new_state(config, model, torch.device("cpu"))


def agreement(rank: int, ranks: int) -> list[str]:
    """Return each rank's errors where all are alike, where rank 1 has another lambda, where the
    last rank has another bit in one weight, and where rank 0 cannot write."""
    state = small_state()
    sound = state.controller = ControllerState(area_weight=1.25, accuracy=0.3)
    errors = []

    def collect(check: Callable[[], None]) -> None:
        try:
            check()
        except TrainingError as error:
            errors.append(str(error))
        else:
            errors.append("")

    collect(lambda: check_ranks(state, ranks))
    if rank == 1:
        state.controller = ControllerState(area_weight=1.5, accuracy=0.3)
    collect(lambda: check_ranks(state, ranks))
    state.controller = sound
    if rank == ranks - 1:
        weight = next(state.classifier.parameters()).detach()
        weight.view(torch.int32)[0, 0, 0, 0] ^= 1
    collect(lambda: check_ranks(state, ranks))

    def fail() -> None:
        raise OSError(28, "No space left on device", "run/x")

    collect(lambda: on_first_rank(fail, "the checkpoint of step 3", ranks))
    return errors


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_no_longer_agree_all_stop_and_show_both_states(
    ranks: int, results: dict[int, list[dict[str, Any]]]
) -> None:
    errors = [result["agreement"] for result in results[ranks]]
    assert errors == [errors[0]] * ranks
    alike, controller, weight, disk = errors[0]
    assert alike == ""
    for rank, area_weight in enumerate((1.25, 1.5)):
        assert f"rank {rank}: step 0, ControllerState(area_weight={area_weight}" in controller
    hashes = [part.split()[0].strip(";)") for part in weight.split("weights ")[1:]]
    assert len(hashes) == ranks
    assert len(set(hashes)) == 2
    assert disk.startswith(
        "the checkpoint of step 3 cannot be written: No space left on device (run/x). Make room"
    )


def without_the_group(ranks: int) -> dict[str, bool]:
    """Return which of the common works a rank refuses once the group has ended, as Ray Train ends
    it before it stops the ranks: they must not train on or write alone."""
    step = Step(sums={"correct": torch.ones(())})
    works: dict[str, Callable[[], object]] = {
        "step": lambda: reduce_step(step, ranks),
        "state": lambda: check_ranks(small_state(), ranks),
        "writing": lambda: on_first_rank(lambda: None, "a file", ranks),
    }
    refused = dict.fromkeys(works, False)
    for name, work in works.items():
        try:
            work()
        except ValueError:
            refused[name] = True
    return refused


@pytest.mark.parametrize("ranks", SPLITS)
def test_no_rank_of_several_goes_on_once_their_group_has_ended(
    ranks: int, results: dict[int, list[dict[str, Any]]]
) -> None:
    refused = [result["without_the_group"] for result in results[ranks]]
    assert refused == [dict.fromkeys(("step", "state", "writing"), ranks > 1)] * ranks
