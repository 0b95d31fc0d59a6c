import pytest
import torch

from model.classifier import Classifier


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(3, 8).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn((2, 3, 32, 48), generator=torch.Generator().manual_seed(1))
