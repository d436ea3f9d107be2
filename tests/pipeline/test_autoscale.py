"""A cluster that scales itself, stood in for by what it says."""

from collections.abc import Callable
from typing import Any

import pytest
import ray
import ray.autoscaler.sdk

from pipeline import autoscale
from pipeline.config import Scale

SCALE = Scale(name="cluster", address="auto", workers=2, cpus_per_worker=2.0, gpus_per_worker=1.0, wait_s=60)
Cluster = Callable[[dict[str, float], int], list[Any]]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    def stand(has: dict[str, float], looks: int) -> list[Any]:
        """It has it from the look of that number on; what it is asked for is in the list."""
        asked: list[Any] = []
        seen = iter([{"memory": 1.0}] * looks)
        monkeypatch.setattr(ray, "cluster_resources", lambda: next(seen, has))
        monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(bundles))
        monkeypatch.setattr(autoscale, "POLL_S", 0.0)
        return asked

    return stand


def test_nodes_are_asked_for_waited_for_and_no_longer_asked_for(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    asked = cluster({"CPU": 5.5, "GPU": 2.0}, 4)
    autoscale.fetch(SCALE, 1.5)
    assert asked == [[{"CPU": 2.0, "GPU": 1.0}] * 2 + [{"CPU": 1}] * 2, []]
    told = "waiting for nodes with 5.5 CPUs and 2 GPUs in all, for 60 s at most (scale.wait_s)"
    assert capsys.readouterr().err == f"note scale.workers: {told}\n"
    assert ray.cluster_resources() == {"CPU": 5.5, "GPU": 2.0}


def test_nothing_is_asked_of_a_cluster_that_has_it(cluster: Cluster) -> None:
    asked = cluster({"CPU": 5.5, "GPU": 2.0}, 0)
    autoscale.fetch(SCALE, 1.5)
    assert asked == []


def test_nodes_that_do_not_come_are_no_longer_asked_for(cluster: Cluster) -> None:
    asked = cluster({"CPU": 5.0, "GPU": 2.0}, 1)
    autoscale.fetch(SCALE.model_copy(update={"wait_s": 0}), 1.5)
    assert asked[-1] == []


def test_nor_are_they_where_the_wait_is_broken_off(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cluster({}, 1)
    monkeypatch.setattr(autoscale.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        autoscale.fetch(SCALE, 1.5)
    assert asked[-1] == []
