"""The machines of a Ray cluster: their resources, a check that the workers fit, and waiting for a cluster to grow."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from firstlight.pipeline.config.scale import ScaleOptions
from firstlight.pipeline.errors import UserError

# Seconds between two checks of a growing cluster.
NODE_POLL_S = 2.0


@dataclass(frozen=True)
class Node:
    """The CPUs and GPUs of a machine, as Ray counts them."""

    cpus: float
    gpus: float


def list_live_nodes() -> list[Node]:
    """Returns the live machines of the cluster that this process has joined."""
    import ray

    found = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [Node(float(has.get("CPU", 0.0)), float(has.get("GPU", 0.0))) for has in found]


def count_fits(need: Node, have: Node) -> int:
    """Returns how many times `need` fits into `have`. `need` must have a CPU or GPU share above 0."""
    fits = [
        int((there + 1e-6) / wanted) for wanted, there in ((need.cpus, have.cpus), (need.gpus, have.gpus)) if wanted
    ]
    return min(fits)


def check_worker_fit(scale: ScaleOptions, nodes: Sequence[Node], where: str) -> None:
    """Checks that the workers fit, each on one machine. `where` names the cluster.

    Raises:
        UserError: names the key and the resources of the machines.
    """
    fit = sum(count_fits(Node(scale.cpus_per_worker, scale.worker_gpus), node) for node in nodes)
    if fit < scale.min_workers:
        gpus = f" and {scale.worker_gpus:g} GPUs" if scale.worker_gpus else ""
        raise UserError(
            f"scale.workers: {scale.min_workers} workers x {scale.cpus_per_worker:g} CPUs{gpus} do not fit on the "
            f"machines one by one: "
            f"{where} has machines of {describe_nodes(nodes)}; valid: 0 to {fit}, or a smaller scale.cpus_per_worker"
        )


def describe_node(node: Node) -> str:
    return f"{node.cpus:g} CPUs" + (f" and {node.gpus:g} GPUs" if node.gpus else "")


def describe_nodes(nodes: Sequence[Node]) -> str:
    return ", ".join(describe_node(node) for node in nodes[:4]) + (
        f" and {len(nodes) - 4} more machines" if len(nodes) > 4 else ""
    )


def wait_for_nodes(
    scale: ScaleOptions, data: float, check: Callable[[list[Node]], None], notify: Callable[[str], None]
) -> None:
    """Waits until `check` accepts the machines, at most `scale.wait_s` seconds.

    Requests machines for `scale.max_workers` workers and `data` more CPUs from the cluster's autoscaler. `notify` is
    called with a message for the user once it has to wait.

    Raises:
        UserError: the last one of `check`, when the time is over.
    """
    from ray.autoscaler.sdk import request_resources

    end, asked = time.monotonic() + scale.wait_s, False
    while True:
        try:
            check(list_live_nodes())
            return
        except UserError as error:
            if time.monotonic() >= end:
                raise
            if not asked:
                worker = {
                    "CPU": scale.cpus_per_worker,
                    **({"GPU": scale.worker_gpus} if scale.worker_gpus else {}),
                }
                request_resources(bundles=[worker] * scale.max_workers + [{"CPU": 1.0}] * max(round(data), 1))
                notify(f"waiting for machines, at most {scale.wait_s:g} s (scale.wait_s): {error}")
                asked = True
        time.sleep(min(NODE_POLL_S, max(end - time.monotonic(), 0.1)))


def withdraw_request() -> None:
    """Withdraws the request for machines, so that the autoscaler may remove idle ones."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[])
