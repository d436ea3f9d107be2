import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from firstlight.pipeline.config.scale import ScaleOptions, StreamOptions
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import ray_session
from firstlight.pipeline.run.ray_folder import RayFolder
from firstlight.pipeline.run.ray_session import RaySession, check_cluster_resources, check_local_resources
from tests.support.paths import ROOT


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
    with pytest.raises(UserError, match="this machine has 1;"):
        check_local_resources(scale(workers=64), StreamOptions())


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
    assert found["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "1", "a cloud may take its machines away"
    assert "RAY_AUTH_TOKEN" not in found, "a cluster has a token of its own"
    del found["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"]
    ray_session._set_environment(scale())
    assert found["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
    assert found["RAY_AUTH_MODE"] == "token"
    assert len(found["RAY_AUTH_TOKEN"]) == 32


def test_local_ray_gets_cpus_memory_and_a_folder_and_a_cluster_only_its_address() -> None:
    local, folder = scale(cpus=3, object_store_mb=100), RayFolder(Path("/tmp/x/r"), Path("/long/y"))
    found = ray_session._ray_arguments(local, folder)
    assert found.items() >= {"address": "local", "num_cpus": 3, "object_store_memory": 100 * 2**20}.items()
    assert (found["_temp_dir"], found["object_spilling_directory"]) == ("/tmp/x/r", "/long/y")
    assert "object_spilling_directory" not in ray_session._ray_arguments(local, RayFolder(Path("/tmp/x/r"), None))
    assert ray_session._ray_arguments(scale(address="10.0.0.1:6379", cpus=3), None).keys() == {
        "address",
        "logging_level",
        "log_to_driver",
    }


# Prints the addresses at which Ray's processes listen, the modes of its folder, and what the folder's place holds then.
LOOK_AT_RAY = """
import os, sys
from pathlib import Path
import psutil
from firstlight.pipeline.config.scale import ScaleOptions
from firstlight.pipeline.run.ray_session import RaySession
with RaySession(ScaleOptions(name="test", workers=1, cpus=2, object_store_mb=100)) as session:
    session.start()
    import ray
    print("answer", ray.get(ray.remote(lambda: 6 * 7).remote()))
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                print("listens", connection.laddr.ip)
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    made = next(parent for parent in folder.parents if parent.name.startswith("fl-ray-"))
    print("folder", made, oct(made.stat().st_mode & 0o777))
print("left", made.exists())
"""


@pytest.mark.ray
@pytest.mark.fault(56, "a folder for temporary files with a long path")
@pytest.mark.parametrize("length", [0, 60])
def test_local_ray_listens_at_loopback_in_a_closed_folder_and_leaves_nothing(tmp_path: Path, length: int) -> None:
    long = tmp_path / ("x" * length)
    long.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"TMPDIR": str(long) if length else "/tmp", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOOK_AT_RAY], capture_output=True, text=True, env=environment, timeout=600
    )
    lines = done.stdout.splitlines()
    assert "answer 42" in lines, done.stderr
    assert {line for line in lines if line.startswith("listens")} <= {"listens 127.0.0.1", "listens ::ffff:127.0.0.1"}
    (folder,) = (line for line in lines if line.startswith("folder"))
    assert folder.startswith("folder /tmp/fl-ray-")
    assert folder.endswith(" 0o700")
    assert lines[-1] == "left False"
    assert not list(long.glob("fl-ray-*")), "nothing is left where objects would have been spilled"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        # The error as Ray raises it.
        (
            Exception("The current node timed out during startup. This could ..."),
            "local': Ray did not start within 30 s",
        ),
        (RuntimeError("no such cluster"), "local' cannot be joined: no such cluster"),
    ],
)
def test_ray_that_does_not_start_is_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    import ray

    def init(**arguments: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError) as caught:
        ray_session._init_ray(ScaleOptions(name="local", address="local"), None)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_other_errors_of_ray_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**arguments: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyError, match="a defect"):
        ray_session._init_ray(ScaleOptions(name="local", address="local"), None)
