import re
import resource
import socket
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards.format import check_sizes, manifest_hash, read_manifest, sha256_file
from pipeline.shards.ledger import read_ledger
from tests import remote
from tests.remote import Proxy


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WAITS", (0.01, 0.02, 0.03))


@pytest.mark.parametrize(
    ("location", "names", "joined", "is_remote"),
    [
        ("sets/a", ("train", "x.tar"), "sets/a/train/x.tar", False),
        (Path("/sets/a b"), ("x",), "/sets/a b/x", False),
        ("file:///sets/a%20b/", ("x",), "file:///sets/a%20b/x", False),
        ("s3://bucket", ("x",), "s3://bucket/x", True),
        ("s3://bucket/a/", ("b c", "x"), "s3://bucket/a/b%20c/x", True),
        ("gs://bucket/a", (), "gs://bucket/a", True),
        ("s3://b/a?region=eu-west-1", ("x",), "s3://b/a/x?region=eu-west-1", True),
    ],
)
def test_locations_are_joined_as_paths_or_as_uris(
    location: str | Path, names: tuple[str, ...], joined: str, is_remote: bool
) -> None:
    assert storage.join(location, *names) == joined
    assert storage.is_remote(location) == is_remote


def test_local_locations_become_absolute_and_uris_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a") == storage.absolute(Path("a")) == str(tmp_path / "a")
    assert storage.absolute(f"file://{tmp_path}/a%20b") == str(tmp_path / "a b")
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"


def test_a_set_reads_the_same_from_a_folder_a_file_uri_and_s3(
    small_set: Path, remote_set: str
) -> None:
    expected = sha256_file(small_set / "dataset.json")
    for location in (small_set, str(small_set), f"file://{small_set}", remote_set):
        assert read_manifest(location) == read_manifest(small_set)
        assert manifest_hash(location) == expected
        assert read_ledger(location, "val").equals(read_ledger(small_set, "val"))
        check_sizes(location, read_manifest(location), "train")
        with storage.open_input(storage.join(location, "ledger.parquet")) as file:
            assert file.read() == (small_set / "ledger.parquet").read_bytes()


def test_another_manifest_has_another_hash(small_set: Path, tmp_path: Path) -> None:
    manifest = (small_set / "dataset.json").read_bytes()
    (tmp_path / "dataset.json").write_bytes(manifest.replace(b'"seed": 0', b'"seed": 1'))
    assert manifest_hash(tmp_path) != manifest_hash(small_set)


def test_a_shard_of_another_size_or_none_is_named(s3_endpoint: str, small_set: Path) -> None:
    location = remote.upload(small_set, s3_endpoint, "sizes")
    system = remote.client(s3_endpoint)
    manifest = read_manifest(location)
    with system.open_output_stream("sets/sizes/val/val-000001.tar") as file:
        file.write(b"short")
    with pytest.raises(UserError, match=r"val-000001\.tar.* has 5 bytes; .* Upload it again"):
        check_sizes(location, manifest, "val")
    system.delete_file("sets/sizes/val/val-000001.tar")
    with pytest.raises(UserError, match=r"val-000001\.tar.* is missing"):
        check_sizes(location, manifest, "val")


@pytest.mark.parametrize("name", ["nowhere", "small/dataset.json"])
def test_a_location_without_a_set_says_how_to_make_one(remote_set: str, name: str) -> None:
    location = remote_set.replace("sets/small", f"sets/{name}")
    with pytest.raises(UserError, match="no finished set of shards lies there"):
        read_manifest(location)


def test_what_is_missing_or_denied_is_asked_for_once(remote_set: str, proxy: Proxy) -> None:
    proxy.fault = lambda method, name, before: 403 if name == "secret" else None
    started = time.monotonic()
    with pytest.raises(storage.MissingError, match=r"nothing.* is missing"):
        storage.read_bytes(remote.uri(proxy.endpoint, "small/nothing"))
    with pytest.raises(UserError, match=r"access to s3://sets/secret.* is denied.*AWS_ACCESS_KEY"):
        storage.read_bytes(remote.uri(proxy.endpoint, "secret"))
    assert time.monotonic() - started < 2
    assert proxy.counts["HEAD", "nothing"] == proxy.counts["HEAD", "secret"] == 1


def test_a_server_that_comes_back_is_waited_for(
    remote_set: str, small_set: Path, proxy: Proxy, quick: None
) -> None:
    """Refusing, then cutting the connection within the body."""
    faults: list[int | tuple[int] | None] = [503, (10,), None]
    proxy.fault = lambda method, name, before: faults[min(before, 2)]
    content = storage.read_bytes(remote.uri(proxy.endpoint, "small/plan.json"))
    assert content == (small_set / "plan.json").read_bytes()
    assert proxy.counts["GET", "plan.json"] >= 2


@pytest.mark.parametrize("read", [read_manifest, lambda location: read_ledger(location, "val")])
def test_a_lost_server_is_an_error_after_bounded_attempts(
    s3_endpoint: str, read: object, quick: None
) -> None:
    location = remote.uri(f"http://127.0.0.1:{remote.free_port()}", "small")
    match = r"cannot be reached .* tried 4 times in .*AWS_ENDPOINT_URL"
    with pytest.raises(UserError, match=match):
        read(location)  # type: ignore[operator]


def test_the_endpoint_comes_from_the_environment_too(
    remote_set: str, small_set: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    assert read_manifest("s3://sets/small") == read_manifest(small_set)
    assert proxy.gets("dataset.json") == {"dataset.json": 1}


@pytest.mark.parametrize(
    "location", ["s3://name:hidden@bucket/a", "gs://bucket/a?secret_key=hidden&access_key=hidden"]
)
def test_a_secret_in_a_uri_is_refused_and_not_shown(location: str) -> None:
    with pytest.raises(UserError, match=r"://bucket/a holds .* environment instead") as caught:
        storage.read_bytes(location)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("location", ["ftp://host/a", "s3://bucket/a?colour=red"])
def test_a_uri_that_nothing_opens_is_one_line(location: str) -> None:
    with pytest.raises(UserError, match=r"cannot be opened .*give a folder, or a URI"):
        storage.read_bytes(location)


def test_a_folder_in_place_of_a_file_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        storage.read_bytes(tmp_path)


def objects(endpoint: str, folder: str) -> dict[str, int]:
    """Size of every object below a folder of the bucket, by key."""
    # Not by pyarrow, which another thread may be waiting in for the answer that asks this.
    with urlopen(f"{endpoint}/{remote.BUCKET}?list-type=2&prefix={folder}/") as answer:
        text = answer.read().decode()
    keys, sizes = (re.findall(f"<{tag}>(.*?)</{tag}>", text) for tag in ("Key", "Size"))
    return dict(zip(keys, map(int, sizes), strict=True))


LARGE = bytes(range(256)) * (12 << 12)  # 12 MiB: several parts of one upload


def write_half(location: str | Path) -> None:
    with storage.atomic_file(location) as file:
        file.write(b"half")
        raise ZeroDivisionError


@pytest.mark.parametrize("content", [b"", b"small", LARGE])
def test_what_is_written_is_read_here_and_on_s3(
    s3_endpoint: str, tmp_path: Path, content: bytes
) -> None:
    for location in (str(tmp_path / "a"), remote.uri(s3_endpoint, f"written/{len(content)}")):
        assert not storage.is_file(location)
        storage.write_atomically(location, memoryview(content))
        assert storage.is_file(location)
        assert storage.read_bytes(location) == content
        with storage.atomic_file(location) as file:
            for start in range(0, len(content), 1 << 20):
                file.write(content[start : start + (1 << 20)])
            file.write(b"!")
        assert storage.read_bytes(location) == content + b"!"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("content", [b"small", LARGE])
@pytest.mark.parametrize("fails", [0, 1, 2])
def test_an_upload_that_fails_shows_nothing_and_is_repeated(
    s3_endpoint: str, proxy: Proxy, quick: None, content: bytes, fails: int
) -> None:
    """The first, second or third request of an upload is refused once, then once more."""
    states: list[dict[str, int]] = []  # of the bucket, at each request of the upload
    folder = f"failing/{len(content)}-{fails}"

    def fault(method: str, name: str, before: int) -> int | None:
        if method not in ("PUT", "POST"):
            return None
        states.append(objects(s3_endpoint, folder))
        return 503 if len(states) - 1 in (fails, fails + 3) else None

    proxy.fault = fault
    storage.write_atomically(remote.uri(proxy.endpoint, f"{folder}/a"), content)
    assert all(state == {} for state in states)
    assert objects(s3_endpoint, folder) == {f"{folder}/a": len(content)}


def test_a_write_that_cannot_succeed_is_an_error_and_leaves_what_was_there(
    s3_endpoint: str, proxy: Proxy, quick: None
) -> None:
    location = remote.uri(proxy.endpoint, "kept/a")
    storage.write_atomically(location, b"old")
    proxy.fault = lambda method, name, before: 503 if method in ("PUT", "POST") else None
    for content in (b"new", LARGE):
        with pytest.raises(UserError, match=r"cannot be reached .* tried 4 times"):
            storage.write_atomically(location, content)
    proxy.fault = lambda method, name, before: 403 if method in ("PUT", "POST") else None
    with pytest.raises(UserError, match="is denied"):
        storage.write_atomically(location, b"new")
    with pytest.raises(ZeroDivisionError):
        write_half(location)
    assert objects(s3_endpoint, "kept") == {"kept/a": 3}


def test_a_file_whose_writer_raises_is_as_before_and_temporaries_can_be_removed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        write_half(path)
    assert [(x.name, x.read_bytes()) for x in tmp_path.iterdir()] == [("a", b"old")]
    (tmp_path / ".a.0f0f0f0f.tmp").write_bytes(b"left by a killed process")
    storage.remove_temporaries(tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == ["a"]


def test_the_error_of_a_full_disk_names_the_file_however_long(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 255)
    storage.write_atomically(path, bytes(1000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # what disks do when they are full
    try:
        with pytest.raises(
            OSError, match=f"File too large on host {socket.gethostname()}: '{path}'"
        ):
            storage.write_atomically(path, bytes(1001))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(x.name, x.stat().st_size) for x in tmp_path.iterdir()] == [("a" * 255, 1000)]


def fill(location: str, version: str, *, resumes: bool = False, fails: bool = False) -> list[str]:
    """Write three files as a command does, the last of which marks them as whole. Return the names
    of those that were there."""
    with storage.working_folder(location, "whole", replaced="maps", resumes=resumes) as folder:
        before = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        (folder / "maps").mkdir(parents=True, exist_ok=True)
        for name in (f"maps/{version}", "other", "whole"):
            (folder / name).write_text(version)
        if fails:
            raise ZeroDivisionError
    return before


def test_a_working_folder_is_uploaded_the_marking_file_last(
    s3_endpoint: str, proxy: Proxy, quick: None
) -> None:
    location = remote.uri(proxy.endpoint, "working")
    order: list[str] = []

    def fault(method: str, name: str, before: int) -> int | None:
        if method == "PUT":
            order.append(name)
        return 503 if method in ("PUT", "DELETE") and before == 0 else None

    proxy.fault = fault
    assert fill(location, "a") == []
    assert order[-1] == "whole"
    with pytest.raises(ZeroDivisionError):
        fill(location, "b", fails=True)
    keys = ("working/maps/a", "working/other", "working/whole")
    assert set(keys) <= set(objects(s3_endpoint, "working"))
    assert storage.read_bytes(storage.join(location, "whole")) == b"a"
    fill(location, "c")
    assert "working/maps/a" not in objects(s3_endpoint, "working")
    proxy.fault = lambda method, name, before: 403 if (method, name) == ("PUT", "other") else None
    with pytest.raises(storage.UnreachableError, match="is denied"):
        fill(location, "d")
    assert "working/whole" not in objects(s3_endpoint, "working")


def test_a_working_folder_that_resumes_begins_with_what_lies_there_and_keeps_what_was_done(
    s3_endpoint: str, tmp_path: Path
) -> None:
    for location in (str(tmp_path), remote.uri(s3_endpoint, "resuming")):
        with pytest.raises(ZeroDivisionError):
            fill(location, "a", resumes=True, fails=True)
        assert fill(location, "b", resumes=True) == ["maps/a", "other", "whole"]
        names = sorted(n for n in storage.entries(storage.join(location, "maps"))[1] if n)
        assert names == ["a", "b"]


def test_a_folder_is_removed_with_all_in_it(s3_endpoint: str, tmp_path: Path) -> None:
    for location in (str(tmp_path / "a"), remote.uri(s3_endpoint, "removed")):
        fill(location, "a")
        storage.remove_folder(location)
        storage.remove_folder(location)
        assert not any(storage.entries(location))
