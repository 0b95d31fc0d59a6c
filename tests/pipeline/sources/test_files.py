import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.sources.files import SourceFiles
from tests import remote
from tests.pipeline.sources.miniature import write

FILES = {"b/2.jpg": b"two", "b/c/3.jpg": b"three", "1.jpg": b"one", ".hidden": b"", "b/.no": b""}


@pytest.fixture(params=["folder", "s3"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = write(tmp_path / "source", FILES)
    if request.param == "folder":
        return str(folder)
    return remote.upload(folder, request.getfixturevalue("s3_endpoint"), tmp_path.name)


def test_names_sizes_and_ranges_are_the_same_everywhere(source: str) -> None:
    with SourceFiles(source) as files:
        assert files.entries() == (["b"], ["1.jpg"])
        assert files.entries("nowhere") == ([], [])
        assert list(files.walk()) == [("", ["1.jpg"]), ("b", ["2.jpg"]), ("b/c", ["3.jpg"])]
        assert files.read("b/c/3.jpg") == b"three"
        assert files.read("b/c/3.jpg", 1, 3) == b"hre"
        assert files.size("b/c/3.jpg") == 5
        with pytest.raises(FileNotFoundError):
            files.read("b/missing.jpg")
        with pytest.raises(UserError, match="has 1 of 9 bytes at 4: it has changed since it was"):
            files.read("b/c/3.jpg", 4, 9)


def test_fetched_ranges_come_in_order_and_errors_come_with_their_own(source: str) -> None:
    wanted: list[Any] = [("b/2.jpg", None, None), ("no.jpg", None, None), ("1.jpg", 1, 2)] * 40
    with SourceFiles(source) as files:
        for (path, _, _), fetch in zip(wanted, files.fetch(wanted), strict=True):
            if path == "no.jpg":
                with pytest.raises(FileNotFoundError):
                    fetch()
            else:
                assert fetch() == {"b/2.jpg": b"two", "1.jpg": b"ne"}[path]


def test_object_storage_is_asked_for_many_ranges_at_once(
    proxy: remote.Proxy, s3_endpoint: str, tmp_path: Path
) -> None:
    remote.upload(write(tmp_path / "source", {"a.tar": bytes(range(200))}), s3_endpoint, "many")
    lock, waiting, most = threading.Lock(), 0, 0

    def fault(method: str, name: str, before: int) -> None:
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        time.sleep(0.1)
        with lock:
            waiting -= 1

    proxy.fault = fault
    with SourceFiles(remote.uri(proxy.endpoint, "many")) as files:
        fetched = files.fetch([("a.tar", i, 2) for i in range(48)])
        assert [fetch()[0] for fetch in fetched] == list(range(48))
    assert most >= 5
    assert proxy.counts["GET", "a.tar"] == 48
