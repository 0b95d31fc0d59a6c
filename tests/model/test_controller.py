import pytest

from model.controller import ControllerState, relative_target, update

BALANCE = {"target": 0.1, "rate": 0.01}


def test_accuracy_above_the_target_lowers_lambda_and_trains_the_corruption_net_alone() -> None:
    state = ControllerState(area_weight=2.0, accuracy=0.1, joint=True)
    state = update(state, 30, 100, **BALANCE)
    assert state.accuracy == pytest.approx(0.95 * 0.1 + 0.05 * 0.3)
    assert state.area_weight == pytest.approx(2.0 * 0.99)
    assert not state.joint


def test_accuracy_below_the_target_raises_lambda_and_trains_both() -> None:
    state = ControllerState(area_weight=2.0, accuracy=0.1)
    state = update(state, 0, 100, **BALANCE)
    assert state.accuracy == pytest.approx(0.095)
    assert state.area_weight == pytest.approx(2.02)
    assert state.joint


def test_the_gate_follows_the_batch_while_lambda_follows_the_running_accuracy() -> None:
    state = update(ControllerState(area_weight=1.0, accuracy=0.5), 0, 10, **BALANCE)
    assert state.joint
    assert state.area_weight == pytest.approx(0.99)


def test_a_batch_exactly_at_the_target_trains_both() -> None:
    assert update(ControllerState(area_weight=1.0, accuracy=0.1), 1, 10, **BALANCE).joint


def test_lambda_stays_positive_and_finite_in_a_thousand_one_sided_steps() -> None:
    for correct in (0.0, 10.0):
        state = ControllerState(area_weight=1.0, accuracy=correct / 10)
        for _ in range(1000):
            state = update(state, correct, 10, **BALANCE)
        assert 4e-5 < state.area_weight < 3e4


def test_control_settles_where_a_falling_response_meets_the_target() -> None:
    """A stand-in for the nets: the accuracy rises with lambda, as masks shrink."""
    state = ControllerState(area_weight=0.01, accuracy=0.0)
    for _ in range(3000):
        accuracy = state.area_weight / (1 + state.area_weight)
        state = update(state, accuracy * 1000, 1000, target=0.3, rate=0.006)
    assert state.accuracy == pytest.approx(0.3, abs=0.03)


def test_relative_target_lies_between_chance_and_the_clean_accuracy() -> None:
    assert relative_target(0.125, 0.925, 0.5) == pytest.approx(0.525)
    assert relative_target(0.2, 0.9, 0.0) == pytest.approx(0.2)


def test_lambda_falls_to_its_least_and_no_further() -> None:
    state = ControllerState(area_weight=1.0, least=0.1, accuracy=1.0)
    for _ in range(300):
        state = update(state, 10, 10, **BALANCE)
    assert state.area_weight == state.least == 0.1
    assert update(state, 0, 10, **BALANCE | {"target": 0.99}).area_weight == pytest.approx(0.101)
