"""Flags of the jobs that load augmented batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cli import check_bounds, option
from pipeline.errors import UserError
from pipeline.loading.cache import DEFAULT_LIMIT, GIB, CacheConfig, cached_bytes, check_use
from pipeline.loading.order import shuffle_window
from pipeline.shards.format import Manifest, split_of
from pipeline.storage import is_remote

if TYPE_CHECKING:  # a command's flags are read without torch, which takes seconds to load
    import torch

    from pipeline.loading.augmentation import Augmentation


@dataclass(frozen=True, kw_only=True)
class LoadingConfig:
    """What every command that loads batches asks for."""

    data: str = option(help="shards that jobs.preprocess wrote: a folder, or a URI (s3://...)")
    cache: Path | None = option(
        None, help="folder for shards of a remote set (default: in the user's cache folder)"
    )
    cache_limit: float = option(DEFAULT_LIMIT, above=0, help="GiB that its files may take together")
    min_crop_area: float = option(0.7, above=0, high=1, help="smallest share of an image in a crop")
    max_crop_aspect: float = option(1.16, low=1, help="largest change of a crop's aspect")
    flip: bool = option(True, help="mirror half of the images left to right")
    translation: float = option(
        0.0, low=0, below=1, help="largest share of the side by which a crop reaches over the edge"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        check_use(self.data, self.cache, self.cache_limit)

    def augmentation(self) -> "Augmentation":
        """Return how images are augmented."""
        from pipeline.loading.augmentation import Augmentation

        return Augmentation(
            min_area=self.min_crop_area,
            max_aspect=self.max_crop_aspect,
            flip=self.flip,
            translation=self.translation,
        )

    def cache_config(self) -> CacheConfig:
        """Return the cache of a remote set."""
        return CacheConfig(folder=self.cache, limit_bytes=round(self.cache_limit * GIB))

    def window(self, manifest: Manifest) -> int | None:
        """Return how many train shards are shuffled together (see `epoch_order`): None, that is
        all, of a local set; of a remote one what the cache's limit allows."""
        if not is_remote(self.data):
            return None
        sizes = [cached_bytes(shard) for shard in split_of(manifest, "train").shards]
        return shuffle_window(sizes, self.cache_config().limit_bytes)


def choose_device(name: str) -> "torch.device":
    """Return the device of that name; auto: cuda if any. Raises UserError for cuda without one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
