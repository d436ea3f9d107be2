"""A cluster that scales itself: the wait until it has what a recipe needs."""

import math
import sys
import time
from typing import Any

from pipeline.config import Scale

POLL_S = 5.0


def fetch(scale: Scale, data_cpus: float) -> None:
    """Ask for the nodes that workers and decoding need, and wait for them, `scale.wait_s` at most. Not where they are there already."""
    import ray
    from ray.autoscaler.sdk import request_resources

    need = {"CPU": scale.workers * scale.cpus_per_worker + data_cpus, "GPU": scale.workers * scale.gpus_per_worker}
    if _there(need, ray.cluster_resources()):
        return
    told = f"waiting for nodes with {need['CPU']:g} CPUs and {need['GPU']:g} GPUs in all, for {scale.wait_s} s at most (scale.wait_s)"
    sys.stderr.write(f"note scale.workers: {told}\n")
    worker = {"CPU": scale.cpus_per_worker, **({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})}
    end = time.monotonic() + scale.wait_s
    request_resources(bundles=[worker] * scale.workers + [{"CPU": 1}] * math.ceil(data_cpus))
    try:
        while time.monotonic() < end and not _there(need, ray.cluster_resources()):
            time.sleep(POLL_S)
    finally:  # what was asked for is kept, and paid for, until it is taken back
        request_resources(bundles=[])


def _there(need: dict[str, float], have: dict[str, Any]) -> bool:
    return all(have.get(kind, 0.0) >= amount for kind, amount in need.items())
