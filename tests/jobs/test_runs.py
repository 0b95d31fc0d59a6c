import json
import shutil
from pathlib import Path

import pytest
import torch

from jobs.runs import (
    DamagedError,
    exclusive_run,
    load_nets,
    read_config,
    read_weights,
    write_weights,
)
from pipeline.errors import UserError


def some_tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    image = torch.arange(120.0).view(1, 2, 3, 20) + value
    return {"net.weight": image.to(memory_format=torch.channels_last), "step": torch.tensor(7.0)}


def test_tensors_and_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    content = {"lambda": 0.1 + 0.2, "list": [1, None, "\u00e9"], "tiny": 5e-324}
    write_weights(tmp_path / "a" / "x.json", some_tensors(), content)
    tensors, read = read_weights(tmp_path / "a" / "x.json")
    assert {name: read[name] for name in content} == content
    assert tensors.keys() == some_tensors().keys()
    assert all(torch.equal(tensors[name], value) for name, value in some_tensors().items())


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif how == "a bit changed":
        data[len(data) * 3 // 4] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("file", ["x.json", "x.safetensors"])
@pytest.mark.parametrize("how", ["cut off", "a bit changed", "gone"])
def test_damage_to_either_file_is_found_and_named(tmp_path: Path, file: str, how: str) -> None:
    write_weights(tmp_path / "x.json", some_tensors(), {"step": 12345678})
    damage(tmp_path / file, how)
    with pytest.raises(DamagedError, match=file.replace(".", r"\.")):
        read_weights(tmp_path / "x.json")


def test_no_byte_of_the_json_may_change(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_weights(path, some_tensors(), {"step": 1})
    whole = path.read_bytes()
    for position in range(len(whole)):
        if not chr(whole[position]).isspace():
            changed = bytearray(whole)
            changed[position] ^= 1
            path.write_bytes(changed)
            with pytest.raises(DamagedError):
                read_weights(path)


def test_a_runs_configuration_is_read_without_its_weights(random_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(random_run, tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    weights.unlink()
    assert read_config(run) == load_nets(random_run).config
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_nets(run)
    (run / "model" / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.json is not what was written"):
        read_config(run)
    with pytest.raises(UserError, match=r"jobs\.train .* --output"):
        read_config(tmp_path)


@pytest.mark.parametrize("change", [{"novel": 3}, {"bottleneck": 7}])
def test_nets_of_another_version_are_named(
    change: dict[str, int], random_run: Path, tmp_path: Path
) -> None:
    tensors, content = read_weights(random_run / "model/model.json")
    content["config"] |= change
    write_weights(tmp_path / "model/model.json", tensors, content)
    with pytest.raises(UserError, match=r"model\.json describes other nets than this version"):
        load_nets(tmp_path)


def test_a_run_without_nets_tells_whether_and_how_far_it_trains(tmp_path: Path) -> None:
    with exclusive_run(tmp_path):
        with pytest.raises(UserError, match="still training, before the first line"):
            read_config(tmp_path)
        lines = [json.dumps({"step": step, "steps": 90}) for step in (20, 40)]
        (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "null", '{"step": 6']))
        with pytest.raises(UserError, match="still training, at step 40 of 90; wait"):
            load_nets(tmp_path)
        with (
            pytest.raises(UserError, match=r"another process trains in .* step 40 of 90"),
            exclusive_run(tmp_path),
        ):
            pass
    (tmp_path / "run.json").touch()
    with pytest.raises(UserError, match=r"stopped at step 40 of 90; the same jobs\.train"):
        read_config(tmp_path)
