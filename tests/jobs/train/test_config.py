import pytest

from jobs.cli import parse
from jobs.loading import LoadingConfig
from jobs.train.config import PRESETS, REMEDIES, TrainConfig
from model.collapse import TEXTS
from model.settings import Objective
from tests.jobs.train.small import config_for


def parsed(*flags: str) -> TrainConfig:
    return parse(TrainConfig, ["--data", "d", "--output", "o", *flags], "", PRESETS)


def test_presets_fill_what_is_not_given_and_flags_win() -> None:
    defaults = TrainConfig(loading=LoadingConfig(data="d"), output="o")
    assert parsed() == parsed("--preset", "small") == defaults
    paper = parsed("--preset", "paper")
    assert (paper.balance.target, paper.balance.area_start) == (0.1, 0.35)
    assert (paper.objective.area_power, paper.objective.clean_weight) == (1, 0.0)
    assert (paper.optimization.averaging, paper.nets.logit_limit) == (0.0, 0.0)
    assert parsed("--prese", "paper") == paper, "flags may be shortened"
    mixed = parsed("--target", "0.3", "--preset=paper", "--clean-weight", "1")
    assert (mixed.balance.target, mixed.objective.area_power) == (0.3, 1)
    assert mixed.objective.clean_weight == 1.0
    photos = ("--network", "n", "--preset", "photos")
    assert parsed(*photos).nets.sides == (224, 320)
    assert parsed(*photos, "--sides", "128", "--sides", "160").nets.sides == (128, 160)
    with pytest.raises(SystemExit):
        parsed("--preset", "worst")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--net-width", "20"),
        ("--area-power", "3"),
        ("--workers", "3:2"),
        ("--keep-checkpoints", "1"),
    ],
)
def test_settings_out_of_range_are_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(flag, value)
    assert f"{flag} {value} is out of range" in capsys.readouterr().err.splitlines()[-1]


def test_the_ablations_reach_the_objective() -> None:
    flags = {"gumbel_noise": False, "confusion": "true-logit", "imitation_weight": 3.0}
    objective = config_for("shards", area_power=1, clean_weight=0.5, **flags).objective.objective()
    assert objective == Objective("true-logit", 1, 0.5, 3.0, soft=True)


def test_every_sign_of_a_collapse_has_a_remedy() -> None:
    assert REMEDIES.keys() == TEXTS.keys()
