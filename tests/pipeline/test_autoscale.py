"""A cluster that scales itself, stood in for by what it says: it is judged by what it could have, and waited for."""

from collections.abc import Callable
from typing import Any

import pytest
import ray
import ray.autoscaler.sdk
from ray._private.state import state

from pipeline import autoscale
from pipeline.config import Scale
from pipeline.errors import UserError

SCALE = Scale(name="cluster", address="auto", workers=2, cpus_per_worker=2.0, gpus_per_worker=1.0)


class Cluster:
    """It has nothing until it is asked, and what it could have three looks later."""

    def __init__(self, could: dict[str, float], late: int = 3) -> None:
        self.could, self.late = could, late
        self.asked: list[Any] = []

    def have(self) -> dict[str, float]:
        self.late -= bool(self.asked)
        return {"memory": 1.0} if self.late > 0 else self.could


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster], Cluster]:
    def stand(cluster: Cluster) -> Cluster:
        monkeypatch.setattr(ray, "cluster_resources", cluster.have)
        monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: cluster.could or None)
        monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: cluster.asked.append(bundles))
        monkeypatch.setattr(autoscale, "POLL_S", 0.0)
        return cluster

    return stand


def test_it_is_judged_by_what_it_could_have(standing: Callable[[Cluster], Cluster]) -> None:
    standing(Cluster({"CPU": 64, "GPU": 8}))
    assert autoscale.most() == (64.0, 8.0)
    standing(Cluster({}))
    assert autoscale.most() == (0.0, 0.0)


def test_nodes_are_asked_for_waited_for_and_no_longer_asked_for(standing: Callable[[Cluster], Cluster], capsys: pytest.CaptureFixture[str]) -> None:
    cluster = standing(Cluster({"CPU": 64.0, "GPU": 8.0}))
    autoscale.fetch(SCALE, 1.5)
    assert cluster.asked == [[{"CPU": 2.0, "GPU": 1.0}] * 2 + [{"CPU": 1}] * 2, []]
    assert capsys.readouterr().err == "note scale.workers: waiting for nodes with 5.5 CPUs and 2 GPUs in all\n"


def test_nothing_is_asked_of_a_cluster_that_has_it(standing: Callable[[Cluster], Cluster]) -> None:
    cluster = standing(Cluster({"CPU": 5.5, "GPU": 2.0}, late=0))
    autoscale.fetch(SCALE, 1.5)
    assert cluster.asked == []


def test_nodes_that_do_not_come_are_told_and_no_longer_asked_for(standing: Callable[[Cluster], Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = standing(Cluster({"CPU": 5.0, "GPU": 2.0}))
    monkeypatch.setattr(autoscale, "WAIT_S", 0.05)
    with pytest.raises(
        UserError, match=r"^scale\.workers: after 0 s the cluster has 5 CPUs and 2 GPUs of 5\.5 and 2; `ray status` on the head says why$"
    ):
        autoscale.fetch(SCALE, 1.5)
    assert cluster.asked[-1] == []
