import tarfile
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"


def unpack(archive: str, folder: Path) -> Path:
    path = SHARED / archive
    if not path.is_file():
        pytest.skip(f"{archive} is not in ../shared/data")
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.split(".")[0]


@pytest.fixture(scope="session")
def imagenet_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 ImageNet images, named <wnid>_<words>.JPEG."""
    return unpack("imagenet-samples.tar", tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="session")
def tiny_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny ImageNet, 20 of its classes: 10,000 train and 1000 val images."""
    return unpack("tiny-imagenet-20.tar.gz", tmp_path_factory.mktemp("tiny"))
