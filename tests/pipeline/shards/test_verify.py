import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from webdataset import tariterators

from jobs import cli
from jobs.preprocess.__main__ import main, problem_lines
from pipeline.errors import UserError
from pipeline.shards.format import read_manifest
from pipeline.shards.ledger import read_record
from pipeline.shards.make import Outcome, Progress, preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.shards.verify import Verification, _shard_problems, verify
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


def made(source: Path, output: Path | str) -> Outcome:
    """Make the set, or what is missing of it."""
    config = PreprocessConfig(
        source=str(source),
        output=str(output),
        image_size=32,
        superpixels=25,
        samples_per_shard=20,
        max_bad_share=0.1,
    )
    return preprocess(config, quiet, cli.connect_ray)


@pytest.fixture(scope="module")
def sound(images: Path, ray_local: None) -> Path:
    return Path(made(images, images.parent / "shards").output)


@pytest.fixture
def output(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def remove_named(output: Path, result: Verification) -> None:
    for task in result.damaged:
        for path in output.glob(f"{task.split}/{task.name}.*"):
            path.unlink()
    for name in result.problems:
        (output / name).unlink(missing_ok=True)


def check(output: Path | str) -> Verification:
    return verify(str(output), None, quiet, cli.connect_ray)


def flip(path: Path, position: int) -> None:
    """Change one bit of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def state(output: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return what changes where a file is written again, and its bytes."""
    return {
        str(path.relative_to(output)): (
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            path.read_bytes(),
        )
        for path in output.rglob("*")
        if path.is_file()
    }


def rewrite_record(path: Path, column: str, value: object) -> None:
    """Change the first row's value in a record and keep its facts."""
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
    result = check(output)
    assert result.is_sound
    assert sum(x.facts.images for x in result.shards.values() if x.facts) == 60 + 20 - 1
    assert sum(c.totals.rejected for c in result.shards.values() if c.totals) == 1
    assert state(output) == before


SHARD_DAMAGE: dict[str, tuple[Damage, str]] = {
    "a bit of the shard": (lambda o: flip(o / f"{PREFIX}.tar", 5000), "its SHA-256 is not"),
    "a shard cut off": (
        lambda o: (o / f"{PREFIX}.tar").write_bytes((o / f"{PREFIX}.tar").read_bytes()[:3000]),
        "its SHA-256 is not",
    ),
    "an empty shard": (lambda o: (o / f"{PREFIX}.tar").write_bytes(b""), "its SHA-256 is not"),
    "no shard": (lambda o: (o / f"{PREFIX}.tar").unlink(), r"train-000001\.tar is missing"),
    "another shard": (
        lambda o: shutil.copy(o / "train/train-000000.tar", o / f"{PREFIX}.tar"),
        "its SHA-256 is not",
    ),
    "another index": (
        lambda o: shutil.copy(o / "train/train-000000.idx", o / f"{PREFIX}.idx"),
        "is not the shard's index",
    ),
    "no index": (lambda o: (o / f"{PREFIX}.idx").unlink(), r"train-000001\.idx is missing"),
    "no record": (lambda o: (o / f"{PREFIX}.parquet").unlink(), r"parquet is missing"),
    "a record cut off": (
        lambda o: (o / f"{PREFIX}.parquet").write_bytes(b"PAR1"),
        r"parquet cannot be read",
    ),
    "a path in the record": (
        lambda o: rewrite_record(o / f"{PREFIX}.parquet", "path", "elsewhere"),
        r"its rows are not those of ledger\.parquet",
    ),
}


@pytest.mark.parametrize("name", SHARD_DAMAGE)
def test_a_damaged_shard_is_named_and_made_again_alone_once_it_is_removed(
    output: Path, images: Path, name: str
) -> None:
    damage, message = SHARD_DAMAGE[name]
    before = state(output)
    damage(output)
    result = check(output)
    assert [task.name for task in result.damaged] == ["train-000001"]
    line, *_ = problem_lines(result)
    assert re.search(message, line), line
    remove_named(output, result)
    made(images, output)
    assert check(output).is_sound
    after = state(output)
    assert {name: x[2] for name, x in after.items()} == {name: x[2] for name, x in before.items()}
    changed = {name for name in after if after[name] != before[name]}
    suffixes = ("tar", "idx", "parquet")
    assert changed == {*(f"{PREFIX}.{suffix}" for suffix in suffixes), "ledger.parquet"}


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
def test_a_damaged_file_of_the_whole_set_is_named_and_written_again_without_an_image(
    output: Path, images: Path, damage: Damage, file: str, message: str
) -> None:
    before = state(output)
    damage(output)
    result = check(output)
    assert result.damaged == []
    (line,) = problem_lines(result)
    assert line.startswith(f"{file}: {message}")
    remove_named(output, result)
    assert made(images, output).progress.done == 0
    assert check(output).is_sound
    after = state(output)
    assert {name: x[2] for name, x in after.items()} == {name: x[2] for name, x in before.items()}


def test_a_writer_that_lied_is_found_by_decoding(output: Path) -> None:
    """The shard's hash is right everywhere, but the manifest's shape is not what it holds."""
    manifest_with(output, segments_dtype="uint16")
    result = check(output)
    assert len(result.damaged) == 4
    assert "cannot be decoded" in problem_lines(result)[0]


def test_a_shard_that_webdataset_reads_otherwise_is_named(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (output / f"{PREFIX}.tar").read_bytes()
    record = read_record(output / f"{PREFIX}.parquet")
    index = (output / f"{PREFIX}.idx").read_bytes()
    manifest = read_manifest(output)
    shard = manifest.splits["train"].shards[1]

    def problems() -> list[str]:
        return list(_shard_problems(content, index, shard, manifest, record.to_pylist()))

    assert problems() == []
    original = tariterators.tar_file_iterator
    monkeypatch.setattr(
        tariterators, "tar_file_iterator", lambda file: itertools.islice(original(file), 1, None)
    )
    assert "webdataset" in problems()[0]


def test_a_source_that_changed_since_is_not_taken_for_a_repair(
    output: Path, images: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(images, tmp_path / "moved"))
    for path in (moved / "train").rglob("*.JPEG"):
        shutil.copy(next((moved / "val").glob("*01.JPEG")), path)
    before = {name: data for name, (_, _, data) in state(output).items()}
    (output / f"{PREFIX}.tar").unlink()
    for _ in range(2):  # what it made does not count as finished
        with pytest.raises(UserError, match=r"train-000001 of .* not what dataset\.json records"):
            made(moved, output)
    assert [task.name for task in check(output).damaged] == ["train-000001"]
    assert (output / "dataset.json").read_bytes() == before["dataset.json"]
    made(images, output)
    assert {name: data for name, (_, _, data) in state(output).items()} == before


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
    main(["--verify", "--output", str(output)])
    shown = capsys.readouterr().out
    assert re.search(r"train +60 +0 +3 +0\n", shown)
    assert shown.endswith("is sound.\n")
    flip(output / f"{PREFIX}.tar", 5000)
    with pytest.raises(UserError, match=r"train/train-000001\.\*"):
        main(["--verify", "--output", str(output)])
    assert "train-000001.tar: its SHA-256" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--superpixels 99: the set in .* was made with 25"):
        main(["--verify", "--output", str(output), "--superpixels", "99"])
    for path in output.glob(f"{PREFIX}.*"):
        path.unlink()
    flags = "--image-size 32 --superpixels 25 --samples-per-shard 20 --max-bad-share 0.1"
    main(["--source", str(images), "--output", str(output), *flags.split()])
    capsys.readouterr()
    main(["--verify", "--output", str(output)])
    assert capsys.readouterr().out.endswith("is sound.\n")
    assert (output / "val" / "preview.jpg").is_file()


def test_a_set_on_object_storage_is_verified_and_repaired_there(
    output: Path, images: Path, s3_endpoint: str
) -> None:
    uri = remote.upload(output, s3_endpoint, "verified")
    system = remote.client(s3_endpoint)
    assert check(uri).is_sound
    with system.open_output_stream(f"sets/verified/{PREFIX}.idx") as file:
        file.write(b"v1.2 1\n")
    assert [task.name for task in check(uri).damaged] == ["train-000001"]
    for suffix in ("tar", "idx", "parquet"):
        system.delete_file(f"sets/verified/{PREFIX}.{suffix}")
    made(images, uri)
    assert problem_lines(check(uri)) == []
    for path in output.rglob("*"):
        if path.is_file():
            with system.open_input_file(f"sets/verified/{path.relative_to(output)}") as file:
                assert file.read() == path.read_bytes()
