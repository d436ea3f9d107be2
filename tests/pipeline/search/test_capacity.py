"""How many trials run at a time: no more than have room together, on one machine and on many, and a trial that cannot fit is refused."""

import pytest

from firstlight.pipeline.config.recipe import Scale, Stream
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.nodes import Node
from firstlight.pipeline.search.capacity import of_driver, of_trial, trials_at_once

STREAM = Stream()


def scale(**fields: object) -> Scale:
    return Scale.model_validate({"name": "local", **fields})


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
def test_as_many_as_fit(fields: dict[str, object], nodes: list[tuple[float, float]], fit: int) -> None:
    there = [Node(cpus, gpus) for cpus, gpus in nodes]
    assert trials_at_once(scale(**fields), STREAM, there) == fit
    need = of_trial(scale(**fields), STREAM)
    assert fit * need.cpus <= sum(node.cpus for node in there) + 1e-6
    assert fit * need.gpus <= sum(node.gpus for node in there) + 1e-6


def test_no_more_than_are_wanted() -> None:
    assert trials_at_once(scale(workers=0), STREAM, [Node(8, 0)], wanted=3) == 3
    assert trials_at_once(scale(workers=0), STREAM, [Node(2, 0)], wanted=3) == 2


@pytest.mark.fault(15, "a trial that cannot fit")
@pytest.mark.parametrize(
    ("fields", "nodes", "told"),
    [
        ({"workers": 2, "cpus_per_worker": 1.0}, [Node(2, 0)],
         "scale: the 2 workers of a trial x 1 CPUs, 1 CPU for data and its own process need 3.01 CPUs, there is 2 CPUs; valid: scale.workers=0, "),
        ({"workers": 0, "threads": 4}, [Node(2, 0)], "scale: a trial in one process of scale.threads: 4 need 4 CPUs, there is 2 CPUs; valid: "),
        ({"workers": 0, "gpus_per_worker": 1.0}, [Node(8, 0)], "scale: a trial in one process of scale.threads: 1 need 1 CPUs and 1 GPUs, there "),
        ({"workers": 2, "cpus_per_worker": 3.0}, [Node(4, 0), Node(2, 0)], "scale: the 2 workers of a trial x 3 CPUs, "),
    ],
)  # fmt: skip
def test_one_that_cannot_fit_is_refused(fields: dict[str, object], nodes: list[Node], told: str) -> None:
    with pytest.raises(UserError) as caught:
        trials_at_once(scale(**fields), STREAM, nodes)
    assert str(caught.value).startswith(told)


def test_what_ray_reserves_for_the_process_of_a_trial() -> None:
    assert of_driver(scale(workers=2)) == {"CPU": 0.01}
    assert of_driver(scale(workers=0, threads=2)) == {"CPU": 2.0}
    assert of_driver(scale(workers=0, gpus_per_worker=0.5)) == {"CPU": 1.0, "GPU": 0.5}
