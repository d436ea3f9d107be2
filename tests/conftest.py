"""Fixtures: the gloo pool, one local Ray, and the real images where they are at hand."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from firstlight.pipeline.data.store import Store
from tests.support import recipes
from tests.support.gloo import Pool
from tests.support.paths import SHARED

# Read by Ray when it is imported.
os.environ.update(
    RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16), RAY_USAGE_STATS_ENABLED="0", RAY_DATA_LOG_LEVEL="ERROR"
)
torch.set_num_threads(1)
settings.register_profile("ci", deadline=None, max_examples=50)
settings.load_profile("ci")

CIFAR10 = SHARED / "data" / "cifar10"


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool3() -> Iterator[Pool]:
    pool = Pool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of its own with four logical CPUs."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def cifar10() -> Path:
    if not CIFAR10.is_dir():
        pytest.skip(f"the CIFAR-10 copy is not at {CIFAR10}")
    return CIFAR10


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return recipes.store(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def ray_free() -> None:
    """This process has no Ray: the code under test starts its own."""
    import ray

    ray.shutdown()
