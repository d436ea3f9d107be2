"""How many trials of a search run at a time: all of them, their workers and the decoding of their images have room, and none waits for ever."""

from collections.abc import Sequence

from firstlight.pipeline.config.recipe import Scale, Stream
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.nodes import Node, amount, amounts, times
from firstlight.pipeline.run.ray_session import data_cpus

DRIVER_CPUS = 0.01  # of a trial whose workers do the work; Ray takes no 0


def of_driver(scale: Scale) -> dict[str, float]:
    """What Ray Tune reserves for the process of a trial, which does the work itself where there are no workers."""
    if scale.most:
        return {"CPU": DRIVER_CPUS}
    return {"CPU": float(scale.threads), **({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})}


def of_trial(scale: Scale, stream: Stream) -> Node:
    """What a trial takes in all: its process, its workers, and the tasks that decode for them."""
    driver = of_driver(scale)
    data = data_cpus(scale, stream) if scale.most else 0.0
    return Node(
        driver["CPU"] + scale.most * scale.cpus_per_worker + data,
        driver.get("GPU", 0.0) + scale.most * scale.gpus_per_worker,
    )


def trials_at_once(scale: Scale, stream: Stream, nodes: Sequence[Node], wanted: int | None = None) -> int:
    """At most `wanted`. Workers do not spread over machines, so what is left over on each is not counted.

    Raises:
        UserError: not even one trial fits; says what it needs and what there is.
    """
    need, have = of_trial(scale, stream), Node(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    cpus, gpus = (scale.cpus_per_worker, scale.gpus_per_worker) if scale.most else (need.cpus, need.gpus)
    pieces = sum(times(Node(cpus, gpus), node) for node in nodes)
    fit = min(times(need, have), pieces // max(scale.most, 1))
    if fit < 1:
        raise UserError(
            f"scale: {_told(scale, stream)} need {amount(need)}, there {_is(nodes)} {amounts(nodes)}; {_valid(scale, need, have)}"
        )
    return min(fit, wanted or fit)


def _told(scale: Scale, stream: Stream) -> str:
    if not scale.most:
        return f"a trial in one process of scale.threads: {scale.threads}"
    return f"the {scale.most} workers of a trial x {scale.cpus_per_worker:g} CPUs, {data_cpus(scale, stream):g} CPU for data and its own process"


def _is(nodes: Sequence[Node]) -> str:
    return "is" if len(nodes) == 1 else "are"


def _valid(scale: Scale, need: Node, have: Node) -> str:
    if need.gpus > have.gpus:
        return "valid: a smaller scale.gpus_per_worker or scale.workers"
    return (
        "valid: scale.workers=0, fewer workers or a smaller scale.cpus_per_worker"
        if scale.most
        else "valid: a smaller scale.threads"
    )
