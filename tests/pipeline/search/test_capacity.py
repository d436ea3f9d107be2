"""Concurrent trials: as many as fit on one machine or on many. A trial that cannot fit is refused."""

import pytest

from firstlight.pipeline.config.scale import ScaleOptions, StreamOptions
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.nodes import Node
from firstlight.pipeline.search.capacity import driver_resources, max_concurrent_trials, trial_resources

STREAM = StreamOptions()


def scale(**fields: object) -> ScaleOptions:
    return ScaleOptions.model_validate({"name": "local", **fields})


@pytest.mark.fault(15, "trials at a time, by room")
@pytest.mark.parametrize(
    ("fields", "nodes", "fit"),
    [
        ({"workers": 0}, [(2, 0)], 2),
        ({"workers": 0, "threads": 2}, [(2, 0)], 1),
        ({"workers": 0, "gpus_per_worker": 1.0}, [(16, 2)], 2),
        ({"workers": 0, "gpus_per_worker": 0.5}, [(16, 2)], 4),
        ({"workers": 1, "cpus_per_worker": 0.5}, [(2, 0)], 1),  # 0.5 + 1 for data + its own process
        ({"workers": 1, "cpus_per_worker": 1.0}, [(5, 0)], 2),
        ({"workers": 2, "cpus_per_worker": 1.0}, [(200, 0)], 66),
        ({"workers": 2, "cpus_per_worker": 1.0, "gpus_per_worker": 1.0}, [(64, 8)], 4),
        ({"workers": 4, "cpus_per_worker": 2.0, "gpus_per_worker": 1.0}, [(32, 4)] * 3, 3),
        ({"workers": 2, "cpus_per_worker": 3.0}, [(4, 0)] * 5, 2),  # 20 CPUs, but one worker a machine
    ],
)
def test_all_resources_are_used_and_not_exceeded(
    fields: dict[str, object], nodes: list[tuple[float, float]], fit: int
) -> None:
    there = [Node(cpus, gpus) for cpus, gpus in nodes]
    assert max_concurrent_trials(scale(**fields), STREAM, there) == fit
    need = trial_resources(scale(**fields), STREAM)
    assert fit * need.cpus <= sum(node.cpus for node in there) + 1e-6
    assert fit * need.gpus <= sum(node.gpus for node in there) + 1e-6


def test_limit_is_not_exceeded() -> None:
    assert max_concurrent_trials(scale(workers=0), STREAM, [Node(8, 0)], limit=3) == 3
    assert max_concurrent_trials(scale(workers=0), STREAM, [Node(2, 0)], limit=3) == 2


@pytest.mark.fault(15, "a trial that cannot fit")
@pytest.mark.parametrize(
    ("fields", "nodes", "message"),
    [
        (
            {"workers": 2, "cpus_per_worker": 1.0},
            [Node(2, 0)],
            "scale: the 2 workers of a trial x 1 CPUs, 1 CPU for data and its own process need 3.01 CPUs, "
            "available: 2 CPUs; valid: scale.workers=0, ",
        ),
        (
            {"workers": 0, "threads": 4},
            [Node(2, 0)],
            "scale: the threads of a trial (scale.threads: 4) need 4 CPUs, available: 2 CPUs; valid: a smaller ",
        ),
        (
            {"workers": 0, "gpus_per_worker": 1.0},
            [Node(8, 0)],
            "scale: the threads of a trial (scale.threads: 1) need 1 CPUs and 1 GPUs, available: 8 CPUs; valid: ",
        ),
        (
            {"workers": 2, "cpus_per_worker": 3.0},
            [Node(4, 0), Node(2, 0)],
            "scale: the 2 workers of a trial x 3 CPUs, ",
        ),
    ],
)
def test_trial_that_cannot_fit_is_refused(fields: dict[str, object], nodes: list[Node], message: str) -> None:
    with pytest.raises(UserError) as caught:
        max_concurrent_trials(scale(**fields), STREAM, nodes)
    assert str(caught.value).startswith(message)


def test_driver_takes_what_its_process_computes_with() -> None:
    assert driver_resources(scale(workers=2)) == {"CPU": 0.01}
    assert driver_resources(scale(workers=0, threads=2)) == {"CPU": 2.0}
    assert driver_resources(scale(workers=0, gpus_per_worker=0.5)) == {"CPU": 1.0, "GPU": 0.5}
