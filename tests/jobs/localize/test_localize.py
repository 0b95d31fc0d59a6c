"""The job over folders of images: what it takes, writes, reports, and does again."""

import contextlib
import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.localize import __main__ as job
from jobs.localize.__main__ import find_images, name_results
from jobs.runs import load_nets, save_nets
from pipeline.errors import UserError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of images of several sizes and kinds, one of them broken."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (150, 230, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "a.jpg")
    Image.fromarray(noise[:5, :3]).save(folder / "sub" / "a.png")
    Image.fromarray(noise[:40, :300, 0]).save(folder / "grey.GIF")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(run_folder: Path, output: Path, *images: Path, flags: tuple[str, ...] = ()) -> None:
    job.main(["--run", str(run_folder), "--output", str(output), *flags, *map(str, images)])


def read_entries(output: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((output / "boxes.json").read_text())["images"]
    return entries


def tiny_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (60, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04}.png", compress_level=1)
    return folder


def test_every_image_gets_an_overlay_of_its_size_or_a_reason(
    pictures: Path, random_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    missing = pictures / "none.jpg"
    with pytest.raises(UserError, match="2 of 5 images failed"):
        run(random_run, output, pictures, missing)
    printed = capsys.readouterr()
    entries = {
        Path(entry["image"]).relative_to(pictures).as_posix(): entry
        for entry in read_entries(output)
    }
    assert list(entries) == ["a.jpg", "broken.jpg", "grey.GIF", "sub/a.png", "none.jpg"]
    assert entries.pop("none.jpg")["error"] == "No such file or directory"
    broken = entries.pop("broken.jpg")
    assert broken.keys() == {"image", "status", "error"}
    assert broken["status"] == "failed"
    assert broken["error"] in printed.err
    assert "files without an image's suffix are left out (.txt 1)" in printed.out
    classes = load_nets(random_run).config.classes
    for name, size in (("a.jpg", (230, 150)), ("sub/a.png", (3, 5)), ("grey.GIF", (230, 40))):
        entry = entries[name]
        assert (entry["status"], entry["width"], entry["height"]) == ("ok", *size)
        assert entry["overlay"] == str(Path(name).with_suffix(".png"))
        with Image.open(output / entry["overlay"]) as overlay:
            assert (overlay.size, overlay.mode) == (size, "RGB")
        x0, y0, x1, y1 = entry["box"]
        assert 0 <= x0 <= x1 < size[0]
        assert 0 <= y0 <= y1 < size[1]
        assert {top["class"] for top in entry["top5"]} <= set(classes)
        assert {name: entry[name] for name in ("class", "name", "score")} == entry["top5"][0]
        assert sorted((top["score"] for top in entry["top5"]), reverse=True) == [
            top["score"] for top in entry["top5"]
        ]
    written = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    pictures_of = {"a.png", "grey.png", "sub/a.png"}
    masks = {f"masks/{name}" for name in pictures_of}
    assert written == pictures_of | masks | {"boxes.json", "progress.jsonl"}


def test_a_file_name_that_is_no_text_is_printed_and_recorded(
    random_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_images(tmp_path / "in", 1)
    name = os.fsdecode(b"'quoted' \xc3\xbc \xff.png")
    (folder / "0000.png").rename(folder / name)
    run(random_run, tmp_path / "out", folder)
    assert "'quoted' ü \ufffd.png: " in capfd.readouterr().out
    (entry,) = read_entries(tmp_path / "out")
    assert entry["image"] == str(folder / name)
    assert (tmp_path / "out" / entry["overlay"]).is_file()


def test_the_number_of_threads_changes_no_byte(random_run: Path, tmp_path: Path) -> None:
    folder = tiny_images(tmp_path / "in", 40)
    for threads in ("1", "5"):
        flags = ("--threads", threads, "--batch-size", "3")
        run(random_run, tmp_path / threads, folder, flags=flags)
    few, many = (
        {
            path.relative_to(tmp_path / threads): path.read_bytes()
            for path in sorted((tmp_path / threads).rglob("*"))
            if path.is_file() and path.name != "boxes.json"
        }
        for threads in ("1", "5")
    )
    assert len(few) == 81  # overlays, masks, progress.jsonl
    assert few == many
    assert read_entries(tmp_path / "1") == read_entries(tmp_path / "5")


@pytest.mark.slow
def test_a_killed_job_keeps_what_it_did_and_the_same_command_does_the_rest(
    random_run: Path, tmp_path: Path
) -> None:
    folder = tiny_images(tmp_path / "in", 300)
    output = tmp_path / "out"
    flags = ("--batch-size", "2", "--threads", "1")
    command = [sys.executable, "-m", "jobs.localize", "--run", str(random_run), "--output"]
    process = subprocess.Popen([*command, str(output), *flags, str(folder)])
    progress, deadline = output / "progress.jsonl", time.monotonic() + 60
    while not progress.exists() or progress.read_bytes().count(b"\n") < 20:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "boxes.json").exists()
    done = [json.loads(line) for line in progress.read_bytes().splitlines(keepends=True)[1:-1]]
    with progress.open("ab") as file:
        file.write(b'{"image": "cut')  # what a power failure may leave
    before = {entry["overlay"]: (output / entry["overlay"]).stat().st_mtime_ns for entry in done}
    assert 10 < len(before) < 300
    run(random_run, output, folder, flags=flags)
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    run(random_run, tmp_path / "uninterrupted", folder, flags=flags)
    assert read_entries(output) == read_entries(tmp_path / "uninterrupted")
    for name in before:
        assert (output / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes()


def test_again_only_what_changed_failed_or_is_missing_is_done(
    pictures: Path, random_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"

    def again(*flags: str) -> set[str]:
        """Names of the images that were worked on."""
        capsys.readouterr()
        with contextlib.suppress(UserError):
            run(random_run, output, pictures, flags=flags)
        text = "".join(capsys.readouterr())
        return {n for n in ("a.jpg", "grey.GIF", "sub/a.png", "broken.jpg") if f"{n}:" in text}

    everything = {"a.jpg", "grey.GIF", "sub/a.png", "broken.jpg"}
    assert again() == everything
    assert again() == {"broken.jpg"}
    (output / "grey.png").unlink()
    assert again() == {"broken.jpg", "grey.GIF"}
    Image.new("RGB", (50, 60)).save(pictures / "a.jpg")
    assert again() == {"broken.jpg", "a.jpg"}
    Image.new("RGB", (20, 30)).save(pictures / "broken.jpg")
    assert again() == {"broken.jpg"}
    assert again() == set()
    (output / "masks" / "grey.png").unlink()
    assert again("--no-overlays") == {"grey.GIF"}
    assert again("--no-overlays", "--no-masks") == set()
    assert [entry["status"] for entry in read_entries(output)] == ["ok"] * 4
    assert read_entries(output)[0]["width"] == 50


def test_other_images_join_those_of_earlier_jobs(
    pictures: Path, random_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are named a.png where each is given alone."""
    output, first, second = tmp_path / "out", pictures / "a.jpg", pictures / "sub" / "a.png"
    run(random_run, output, first)
    (before,) = read_entries(output)
    picture = (output / "a.png").stat()
    run(random_run, output, second)
    assert [entry["overlay"] for entry in read_entries(output)] == ["a.png", "a-2.png"]
    Image.new("RGB", (20, 30)).save(second)
    monkeypatch.chdir(pictures)
    run(random_run, output, Path("sub/a.png"))
    earlier, changed = read_entries(output)
    assert (earlier, changed["height"]) == (before, 30)
    assert (changed["image"], changed["overlay"]) == ("sub/a.png", "a-2.png")
    run(random_run, output, first)
    assert read_entries(output) == [changed, before]
    assert (output / "a.png").stat() == picture


def test_no_entry_of_a_folder_ends_the_job(random_run: Path, tmp_path: Path) -> None:
    folder, output = tiny_images(tmp_path / "in", 2), tmp_path / "out"
    names = ("木" * 80 + "木a.png", "b" * 251 + ".png")
    for path, name in zip(sorted(folder.iterdir()), names, strict=True):
        path.rename(folder / name)
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.png").mkdir()
    (folder / "occupied.png").write_bytes((folder / names[0]).read_bytes())
    (output / "occupied.png").mkdir(parents=True)
    damaged = [folder / ("c" * 300), folder / "loop.png" / "x.png"]
    stray = io.BytesIO()
    Image.new("RGB", (20, 30)).save(stray, "JPEG")
    (folder / "noted.jpg").write_bytes(stray.getvalue()[:-2] + bytes(20) + b"\xff\xd9")
    with pytest.raises(UserError, match="5 of 8 images failed"):
        run(random_run, output, folder, folder / "loop.png", *damaged)
    entries = {Path(entry["image"]).name: entry for entry in read_entries(output)}
    for name in names:
        assert (output / entries[name]["overlay"]).is_file()
    assert "extraneous bytes" in entries["noted.jpg"]["note"]
    assert {n: e["error"] for n, e in entries.items() if "error" in e} == {
        "pipe.png": "not a regular file",
        "loop.png": "Too many levels of symbolic links",
        "x.png": "Too many levels of symbolic links",
        "c" * 300: "File name too long",
        "occupied.png": "Is a directory",
    }


@pytest.fixture
def finished(pictures: Path, random_run: Path, tmp_path: Path) -> Path:
    """The output of a job over one image."""
    run(random_run, tmp_path / "out", pictures / "a.jpg")
    return tmp_path / "out"


def test_results_of_another_model_or_rule_are_not_mixed(
    finished: Path, pictures: Path, random_run: Path, tmp_path: Path
) -> None:
    before = (finished / "boxes.json").read_bytes()
    with pytest.raises(UserError, match="another rule"):
        run(random_run, finished, pictures / "a.jpg", flags=("--rule", "mean"))
    nets = load_nets(random_run)
    with torch.no_grad():
        nets.corruption.state_dict()["output.weight"].add_(1)
    (tmp_path / "run").mkdir()
    save_nets(tmp_path / "run", nets, {})
    with pytest.raises(UserError, match="another model_sha256"):
        run(tmp_path / "run", finished, pictures / "a.jpg")
    assert (finished / "boxes.json").read_bytes() == before


def test_two_jobs_cannot_write_to_one_folder(
    finished: Path, pictures: Path, random_run: Path
) -> None:
    with (finished / "progress.jsonl").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=str(finished)):
            run(random_run, finished, pictures / "a.jpg")


@pytest.mark.parametrize("line", ["no entry", "{}", "[]", '{"image": "a.jpg"}', "\0" * 999])
def test_a_damaged_progress_file_is_named(
    line: str, finished: Path, pictures: Path, random_run: Path
) -> None:
    with (finished / "progress.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"progress\.jsonl is damaged \(\w+: .{,60}\);"):
        run(random_run, finished, pictures / "a.jpg")


def test_a_full_disk_ends_the_job_and_names_the_file(
    pictures: Path, random_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device on host .*: .*out/a\.png"):
        run(random_run, tmp_path / "out", pictures / "a.jpg")


def test_names_of_results_are_unique_whatever_the_folders_and_letter_case(tmp_path: Path) -> None:
    names = ("x/a.jpg", "y/a.png", "y/A.jpg", "y/a.jpg", "y/masks/a.jpg", "y/deep/a.jpg", "b.c.jpg")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    given = [tmp_path / "x", tmp_path / "y", tmp_path / "b.c.jpg", tmp_path / "y" / "a.jpg"]
    given += [tmp_path / "x/../y/a.jpg", Path(os.path.relpath(tmp_path / "b.c.jpg"))]
    jobs = name_results(find_images(given, tmp_path / "out"), tmp_path / "out", {})
    assert {str(job.path.relative_to(tmp_path)): job.overlay for job in jobs} == {
        "x/a.jpg": "a.png",
        "y/A.jpg": "A-2.png",
        "y/a.jpg": "a-3.png",
        "y/a.png": "a-4.png",
        "y/deep/a.jpg": "deep/a.png",
        "y/masks/a.jpg": "masks/a-5.png",  # masks/a.png and the next are masks of others
        "b.c.jpg": "b.c.png",
    }
    assert jobs[0].mask == "masks/a.png"
    everything = [name.lower() for job in jobs for name in (job.overlay, job.mask)]
    assert len(set(everything)) == 2 * len(names)


def test_folders_are_searched_once_through_links_without_hidden_files(
    pictures: Path, tmp_path: Path
) -> None:
    (pictures / "sub" / "loop").symlink_to(pictures)
    (pictures / "._a.jpg").write_bytes(b"what macOS keeps beside a.jpg")
    (pictures / ".thumbnails").mkdir()
    (pictures / ".thumbnails" / "a.jpg").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "c.jpg").touch()
    (pictures / "link").symlink_to(tmp_path / "linked")
    output = pictures / "out"  # results of an earlier run among the images
    output.mkdir()
    (output / "a.png").touch()
    paths = [path.relative_to(pictures) for path in find_images([pictures], output)]
    names = ["a.jpg", "broken.jpg", "grey.GIF", "link/c.jpg", "sub/a.png"]
    assert [path.as_posix() for path in paths] == names


def test_folders_and_outputs_that_cannot_be_are_refused(
    pictures: Path, random_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image files"):
        find_images([pictures, tmp_path / "empty"], tmp_path / "out")
    before = (pictures / "sub" / "a.png").read_bytes()
    run(random_run, pictures / "sub", pictures / "sub" / "a.png")  # whose overlay is a-2.png
    with pytest.raises(UserError, match="is searched for images"):
        run(random_run, pictures, pictures)
    with pytest.raises(UserError, match=r"a\.jpg is a file"):
        run(random_run, pictures / "a.jpg", pictures)
    assert (pictures / "sub" / "a.png").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none_is_refused_with_the_remedy(
    pictures: Path, random_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no CUDA device here; use --device cpu or auto"):
        run(random_run, tmp_path / "out", pictures, flags=("--device", "cuda"))
    assert not (tmp_path / "out").exists()
