"""A cluster that scales itself: what it could have, and the wait until it has what a recipe needs."""

import math
import sys
import time
from typing import Any

from pipeline.config import Scale
from pipeline.errors import UserError

WAIT_S, POLL_S = 1800.0, 5.0  # that nodes have to come, and between looks


def most() -> tuple[float, float]:
    """CPUs and GPUs that the cluster has, or will have once its autoscaler has started every node that it may."""
    import ray
    from ray._private.state import state

    have, could = ray.cluster_resources(), state.get_max_resources_from_cluster_config() or {}
    cpus, gpus = (max(have.get(kind, 0.0), float(could.get(kind, 0))) for kind in ("CPU", "GPU"))
    return cpus, gpus


def fetch(scale: Scale, data_cpus: float) -> None:
    """Ask for the nodes that workers and decoding need, and wait for them. Not where they are there already.

    Raises:
        UserError: they have not come after `WAIT_S`.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    need = {"CPU": scale.workers * scale.cpus_per_worker + data_cpus, "GPU": scale.workers * scale.gpus_per_worker}
    if _there(need, ray.cluster_resources()):
        return
    sys.stderr.write(f"note scale.workers: waiting for nodes with {need['CPU']:g} CPUs and {need['GPU']:g} GPUs in all\n")
    worker = {"CPU": scale.cpus_per_worker, **({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})}
    end = time.monotonic() + WAIT_S
    request_resources(bundles=[worker] * scale.workers + [{"CPU": 1}] * math.ceil(data_cpus))
    try:
        while not _there(need, have := ray.cluster_resources()):
            if time.monotonic() > end:
                told = f"after {WAIT_S:.0f} s the cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
                raise UserError(f"scale.workers: {told} of {need['CPU']:g} and {need['GPU']:g}; `ray status` on the head says why")
            time.sleep(POLL_S)
    finally:  # what was asked for is kept, and paid for, until it is taken back
        request_resources(bundles=[])


def _there(need: dict[str, float], have: dict[str, Any]) -> bool:
    return all(have.get(kind, 0.0) >= amount for kind, amount in need.items())
