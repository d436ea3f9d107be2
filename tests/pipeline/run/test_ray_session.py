import os
import sys
from typing import Any

import pytest
import torch

from firstlight.pipeline.config.scale import ScaleOptions, StreamOptions
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import ray_session
from firstlight.pipeline.run.ray_session import RaySession, check_cluster_resources, check_local_resources


def scale(**changes: Any) -> ScaleOptions:
    return ScaleOptions(**{"name": "test", "workers": 2, "cpus_per_worker": 1.0, **changes})


@pytest.mark.parametrize(
    ("changes", "cpus", "gpus"),
    [
        ({}, 3.0, 0.0),
        ({"workers": 1, "cpus_per_worker": 0.5}, 1.5, 0.0),
        ({"gpus_per_worker": 1.0}, 3.0, 2.0),
        ({"gpus_per_worker": 0.25}, 3.0, 0.5),
        ({"workers": 16, "cpus_per_worker": 0.0625}, 8.75, 0.0),
    ],
)
def test_resources_that_fit_exactly_are_accepted(changes: dict[str, Any], cpus: float, gpus: float) -> None:
    check_cluster_resources(scale(**changes), StreamOptions(), cpus, gpus, "this machine")
    with pytest.raises(UserError):
        check_cluster_resources(scale(**changes), StreamOptions(), cpus - 0.01, gpus, "this machine")
    if gpus:
        with pytest.raises(UserError):
            check_cluster_resources(scale(**changes), StreamOptions(), cpus, gpus - 0.01, "this machine")


@pytest.mark.fault(13, "three workers on three CPUs")
def test_too_many_workers_are_refused() -> None:
    with pytest.raises(UserError) as told:
        check_cluster_resources(
            scale(workers=3, cpus_per_worker=0.75), StreamOptions(task_cpus=0.2), 3.0, 0.0, "this machine"
        )
    assert str(told.value) == (
        "scale.workers: 3 workers x 0.75 CPUs + 1 CPU for data need 3.25 CPUs, this machine has 3; "
        "valid: fewer workers or a smaller scale.cpus_per_worker"
    )


@pytest.mark.fault(14, "CPUs that decoding needs")
@pytest.mark.parametrize(
    ("workers", "stream", "cpus"),
    [
        (1, {}, 1.0),  # never less than one CPU
        (1, {"tasks": 8, "task_cpus": 2.0}, 2.0),  # one task, however many may run
        (2, {"tasks": 2, "task_cpus": 0.25}, 1.0),
        (2, {"tasks": 2, "task_cpus": 1.0}, 3.0),  # the two of one worker, and one of the other
        (4, {"tasks": 3, "task_cpus": 0.5}, 5.0),
    ],
)
def test_cpus_kept_for_decoding_cover_waiting_tasks(workers: int, stream: dict[str, Any], cpus: float) -> None:
    assert ray_session.count_data_cpus(scale(workers=workers), StreamOptions(**stream)) == cpus


@pytest.mark.fault(14, "all CPUs taken by workers and waiting tasks")
def test_too_many_decoding_tasks_are_refused() -> None:
    with pytest.raises(UserError) as told:
        check_cluster_resources(scale(), StreamOptions(tasks=2, task_cpus=1.0), 4.0, 0.0, "this machine")
    assert str(told.value) == (
        "scale.workers: 2 workers x 1 CPUs + 3 CPU for data need 5 CPUs, this machine has 4; "
        "valid: fewer workers or a smaller scale.cpus_per_worker, stream.tasks or stream.task_cpus"
    )


@pytest.mark.parametrize(("gpus", "valid"), [(0.0, "0 to 0"), (1.0, "0 to 0.5")])
def test_too_many_gpus_are_refused(gpus: float, valid: str) -> None:
    with pytest.raises(UserError) as told:
        check_cluster_resources(scale(gpus_per_worker=1.0), StreamOptions(), 8.0, gpus, "the cluster at 'auto'")
    assert (
        str(told.value)
        == f"scale.gpus_per_worker: 2 workers x 1 need 2 GPUs, the cluster at 'auto' has {gpus:g}; valid: {valid}"
    )


@pytest.mark.fault(13, "too few CPUs and GPUs")
def test_this_machine_is_checked_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="need 3 CPUs, this machine has 2"):
        check_local_resources(scale(), StreamOptions())
    check_local_resources(scale(cpus=3), StreamOptions())
    check_local_resources(scale(cpus_per_worker=0.5, gpus_per_worker=0.5), StreamOptions())
    with pytest.raises(UserError, match=r"need 2 GPUs, this machine has 1; valid: 0 to 0\.5"):
        check_local_resources(scale(cpus=3, gpus_per_worker=1.0), StreamOptions())


def test_cluster_is_not_checked_against_the_local_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    check_local_resources(scale(workers=0), StreamOptions())
    check_local_resources(scale(workers=64, address="auto"), StreamOptions())


def test_without_workers_ray_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with RaySession(scale(workers=0)) as opened:
        assert not opened.start()
        assert not opened.started


def test_a_session_that_was_not_started_leaves_ray_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with RaySession(scale()) as session:
        pass
    assert not session.started


def test_the_environment_keeps_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "7"}
    monkeypatch.setattr(os, "environ", found)
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # it reads the token when it is imported
    ray_session._set_environment(scale(collective_timeout_s=33, address="auto"))
    assert found["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
    assert found["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] == "33"
    assert "RAY_AUTH_TOKEN" not in found, "a cluster has a token of its own"
    ray_session._set_environment(scale())
    assert found["RAY_AUTH_MODE"] == "token"
    assert len(found["RAY_AUTH_TOKEN"]) == 32


def test_local_ray_gets_cpus_and_memory_and_a_cluster_only_its_address() -> None:
    assert (
        ray_session._ray_arguments(scale(cpus=3, object_store_mb=100)).items()
        >= {"address": "local", "num_cpus": 3, "object_store_memory": 100 * 2**20}.items()
    )
    assert ray_session._ray_arguments(scale(address="10.0.0.1:6379", cpus=3)).keys() == {
        "address",
        "logging_level",
        "log_to_driver",
    }
