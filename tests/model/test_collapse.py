import pytest

from model.collapse import TEXTS, CollapseState, watch


def after(steps: int, **numbers: object) -> CollapseState:
    state = CollapseState()
    options: dict = {"accuracy": 0.5, "count": 64, "classes": 8, "target": 0.5}
    options |= {"area": 0.3, "joint": None} | numbers
    for _ in range(steps):
        state = watch(state, **options)
    return state


@pytest.mark.parametrize(
    ("numbers", "sign"),
    [
        ({"area": 0.99}, "full"),
        ({"area": 0.001}, "empty"),
        ({"joint": False}, "closed"),
        ({"joint": True}, "open"),
        ({"accuracy": 0.13}, "chance"),
        ({"accuracy": 0.13, "area": None, "target": None}, "chance"),
        ({"accuracy": 0.2}, None),
        ({"area": 0.9}, None),
        ({"area": 0.01}, None),
    ],
)
def test_each_sign_is_counted_from_its_first_step(numbers: dict, sign: str | None) -> None:
    state = after(40, **numbers)
    expected = dict.fromkeys(TEXTS, 0) | ({sign: 40} if sign else {})
    assert {name: getattr(state, name) for name in TEXTS} == expected
    assert state.signs(40) == ([sign] if sign else [])
    assert state.signs(41) == []


def test_a_gate_that_moves_is_not_stuck() -> None:
    state = CollapseState()
    for step in range(1000):
        state = watch(
            state, accuracy=0.5, count=64, classes=8, target=0.5, area=0.3, joint=step % 40 == 0
        )
        assert not state.signs(100)


def test_a_sign_that_goes_is_counted_anew() -> None:
    state = after(30, area=0.99)
    numbers: dict = {"accuracy": 0.5, "count": 64, "classes": 8, "target": 0.5, "joint": None}
    while state.full:
        state = watch(state, area=0.0, **numbers)
    for _ in range(100):
        state = watch(state, area=1.0, **numbers)
    assert 0 < state.full < 100


def test_chance_depends_on_how_many_images_the_mean_is_worth() -> None:
    """64 images a step, of which the running mean is worth 39 steps: .125 +- .0066."""
    assert after(1, accuracy=0.144).chance == 1
    assert after(1, accuracy=0.146).chance == 0
    assert after(1, accuracy=0.144, count=6400).chance == 0


def test_an_accuracy_at_chance_is_no_sign_where_it_is_the_target() -> None:
    assert after(10, accuracy=0.13, target=0.14).chance == 0
    assert after(10, accuracy=0.13, target=0.2).chance == 10
