import shutil
from pathlib import Path

import pytest
import torch

from jobs.runs import write_weights
from jobs.train.checkpoints import read_checkpoint, way_on, write_checkpoint
from jobs.train.state import TrainingError
from pipeline import storage
from pipeline.errors import UserError
from tests import remote
from tests.jobs.test_runs import damage, some_tensors
from tests.jobs.train.small import no_room
from tests.remote import Proxy


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept_and_the_newest_sound_one_is_read(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None
    assert "no checkpoint yet" in way_on(tmp_path)
    for step in (5, 10, 1_000_000):
        write_checkpoint(tmp_path, step, some_tensors(step), {"step": step}, keep=2)
    assert steps_kept(tmp_path) == [10, 1_000_000]
    assert way_on(tmp_path).endswith("the checkpoint of step 1000000")
    newest = read_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.numbers, newest.damaged) == ({"step": 1_000_000}, ())
    damage(Path(newest.folder, "state.safetensors"), "cut off")
    older = read_checkpoint(tmp_path)
    assert older is not None
    assert older.numbers == {"step": 10}
    assert torch.equal(older.tensors["net.weight"], some_tensors(10)["net.weight"])
    assert len(older.damaged) == 1
    assert "step-001000000/state.safetensors has" in older.damaged[0]
    damage(Path(older.folder, "state.json"), "cut off")
    with pytest.raises(TrainingError, match=r"no sound checkpoint is left .* another --output"):
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


def test_copies_that_a_user_makes_are_left_alone(tmp_path: Path) -> None:
    folder = Path(write_checkpoint(tmp_path, 5, some_tensors(), {"step": 5}, keep=2))
    backup = shutil.copytree(folder, folder.with_name(f"{folder.name}-backup"))
    assert way_on(tmp_path).endswith("the checkpoint of step 5")
    for step in (6, 7):
        write_checkpoint(tmp_path, step, some_tensors(), {"step": step}, keep=2)
    assert backup.is_dir()
    assert way_on(tmp_path).endswith("the checkpoint of step 7")


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
    write_weights(Path(folder, "state.json"), some_tensors(), {"format": 99})
    with pytest.raises(TrainingError, match="format 99; this program reads 1"):
        read_checkpoint(tmp_path)


def test_checkpoints_on_s3_appear_whole_or_not_at_all_and_old_ones_go(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "WAITS", (0.01,))
    run = remote.uri(proxy.endpoint, "checkpoints")
    assert read_checkpoint(run) is None
    for step in (5, 6, 7):
        write_checkpoint(run, step, some_tensors(step), {"step": step}, keep=2)
    for failing in (("PUT", "state.safetensors"), ("PUT", "state.json")):
        monkeypatch.setattr(
            proxy, "fault", lambda *call, failing=failing: 503 if call[:2] == failing else None
        )
        with pytest.raises(UserError, match="cannot be reached"):
            write_checkpoint(run, 8, some_tensors(8), {"step": 8}, keep=2)
        checkpoint = read_checkpoint(run)
        assert checkpoint is not None
        assert (checkpoint.numbers, checkpoint.damaged) == ({"step": 7}, ())
        assert torch.equal(checkpoint.tensors["net.weight"], some_tensors(7)["net.weight"])
    proxy.fault = lambda method, name, before: None
    write_checkpoint(run, 9, some_tensors(9), {"step": 9}, keep=2)
    kept = storage.entries(storage.join(run, "checkpoints"))[0]
    assert sorted(kept) == ["step-000000007", "step-000000009"]
    proxy.alter = lambda name, body, _: body[:-9] + bytes(9) if "tensors" in name else body
    with pytest.raises(TrainingError, match="no sound checkpoint is left"):
        read_checkpoint(run)
