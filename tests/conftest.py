"""Fixtures (gloo pools, a local Ray cluster, stores, MLflow's tables) and the order of tests that run in parallel."""

import atexit
import gc
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from firstlight.pipeline.data.augment.compiled import loading
from firstlight.pipeline.data.store import Store
from tests.support import digit_stores, mlflow_tables, recipes
from tests.support.blank_figures import save_blank
from tests.support.gloo import Pool
from tests.support.paths import SHARED
from tests.support.undrawn_figures import leave_undrawn

# Ray reads these variables when it is imported.
os.environ.update(
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(16),
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_LOG_LEVEL="ERROR",
    # Workers hardly get a CPU beside the other tests at Ray's niceness of 15, and the rest of Ray polls meanwhile.
    RAY_worker_niceness="0",
)
# Bytes of memory. The tests sync what they write, for which a disk would take a tenth of their time.
MEMORY, LEAST_MEMORY = Path("/dev/shm"), 6 * 2**30
if (
    "PYTEST_DEBUG_TEMPROOT" not in os.environ
    and os.access(MEMORY, os.W_OK)
    and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) >= LEAST_MEMORY
):
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)
torch.set_num_threads(1)
# Tests say which of the two makes their views, whatever the process has done before.
loading.PAYING_SECONDS = math.inf
settings.register_profile("ci", deadline=None, max_examples=50)
settings.load_profile("ci")

CIFAR10 = SHARED / "data" / "cifar10"
TESTS = Path(__file__).parent
RAY_CPUS = 4
# Seconds. A test on Ray takes 10 to 60 on an idle machine, and many times that beside other work.
RAY_TIMEOUT = 1200


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
def forked_ray_workers() -> Iterator[None]:
    """Makes every Ray that tests start fork its workers, and shuts down the last one when the session ends."""
    from tests.support.forked_ray_workers import fork_workers

    with fork_workers():
        yield
        import ray

        ray.shutdown()


@pytest.fixture
def ray_local(forked_ray_workers: None) -> None:
    """Connects to the local Ray cluster that tests share. It has four logical CPUs.

    The first test that needs the cluster starts it, and so does the next one after a test with `ray_free`, or after
    one that failed and left something behind that holds CPUs.
    """
    import ray

    if ray.is_initialized() and ray.cluster_resources().get("CPU") == RAY_CPUS and _are_cpus_free():
        return
    ray.shutdown()
    ray.init(
        address="local",
        num_cpus=RAY_CPUS,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )


def _are_cpus_free() -> bool:
    """Waits a little for all CPUs of the cluster: actors of the test before may still be ending."""
    import ray

    end = time.monotonic() + 20
    while time.monotonic() < end:
        if ray.available_resources().get("CPU") == RAY_CPUS:
            return True
        time.sleep(0.2)
    return False


@pytest.fixture
def ray_free(forked_ray_workers: None) -> None:
    """Shuts Ray down in this process: the code under test starts its own."""
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def cifar10() -> Path:
    if not CIFAR10.is_dir():
        pytest.skip(f"the CIFAR-10 copy is not at {CIFAR10}")
    return CIFAR10


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Gives the next test one thread of torch, whatever the recipe of this one had."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return recipes.store(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session", autouse=True)
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fills new MLflow databases of this process from a template. Does nothing if no test uses MLflow."""
    if "firstlight.pipeline.tracking.client" not in sys.modules:
        yield
        return
    template = mlflow_tables.make_template(tmp_path_factory.mktemp("tables") / "template.db")
    with pytest.MonkeyPatch.context() as patch:
        mlflow_tables.copy_tables_from(template, patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _seeds_stay_in_this_process() -> Iterator[None]:
    """Starts no other process for seeds, as tests replace parts of this one; on a busy machine any stage is long."""
    module = sys.modules.get("firstlight.pipeline.run.launching.side_processes")
    with pytest.MonkeyPatch.context() as patch:
        if module is not None:
            patch.setattr(module, "WORTHWHILE_SECONDS", 3600.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _digit_stores_are_copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        digit_stores.copy_written_stores(tmp_path_factory.mktemp("digit-stores"), patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _browser_ends_with_session() -> Iterator[None]:
    yield
    if "tests.support.browser" in sys.modules:
        sys.modules["tests.support.browser"].close_browser()


@pytest.fixture(scope="module")
def blank_figures() -> Iterator[None]:
    """Saves figures as blank files. For modules whose tests need the files and not what the figures show."""
    with save_blank():
        yield


@pytest.fixture(scope="module")
def undrawn_figures() -> Iterator[None]:
    """Saves figures as blank files, without drawing them. For modules whose tests look at something else."""
    with leave_undrawn():
        yield


# Tests that run whole recipes come first, so that no long file is left when the others have ended.
LONG_FIRST = (
    "test_docs_site",
    "integration",
    "pipeline/search",
    "pipeline/run",
    "pipeline/stages",
    "pipeline/cli",
    "pipeline",
    "bench",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("ray"):
        item.add_marker(pytest.mark.xdist_group("ray"))
        item.add_marker(pytest.mark.timeout(RAY_TIMEOUT), append=False)


def pytest_collection() -> None:
    """Collects no garbage while pytest collects tests: what it makes stays."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_sort_key)


def pytest_collection_finish() -> None:
    """Leaves the modules and the tests out of all later searches for garbage: these would take a tenth of the time."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # A process of tests ends here: to look through a million objects, as pytest would, and to free them one by one
        # would take it longer than the ten seconds that it is given.
        gc.freeze()
        atexit.register(os._exit, 0)
    else:
        gc.unfreeze()


def _sort_key(item: pytest.Item) -> tuple[bool, bool, int]:
    """Tests on Ray first, of these those that share a cluster; then by place. Within a file the order stays."""
    file = item.path.relative_to(TESTS).as_posix()
    place = next((k for k, prefix in enumerate(LONG_FIRST) if file.startswith(prefix)), len(LONG_FIRST))
    on_ray = item.get_closest_marker("ray") is not None
    return not on_ray, on_ray and "ray_local" not in getattr(item, "fixturenames", ()), place


class _FilesAndRay(LoadScopeScheduling):
    """The tests of a file run in one process, and all tests on Ray in one: a second cluster would take its CPUs."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.endswith("@ray") else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    if config.getvalue("dist") != "loadgroup":
        return None
    config.option.loadscopereorder = False
    return _FilesAndRay(config, log)
