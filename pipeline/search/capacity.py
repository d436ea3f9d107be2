"""The number of trials that run at the same time: each has resources for its process, workers and image decoding."""

from collections.abc import Sequence

from firstlight.pipeline.config.scale import ScaleOptions, StreamOptions
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.nodes import Node, count_fits, describe_node, describe_nodes
from firstlight.pipeline.run.ray_session import count_data_cpus

# CPUs of the process of a trial whose workers do the computation. Ray does not accept 0.
DRIVER_CPUS = 0.01


def driver_resources(scale: ScaleOptions) -> dict[str, float]:
    """Returns what Ray Tune reserves for the process of a trial, which does all the work if there are no workers."""
    if scale.max_workers:
        return {"CPU": DRIVER_CPUS}
    return {"CPU": float(scale.worker_threads), **({"GPU": scale.worker_gpus} if scale.worker_gpus else {})}


def trial_resources(scale: ScaleOptions, stream: StreamOptions) -> Node:
    """Returns all resources of a trial: its process, its workers, and the tasks that decode images for them."""
    driver = driver_resources(scale)
    data = count_data_cpus(scale, stream) if scale.max_workers else 0.0
    return Node(
        driver["CPU"] + scale.max_workers * scale.cpus_per_worker + data,
        driver.get("GPU", 0.0) + scale.max_workers * scale.worker_gpus,
    )


def max_concurrent_trials(
    scale: ScaleOptions, stream: StreamOptions, nodes: Sequence[Node], limit: int | None = None
) -> int:
    """Returns how many trials fit on the nodes, at most `limit`.

    A worker runs on one node, so resources that are left over on several nodes do not add up to one more worker.

    Raises:
        UserError: not even one trial fits. The message says what it needs and what the nodes have.
    """
    need = trial_resources(scale, stream)
    have = Node(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    cpus, gpus = (scale.cpus_per_worker, scale.worker_gpus) if scale.max_workers else (need.cpus, need.gpus)
    workers = sum(count_fits(Node(cpus, gpus), node) for node in nodes)
    fit = min(count_fits(need, have), workers // max(scale.max_workers, 1))
    if fit < 1:
        raise UserError(
            f"scale: {_describe_trial(scale, stream)} need {describe_node(need)}, available: {describe_nodes(nodes)}; "
            f"valid: {_suggest_scale(scale, need, have)}"
        )
    return min(fit, limit or fit)


def _describe_trial(scale: ScaleOptions, stream: StreamOptions) -> str:
    if not scale.max_workers:
        return f"the threads of a trial (scale.threads: {scale.worker_threads})"
    return (
        f"the {scale.max_workers} workers of a trial x {scale.cpus_per_worker:g} CPUs, "
        f"{count_data_cpus(scale, stream):g} CPU for data and its own process"
    )


def _suggest_scale(scale: ScaleOptions, need: Node, have: Node) -> str:
    if need.gpus > have.gpus:
        return "a smaller scale.worker_gpus or scale.workers"
    if scale.max_workers:
        return "scale.workers=0, fewer workers or a smaller scale.cpus_per_worker"
    return "a smaller scale.threads"
