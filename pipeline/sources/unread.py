"""The files of a source that are neither listed nor read: how many, why, and some of them. A folder
that is not searched counts as one file."""

from collections.abc import Collection, Iterable
from itertools import islice
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import NAMED
from pipeline.sources.archives import is_archive, is_packed
from pipeline.sources.files import SourceFiles, path_hash, path_in
from pipeline.sources.listing import Unread, is_image, stored_array

BATCH = 1 << 16  # paths that are Python objects at once
MAX_REASONS = 30  # since each suffix is one
HIDDEN = "hidden: named with a dot first"
LOOKED_AT = 1000  # folders of a source of no known layout


def count_unread(
    files: SourceFiles,
    images: Collection[pa.Table],
    within: dict[str, Unread] | None = None,
    folders: int | None = None,
) -> dict[str, Unread]:
    """Return the files that are not among the listed images and were not read, by `kind: why`.
    within: what the layout did not read within files. folders: at most so many are looked at.
    Memory beside the folders' names does not grow with the files."""
    used = _sorted_hashes(files, images)
    unread = within or {}
    waiting: set[str] = set()  # folders that the walk has not come to
    for folder, _ in islice(files.walk(), folders):
        waiting.discard(folder)
        contents = files.contents(folder)
        for path in _unknown(folder, contents.files, used):
            _add(unread, path, _reason(path, unread))
        for name, reason in contents.others:
            _add(unread, path_in(folder, name) if name else f"{folder}/", reason)
        for path in (path_in(folder, name) for name in contents.folders):
            if path.rpartition("/")[2].startswith("."):
                _add(unread, f"{path}/", HIDDEN)
            else:
                waiting.add(path)
    for path in sorted(waiting) if folders is None else ():
        prefix = f"{path}/"  # some layouts list a folder under each of its paths
        if not any(pc.any(pc.starts_with(x["path"], prefix)).as_py() for x in images):
            _add(unread, prefix, "link: to a folder with another path")
    return unread


def summary_of(files: SourceFiles) -> str:
    """Return what a source of no known layout holds: reasons with counts and examples."""
    unread = count_unread(files, (), folders=LOOKED_AT)
    return "; ".join(
        f"{x['files']} x {reason} ({', '.join(x['examples'])})"
        for reason, x in sorted(unread.items(), key=lambda item: -item[1]["files"])[:NAMED]
    )


def _sorted_hashes(files: SourceFiles, images: Collection[pa.Table]) -> np.ndarray:
    """Return the hashes, int64 [N], of the files that are listed or were read."""
    # The walk of a list or an archive comes to that file alone.
    whole = [] if files.only else [x for table in images for x in table.to_batches(BATCH)]
    counts = [batch["offset"].null_count for batch in whole]
    hashes = stored_array(len(files.used) + sum(counts) + 1, np.int64)
    hashes[: len(files.used)] = files.used
    end = len(files.used)
    for batch, count in zip(whole, counts, strict=True):
        paths = batch["path"].filter(batch["offset"].is_null()).to_pylist()
        hashes[end : end + count] = [*map(path_hash, paths)]
        end += count
    hashes.sort()
    return hashes


def _unknown(folder: str, names: list[str], used: np.ndarray) -> list[str]:
    """Return the paths of these files whose hashes are not among those used, which are sorted."""
    paths = [path_in(folder, name) for name in names]
    hashes = np.fromiter(map(path_hash, paths), np.int64, len(paths))
    known = used[np.searchsorted(used, hashes).clip(max=len(used) - 1)] == hashes
    return [paths[index] for index in np.flatnonzero(~known)]


def _add(unread: dict[str, Unread], path: str, reason: str) -> None:
    path = path.encode("utf-8", "backslashreplace").decode()
    entry = unread.setdefault(reason, {"files": 0, "examples": []})
    entry["files"] += 1
    folders = [example.rpartition("/")[0] for example in entry["examples"]]
    if len(folders) < NAMED and path.rpartition("/")[0] not in folders:
        entry["examples"].append(path)


def add_members(unread: dict[str, Unread], archive: str, names: Iterable[str]) -> None:
    """Count members of an archive that are no part of an image's sample."""
    for name in names:
        if name.rpartition("/")[2].startswith("."):
            reason = HIDDEN
        else:
            reason = f"{_suffix(name)} in archives: no image or label that is read"
        _add(unread, f"{archive}/{name}", _one_of_few(reason, unread))


def _reason(path: str, unread: dict[str, Unread]) -> str:
    name = path.rpartition("/")[2]
    if name.startswith("."):
        return HIDDEN
    if is_image(name):
        return "image: outside the layout's folders"
    if is_packed(name):
        return "packed archive: to be unpacked first"
    if is_archive(name):
        return "archive: none of the layout's"
    return _one_of_few(f"{_suffix(name)}: not an image's", unread)


def _suffix(name: str) -> str:
    return f"suffix {PurePosixPath(name).suffix.lower() or '(none)'}"


def _one_of_few(reason: str, unread: dict[str, Unread]) -> str:
    return reason if reason in unread or len(unread) < MAX_REASONS else "other suffixes"
