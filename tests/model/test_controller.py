import pytest

from model.controller import ControllerConfig, ControllerState, relative_target, update

CONFIG = ControllerConfig(target=0.1, rate=0.01, smoothing=0.9)


def test_accuracy_above_the_target_lowers_lambda_and_trains_the_corruption_net_alone() -> None:
    state = ControllerState(area_weight=2.0, accuracy=0.1, joint=True)
    state = update(state, CONFIG, correct=30, count=100)
    assert state.accuracy == pytest.approx(0.9 * 0.1 + 0.1 * 0.3)
    assert state.area_weight == pytest.approx(2.0 * 0.99)
    assert not state.joint


def test_accuracy_below_the_target_raises_lambda_and_trains_both() -> None:
    state = ControllerState(area_weight=2.0, accuracy=0.1)
    state = update(state, CONFIG, correct=0, count=100)
    assert state.accuracy == pytest.approx(0.09)
    assert state.area_weight == pytest.approx(2.02)
    assert state.joint


def test_the_gate_follows_the_batch_while_lambda_follows_the_running_accuracy() -> None:
    state = update(ControllerState(area_weight=1.0, accuracy=0.5), CONFIG, correct=0, count=10)
    assert state.joint
    assert state.area_weight == pytest.approx(0.99)


def test_a_batch_exactly_at_the_target_trains_both() -> None:
    assert update(ControllerState(area_weight=1.0, accuracy=0.1), CONFIG, 1, 10).joint


def test_lambda_stays_positive_and_finite_in_a_thousand_one_sided_steps() -> None:
    for correct in (0.0, 10.0):
        state = ControllerState(area_weight=1.0, accuracy=correct / 10)
        for _ in range(1000):
            state = update(state, CONFIG, correct, 10)
        assert 4e-5 < state.area_weight < 3e4


def test_control_settles_where_a_falling_response_meets_the_target() -> None:
    """A stand-in for the nets: the accuracy rises with lambda, as masks shrink."""
    state = ControllerState(area_weight=0.01, accuracy=0.0)
    config = ControllerConfig(target=0.3)
    for _ in range(3000):
        accuracy = state.area_weight / (1 + state.area_weight)
        state = update(state, config, accuracy * 1000, 1000)
    assert state.accuracy == pytest.approx(0.3, abs=0.03)


def test_relative_target_lies_between_chance_and_the_clean_accuracy() -> None:
    assert relative_target(0.125, 0.925, 0.5) == pytest.approx(0.525)
    assert relative_target(0.2, 0.9, 0.0) == pytest.approx(0.2)


@pytest.mark.parametrize("bad", [{"target": 0.0}, {"target": 1.0}, {"target": 0.5, "rate": 0.0}])
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must lie"):
        ControllerConfig(**bad)


def test_an_empty_step_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        update(ControllerState(area_weight=1.0, accuracy=0.1), CONFIG, 0, 0)
