import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import cli
from jobs.preprocess.__main__ import main, problem_lines
from pipeline.errors import UserError
from pipeline.shards.make import Progress, preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.shards.verify import Verification, repair, verify
from pipeline.synthetic import SyntheticConfig, write_synthetic
from tests import remote

Damage = Callable[[Path], object]
PREFIX = "train/train-000001"


def quiet(progress: Progress) -> None:
    assert progress.done <= progress.total


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "images"
    write_synthetic(folder, SyntheticConfig(train_images=60, val_images=20))
    (folder / "val" / "ILSVRC2012_val_00000003.JPEG").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def sound(images: Path, ray_local: None) -> Path:
    output = images.parent / "shards"
    config = PreprocessConfig(
        source=str(images),
        output=str(output),
        image_size=32,
        superpixels=25,
        samples_per_shard=20,
        max_bad_share=0.1,
    )
    preprocess(config, quiet, cli.connect_ray)
    return output


@pytest.fixture
def output(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def check(output: Path) -> Verification:
    return verify(str(output), None, quiet, cli.connect_ray)


def flip(path: Path, position: int) -> None:
    """One bit of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def state(output: Path) -> dict[str, tuple[int, int, bytes]]:
    """What changes where a file is written again, and its bytes."""
    return {
        str(path.relative_to(output)): (
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            path.read_bytes(),
        )
        for path in output.rglob("*")
        if path.is_file()
    }


def rewrite_part(path: Path, column: str, value: object) -> None:
    """Change the first row's value in a part and keep its facts."""
    table = pq.read_table(path, partitioning=None)
    rows = table.to_pylist()
    rows[0][column] = value
    pq.write_table(type(table).from_pylist(rows, table.schema), path)


def manifest_with(output: Path, **changes: object) -> None:
    path = output / "dataset.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes, indent=1, sort_keys=True) + "\n")


def test_a_sound_set_is_sound_and_stays_untouched(output: Path) -> None:
    before = state(output)
    found = check(output)
    assert found.is_sound
    assert sum(check.decoded for check in found.shards.values()) == 4 * 8
    assert sum(c.totals.rejected for c in found.shards.values() if c.totals) == 1
    repair(found, "", None, quiet)
    assert state(output) == before


SHARD_DAMAGE: dict[str, tuple[Damage, str]] = {
    "a bit of the shard": (lambda o: flip(o / f"{PREFIX}.tar", 5000), "its SHA-256 is not"),
    "a shard cut off": (
        lambda o: (o / f"{PREFIX}.tar").write_bytes((o / f"{PREFIX}.tar").read_bytes()[:3000]),
        "its SHA-256 is not",
    ),
    "an empty shard": (lambda o: (o / f"{PREFIX}.tar").write_bytes(b""), "its SHA-256 is not"),
    "no shard": (lambda o: (o / f"{PREFIX}.tar").unlink(), r"train-000001\.tar: is missing"),
    "another shard": (
        lambda o: shutil.copy(o / "train/train-000000.tar", o / f"{PREFIX}.tar"),
        "its SHA-256 is not",
    ),
    "another index": (
        lambda o: shutil.copy(o / "train/train-000000.idx", o / f"{PREFIX}.idx"),
        "is not the shard's index",
    ),
    "no index": (lambda o: (o / f"{PREFIX}.idx").unlink(), r"train-000001\.idx: is missing"),
    "no part": (lambda o: (o / f"{PREFIX}.parquet").unlink(), r"parquet is missing"),
    "a part cut off": (
        lambda o: (o / f"{PREFIX}.parquet").write_bytes(b"PAR1"),
        r"parquet cannot be read",
    ),
    "a path in the part": (
        lambda o: rewrite_part(o / f"{PREFIX}.parquet", "path", "elsewhere"),
        r"its rows are not those of ledger\.parquet",
    ),
    "a row of the part": (
        lambda o: rewrite_part(o / f"{PREFIX}.parquet", "row", 7),
        "its rows are not 20 to 39",
    ),
}


@pytest.mark.parametrize("name", SHARD_DAMAGE)
def test_a_damaged_shard_is_named_and_made_again_alone(output: Path, name: str) -> None:
    damage, message = SHARD_DAMAGE[name]
    before = state(output)
    damage(output)
    found = check(output)
    assert [task.name for task in found.damaged] == ["train-000001"]
    line, *_ = problem_lines(found)
    assert re.search(message, line), line
    repair(found, "", None, quiet)
    assert found.is_sound
    assert check(output).is_sound
    after = state(output)
    assert {name: x[2] for name, x in after.items()} == {name: x[2] for name, x in before.items()}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {f"{PREFIX}.{suffix}" for suffix in ("tar", "idx", "parquet")}


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (lambda o: flip(o / "ledger.parquet", 300), "ledger.parquet", "its SHA-256 is not"),
        (lambda o: (o / "ledger.parquet").unlink(), "ledger.parquet", "is missing"),
        (lambda o: manifest_with(o, mean=[1.0, 2.0, 3.0]), "dataset.json", "mean: not what"),
        (
            lambda o: manifest_with(o, max_superpixels=9),
            "dataset.json",
            "max_superpixels: not what",
        ),
    ],
)
def test_what_tells_of_the_whole_set_is_written_again_without_the_images(
    output: Path, damage: Damage, file: str, message: str
) -> None:
    before = state(output)
    damage(output)
    found = check(output)
    assert found.damaged == []
    (line,) = problem_lines(found)
    assert line.startswith(f"{file}: {message}")
    repair(found, "/nowhere", None, quiet)
    assert check(output).is_sound
    after = state(output)
    assert after[file][2] == before[file][2]
    assert {name for name in after if after[name] != before[name]} == {file}


def test_a_writer_that_lied_is_found_by_decoding(output: Path) -> None:
    """The shard's hash is right everywhere, but the manifest's shape is not what it holds."""
    manifest_with(output, segments_dtype="uint16")
    found = check(output)
    assert len(found.damaged) == 4
    assert "cannot be decoded" in problem_lines(found)[0]


def test_a_source_that_changed_since_is_not_taken_for_a_repair(
    output: Path, images: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(images, tmp_path / "moved"))
    for path in (moved / "train").rglob("*.JPEG"):
        shutil.copy(next((moved / "val").glob("*01.JPEG")), path)
    (output / f"{PREFIX}.tar").unlink()
    manifest = (output / "dataset.json").read_bytes()
    with pytest.raises(UserError, match=r"train-000001: made again, .* not what dataset\.json"):
        repair(check(output), str(moved), None, quiet)
    assert (output / "dataset.json").read_bytes() == manifest
    repair(check(output), str(images), None, quiet)
    assert check(output).is_sound


def test_an_unfinished_set_and_one_without_plan_cannot_be_verified(output: Path) -> None:
    (output / "dataset.json").rename(output / "aside")
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        check(output)
    (output / "aside").rename(output / "dataset.json")
    (output / "plan.json").unlink()
    with pytest.raises(UserError, match=r"plan\.json is missing"):
        check(output)


def test_the_command_prints_a_table_names_what_to_remove_and_makes_that_again(
    output: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (output / "train" / "notes.txt").write_text("mine")
    main(["--verify", "--output", str(output)])
    shown = capsys.readouterr().out
    assert re.search(r"train +60 +0 +3 +0 ", shown)
    assert "not part of the set: train/notes.txt" in shown
    assert shown.endswith("is sound.\n")
    flip(output / f"{PREFIX}.tar", 5000)
    with pytest.raises(UserError, match=r"train/train-000001\.\*, dataset\.json"):
        main(["--verify", "--output", str(output)])
    assert "train-000001.tar: its SHA-256" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--superpixels 99: the set in .* was made with 25"):
        main(["--verify", "--output", str(output), "--superpixels", "99"])
    for path in [*output.glob(f"{PREFIX}.*"), output / "dataset.json"]:
        path.unlink()
    flags = "--image-size 32 --superpixels 25 --samples-per-shard 20 --max-bad-share 0.1"
    main(["--source", str(images), "--output", str(output), *flags.split()])
    capsys.readouterr()
    main(["--verify", "--output", str(output)])
    assert capsys.readouterr().out.endswith("is sound.\n")
    assert (output / "train" / "notes.txt").read_text() == "mine"
    assert (output / "val" / "preview.html").is_file()


def test_a_set_on_object_storage_is_verified_and_repaired_there(
    output: Path, s3_endpoint: str
) -> None:
    place = remote.upload(output, s3_endpoint, "verified")
    system = remote.client(s3_endpoint)
    found = verify(place, None, quiet, cli.connect_ray)
    assert found.is_sound
    assert sum(check.bytes for check in found.shards.values()) > 100_000
    with system.open_output_stream(f"sets/verified/{PREFIX}.idx") as file:
        file.write(b"v1.2 1\n")
    found = verify(place, None, quiet, cli.connect_ray)
    assert [task.name for task in found.damaged] == ["train-000001"]
    repair(found, "", None, quiet)
    assert problem_lines(verify(place, None, quiet, cli.connect_ray)) == []
    for path in output.rglob("*"):
        if path.is_file():
            with system.open_input_file(f"sets/verified/{path.relative_to(output)}") as file:
                assert file.read() == path.read_bytes()
