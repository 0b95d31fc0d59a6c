import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from jobs.runs import DamagedError, read_weights, tensors_path, write_weights
from jobs.train.checkpoints import read_checkpoint, write_checkpoint


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


def test_a_safetensors_file_of_foreign_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_weights(path, some_tensors(), {})
    (tmp_path / "y.json").write_bytes(path.read_bytes())
    tensors_path(path).write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    with pytest.raises(DamagedError, match="bytes instead of"):
        read_weights(path)


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept_and_the_newest_sound_one_is_read(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None
    for step in (5, 10, 1_000_000):
        write_checkpoint(tmp_path, step, some_tensors(step), {"step": step}, keep=2)
    assert steps_kept(tmp_path) == [10, 1_000_000]
    newest = read_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.numbers, newest.damaged) == ({"step": 1_000_000}, ())
    damage(newest.folder / "state.safetensors", "cut off")
    older = read_checkpoint(tmp_path)
    assert older is not None
    assert older.numbers == {"step": 10}
    assert torch.equal(older.tensors["net.weight"], some_tensors(10)["net.weight"])
    assert len(older.damaged) == 1
    assert "step-001000000/state.safetensors has" in older.damaged[0]
    damage(older.folder / "state.json", "cut off")
    with pytest.raises(DamagedError, match="no sound checkpoint is left"):
        read_checkpoint(tmp_path)


def test_a_checkpoint_whose_writing_was_cut_off_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, some_tensors(), {"step": 5}, keep=2)
    write_checkpoint(tmp_path, 6, some_tensors(), {"step": 6}, keep=2)
    (tmp_path / "checkpoints" / "step-000000006" / "state.json").unlink()
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.numbers, checkpoint.damaged) == ({"step": 5}, ())
    write_checkpoint(tmp_path, 7, some_tensors(), {"step": 7}, keep=2)
    assert steps_kept(tmp_path) == [5, 7], "leftovers go"


@contextmanager
def no_room() -> Iterator[None]:
    """No file of this process, its output too, may grow past 600 bytes: a write fails as on a full
    disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_there_is_no_room_the_older_checkpoint_stays(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, some_tensors(), {"step": 5}, keep=2)
    with no_room(), pytest.raises(OSError, match="too large"):
        write_checkpoint(tmp_path, 6, some_tensors(), {"step": 6}, keep=2)
    assert steps_kept(tmp_path) == [5]
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.numbers == {"step": 5}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 5, some_tensors(), {}, keep=2)
    write_weights(folder / "state.json", some_tensors(), {"format": 99})
    with pytest.raises(DamagedError, match="format 99; this program reads 1"):
        read_checkpoint(tmp_path)


def test_weights_are_readable_without_this_program(tmp_path: Path) -> None:
    """The format's own layout: 8 bytes of length, a JSON header, raw little-endian floats."""
    write_weights(tmp_path / "x.json", {"a": torch.tensor([1.5, -2.0])}, {})
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header["a"]["dtype"] == "F32"
    first, last = header["a"]["data_offsets"]
    assert data[8 + length :][first:last] == b"\x00\x00\xc0\x3f\x00\x00\x00\xc0"
