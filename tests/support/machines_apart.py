"""A Ray cluster of machines that share no files: raylets on this one, each with working folders of its own."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.mirror.places import CACHE_VARIABLE

# A worker of 1.5 leaves half a CPU for decoding.
MACHINE_CPUS = 2


@contextlib.contextmanager
def start_machines_apart(caches: list[Path], environment: dict[str, str]) -> Iterator[str]:
    """Starts a head without CPUs, which is this process's machine, and one machine for each of `caches`.

    Yields the address of the cluster.
    """
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        # Ray's own handler lets no thread but the first add a machine.
        patch.setattr("ray._private.utils.set_sigterm_handler", lambda handler: None)
        head: dict[str, Any] = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={**head, "include_log_monitor": False})
        for cache in caches:
            cluster.add_node(
                num_cpus=MACHINE_CPUS,
                object_store_memory=100 * 2**20,
                env_vars={**environment, CACHE_VARIABLE: str(cache)},
            )
        try:
            yield str(cluster.address)
        finally:
            ray.shutdown()
            cluster.shutdown()
