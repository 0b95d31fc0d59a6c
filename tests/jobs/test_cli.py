from dataclasses import dataclass, field

import pytest

from jobs.cli import check_bounds, option, parse


@dataclass(frozen=True, kw_only=True)
class Nets:
    net_width: int = option(24, help="channels", low=8, multiple_of=8)
    rate: float = option(0.1, help="per step", above=0, below=1)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    output: str = option(help="a folder")
    sides: tuple[int, ...] = option((), help="in pixels", low=1)
    limit: float | None = option(None, help="GiB", above=0)
    nets: Nets = field(default_factory=Nets)

    def __post_init__(self) -> None:
        check_bounds(self)


def test_groups_are_flat_flags() -> None:
    config = parse(Config, ["--output", "o", "--net-width", "16", "--sides", "3", "4"], "")
    assert config == Config(output="o", sides=(3, 4), nets=Nets(net_width=16))


def test_presets_reach_groups_and_flags_override_them() -> None:
    presets = {"small": {"net_width": 8, "rate": 0.5}}
    config = parse(Config, ["--output", "o", "--rate", "0.25"], "", presets)
    assert config.nets == Nets(rate=0.25)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--net-width 12", "--net-width 12 is out of range: at least 8, a multiple of 8"),
        ("--net-width 0", "--net-width 0 "),
        ("--rate 1", "--rate 1.0 is out of range: above 0, below 1"),
        ("--rate nan", "--rate nan "),
        ("--limit inf", "--limit inf "),
        ("--sides 4 0", "--sides 0 is out of range: at least 1"),
    ],
)
def test_a_value_out_of_range_is_a_usage_error(
    flags: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(Config, ["--output", "o", *flags.split()], "")
    assert fault in capsys.readouterr().err
