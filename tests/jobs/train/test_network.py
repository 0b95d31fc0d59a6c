"""Training over a pretrained network that knows none of the set's classes."""

from pathlib import Path

import pytest
import torch

from jobs.runs import load_nets, net_tensors, save_nets
from jobs.shipped import shipped_decoder
from jobs.train.config import TrainConfig
from jobs.train.state import finished_nets
from jobs.train.worker import resume, write_state
from model.decoder import FeatureCorruptionNet
from model.pretrained import PretrainedClassifier
from pipeline.errors import UserError
from tests.jobs.train.small import (
    assert_same_state,
    config_for,
    new_trainer,
    state_of,
    train_epochs,
    train_steps,
)

pytest.importorskip("efficientnet_lite_pytorch", reason="pip install '.[photos]'")


def network_config(data: Path, **changes: object) -> TrainConfig:
    flags = {
        "network": "efficientnet-lite0",
        "sides": 64,
        "co_trained": "last",
        "imitation_weight": 5,
        "gumbel_noise": False,
        "target": 0.9,  # so that some steps are joint
        "warmup_epochs": 1,
        "epochs": 1,
    }
    return config_for(data, **(flags | changes))


def test_the_warm_up_trains_a_new_head_and_the_decoder_then_the_last_stages_train(
    small_set: Path, tmp_path: Path
) -> None:
    trainer = new_trainer(network_config(small_set))
    state = trainer.state
    assert isinstance(state.classifier, PretrainedClassifier)

    def copied() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in net_tensors(state.nets()).items()}

    def changed(before: dict[str, torch.Tensor]) -> set[str]:
        after = net_tensors(state.nets())
        return {name for name in before if not torch.equal(before[name], after[name])}

    start = copied()
    train_epochs(trainer, 1)
    first = changed(start)
    head = {name for name in start if name.startswith("classifier.")}
    assert len(head) == 2, "weight and bias of the head alone"
    assert {name for name in first if name.startswith("classifier.")} == head
    assert any(name.startswith("corruption.decoder.") for name in first)
    clean = {name for name in first if name.startswith("clean_classifier.")}
    assert {name.removeprefix("clean_") for name in clean} == head
    middle = copied()
    train_epochs(trainer, 1)
    second = changed(middle)
    assert not any(name.startswith("clean_classifier.") for name in second)
    trained = {name for name in middle if name.startswith("classifier.")}
    assert len(trained) > 2
    assert trained <= second

    nets = finished_nets(state, trainer.model)
    save_nets(tmp_path, nets, {})
    read = load_nets(tmp_path)
    images = torch.randn(2, 3, trainer.model.height, trainer.model.width)
    for name, net in read.modules().items():
        torch.testing.assert_close(net(images), nets.modules()[name](images), rtol=0, atol=0)
    accurate = load_nets(tmp_path, accurate=True).corruption
    assert isinstance(accurate, FeatureCorruptionNet)
    assert accurate.looks == trainer.model.rule
    megabytes = (tmp_path / "model" / "model.safetensors").stat().st_size / 1e6
    assert megabytes < 1.95 * 4 * 4.6, "the frozen stages are kept once"


@pytest.mark.parametrize("stop", [2, 6])
def test_a_training_over_a_network_resumes_to_the_last_bit(
    small_set: Path, tmp_path: Path, stop: int
) -> None:
    config = network_config(small_set, output=tmp_path)
    whole = new_trainer(config)
    train_steps(whole, 7)
    first, second = new_trainer(config), new_trainer(config)
    train_steps(first, stop)
    write_state(first)
    resume(second)
    train_steps(second, 7 - stop)
    assert_same_state(second, state_of(whole))


def test_flags_that_contradict_a_network_are_refused(
    small_set: Path, capsys: pytest.CaptureFixture
) -> None:
    contradictions: tuple[dict, ...] = (
        *({"network": None}, {"sides": None}, {"guide": True}, {"logit_limit": 0}),
        {"warmup_from": "run"},
        {"network": None, "sides": None, "co_trained": "all", "network_weights": "file"},
    )
    for changes in contradictions:
        with pytest.raises(SystemExit):
            network_config(small_set, **changes)
        assert "--network" in capsys.readouterr().err
    with pytest.raises(UserError, match="efficientnet-lite9"):
        new_trainer(network_config(small_set, network="efficientnet-lite9"))


def test_a_training_on_other_classes_begins_with_the_shipped_decoder(small_set: Path) -> None:
    state = new_trainer(network_config(small_set, start_from="shipped")).state
    shipped = shipped_decoder("efficientnet-lite0", 96)
    for net in (state.corruption, state.corruption_average):
        assert isinstance(net, FeatureCorruptionNet)
        own = net.decoder.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in shipped.items())
    with pytest.raises(UserError, match="--decoder-width 96"):
        new_trainer(network_config(small_set, start_from="shipped", decoder_width=16))
