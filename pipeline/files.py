"""The bytes of a source's images: whole files, or ranges of archives that are opened once."""

import os
from pathlib import Path
from types import TracebackType

from pipeline.storage import DataError


class SourceFiles:
    """Reads images by (path, offset, size) from the folder `source`; see pipeline/listing.py.

    A context manager, which closes the archives that it opened.
    """

    def __init__(self, source: str) -> None:
        self.source = Path(source)
        if not self.source.is_dir():
            raise DataError(f"source {source} is not there on this node; mount it on every node.")
        self._archives: dict[str, int] = {}

    def read(self, path: str, offset: int | None, size: int | None) -> bytes:
        """The bytes of one image. Raises OSError as the file system does, and DataError where an
        archive ends before the image does."""
        if offset is None or size is None:
            return (self.source / path).read_bytes()
        if path not in self._archives:
            self._archives[path] = os.open(self.source / path, os.O_RDONLY)
        data = os.pread(self._archives[path], size, offset)
        if len(data) != size:
            raise DataError(
                f"{self.source / path} has {len(data)} of {size} bytes at {offset}: it has changed "
                "since it was listed; run the same command again."
            )
        return data

    def __enter__(self) -> "SourceFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._archives.values():
            os.close(descriptor)
        self._archives.clear()
