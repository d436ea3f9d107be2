"""The Ray cluster that tests share: the same after a test that shut Ray down, and its workers are forked."""

import os
from typing import Any

import pytest


@pytest.mark.ray
def test_shared_cluster_has_four_cpus_again_after_a_test_without_ray(
    ray_free: None, request: pytest.FixtureRequest
) -> None:
    import ray

    assert not ray.is_initialized()
    request.getfixturevalue("ray_local")
    assert ray.cluster_resources()["CPU"] == 4


@pytest.mark.ray
def test_workers_are_forked_with_variables_of_their_own(ray_local: None) -> None:
    import ray

    @ray.remote
    def describe_worker() -> tuple[str | None, list[str]]:
        import psutil

        return os.environ.get("OF_ONE_TASK"), psutil.Process(os.getppid()).cmdline()

    remote: Any = describe_worker
    with_variable = remote.options(runtime_env={"env_vars": {"OF_ONE_TASK": "7"}})
    answers = ray.get([remote.remote(), with_variable.remote(), remote.remote()])
    assert [variable for variable, _ in answers] == [None, "7", None]
    assert all("tests.support.forked_ray_workers" in parent for _, parent in answers)


@pytest.mark.ray
def test_forked_workers_draw_other_random_ids(ray_local: None) -> None:
    import ray

    @ray.remote
    class Worker:
        def draw_id(self) -> str:
            return str(ray.ObjectID.from_random().hex())

    kind: Any = Worker
    one, other = kind.remote(), kind.remote()
    assert len(set(ray.get([one.draw_id.remote(), other.draw_id.remote()]))) == 2
