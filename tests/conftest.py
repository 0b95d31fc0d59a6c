import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two cores are shared with Ray's workers

import pytest
import ray


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray of two CPUs, shared by all tests that submit tasks."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()
