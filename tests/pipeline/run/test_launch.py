"""Workers leave CPUs for decoding."""

from pathlib import Path

import pytest

from firstlight.pipeline.run import launch
from firstlight.pipeline.run.launch import describe_crowding
from firstlight.pipeline.train.failures import PreemptionNotice
from tests.support import recipes
from tests.support.cluster_scale import scale


@pytest.mark.parametrize(
    ("workers", "cpus", "crowd"), [(1, 1.75, False), (1, 1.5, True), (2, 3.5, False), (2, 3.25, True), (4, 7.0, False)]
)
def test_workers_that_leave_nothing_for_decoding_are_refused(
    tmp_path: Path, workers: int, cpus: float, crowd: bool
) -> None:
    """Every worker needs one decoding task, of a quarter of a CPU."""
    told = describe_crowding(recipes.recipe(tmp_path, **scale("auto", [1, 4])), workers, cpus)
    assert (told is not None) == crowd
    if told:
        assert told.startswith(f"scale.workers: {workers} workers leave {cpus - 1.5 * workers:g} CPUs of the cluster")


def test_notice_of_ray_is_reported_with_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.train
    from ray.train.v2.api.preemption import PreemptionInfo

    found: list[PreemptionInfo | None] = [None, PreemptionInfo(None, {"b": [3], "a": [0, 1]})]
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: found.pop(0))
    assert launch._read_preemption() is None
    assert launch._read_preemption() == PreemptionNotice(2, (0, 1, 3))
