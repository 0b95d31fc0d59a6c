"""The output of a plan, which its plan.json describes and one driver at a time writes."""

import errno
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards.plan import Plan

PLAN_NAME = "plan.json"


def read_fingerprint(output: str) -> dict[str, Any]:
    """Read OUTPUT/plan.json. Raises MissingError without one and UserError for a damaged one."""
    location = storage.join(output, PLAN_NAME)
    try:
        content = json.loads(storage.read_bytes(location))
        if isinstance(content, dict):
            return content
        raise ValueError("it holds no object")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{location} is damaged ({error}); delete {output}.") from error


def claim_output(plan: Plan) -> None:
    """Make the output folder this plan's own, or raise UserError where it is another's."""
    path = storage.join(plan.output, PLAN_NAME)
    if storage.is_file(plan.output):
        raise UserError(f"{plan.output} is a file; choose an empty folder.")
    if not storage.is_file(path):
        folders, files = storage.entries(plan.output)
        if folders or not all(name.endswith(".tmp") for name in files):
            raise UserError(f"{plan.output} is not empty and holds no {PLAN_NAME}; choose another.")
        storage.make_folder(plan.output)
        content = json.dumps(plan.fingerprint, indent=1, sort_keys=True) + "\n"
        # Another driver may be faster, and remove temporary files.
        with suppress(FileExistsError, FileNotFoundError):
            with storage.atomic_file(path, new=True) as file:
                file.write(content.encode())
            for split in plan.collection.images:
                storage.make_folder(storage.join(plan.output, split))
    check_claim(plan)


def check_claim(plan: Plan) -> None:
    """Raise UserError where the output is not this plan's: at a URI, where nothing can be written
    for the first time only, also of a driver that claimed it at the same time."""
    recorded = read_fingerprint(plan.output)
    if recorded != plan.fingerprint:
        raise UserError(
            f"{plan.output} holds shards of another configuration "
            f"({_difference(recorded, plan.fingerprint)}); choose another output or delete it."
        )


@contextmanager
def exclusive_output(output: str) -> Iterator[None]:
    """Keep other drivers from a claimed local output, and leave no temporary file there. Raises
    UserError where another is at work. On a remote output nothing is locked: objects appear whole,
    and two drivers of one plan write the same bytes. Nor is what cannot be written to."""
    if storage.is_remote(output):
        yield
        return
    folder = storage.local_path(output)
    with ExitStack() as stack:
        try:
            is_alone = stack.enter_context(storage.locked_file(folder / PLAN_NAME))
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            yield
            return
        if not is_alone:
            raise UserError(f"another process is at work on {output}; wait for it, or end it.")
        _clean(folder)
        try:
            yield
        finally:  # tasks that were killed and repeated
            _clean(folder)


def _clean(folder: Path) -> None:
    for path in (folder, *(x for x in folder.iterdir() if x.is_dir())):
        storage.remove_temporaries(path)


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the first difference of two fingerprints in words."""
    for name in ("format", "layout", "configuration", "images", "versions"):
        old, new = before.get(name), now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted({*old, *new}):
                if old.get(key) != new.get(key):
                    return f"{name} {key}: {old.get(key)} before, {new.get(key)} now"
        elif old != new:
            return f"{name}: {old} before, {new} now"
    return "the source's files, labels or boxes have changed since"
