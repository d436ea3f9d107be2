"""A cluster of several machines, each a raylet on this one: the same images and numbers as on one, also when a machine is lost or joins."""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from firstlight.pipeline.config.recipe import Scale
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import preflight
from firstlight.pipeline.run.launch import crowded, launch
from firstlight.pipeline.run.nodes import Node, check_machines
from firstlight.pipeline.run.ray_session import Session
from firstlight.pipeline.run.runner import run
from firstlight.pipeline.search import tune
from firstlight.pipeline.search.search import search
from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.stage import Instance
from firstlight.pipeline.train.context import Worker
from firstlight.pipeline.train.metrics import METRICS, read_metrics
from tests.pipeline.search.test_search import in_turn
from tests.support import recipes, searches, traced, traced_slowly
from tests.support.autoscaling_cluster import growing

CPUS = 2  # of a machine: a worker of 1.5 leaves half a one for decoding
SHARED: dict[str, Any] = {"stages__pretrain__method__dropout": 0.0}  # nothing rests on a worker's own part of a batch
EPOCHS = 150  # more than there is time for until nothing more is to happen
MACHINE: dict[str, Any] = {"num_cpus": CPUS, "object_store_memory": 100 * 2**20}


def scale(address: str, workers: Any, **more: Any) -> dict[str, Any]:
    found = {"address": address, "workers": workers, "cpus_per_worker": 1.5, "collective_timeout_s": 40, **more}
    return {f"scale__{key}": value for key, value in found.items()} | {"stream__resident": "off", "stream__tasks": 1}


@pytest.fixture
def cluster(ray_free: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that has no CPU, and two machines."""
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(
        "ray._private.utils.set_sigterm_handler", lambda handler: None
    )  # which lets no other thread than the first add a machine
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "4")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    found.workers = [found.add_node(**MACHINE) for _ in range(2)]
    yield found
    found.shutdown()


def worlds(folder: Path) -> list[int]:
    """The numbers of workers that steps were made with, in the order in which they were made."""
    files = sorted(folder.glob("job/trace-0-*.jsonl"), key=lambda file: file.stat().st_mtime)
    return [json.loads(line)["world"] for file in files for line in file.read_text().splitlines()]


def wait_until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.2)


def trials_on(node: Any) -> list[psutil.Process]:
    """The processes of a search's trials below the raylet of a machine."""
    (raylet,) = node.all_processes["raylet"]
    below = psutil.Process(raylet.process.pid).children(recursive=True)
    return [process for process in below if process.is_running() and "ImplicitFunc" in " ".join(process.cmdline()[:1])]


def losses(storage: Path) -> list[float]:
    (file,) = storage.glob(f"small/pretrain-*/{METRICS}")
    return [row["loss"] for row in read_metrics(file)]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_two_machines_give_the_numbers_of_one_process(cluster: Any, tmp_path: Path) -> None:
    """The whole recipe, prepared and trained on two machines of a worker each, beside one that Ray has no part in."""
    console = Console(file=io.StringIO(), width=200)
    there = run(recipes.recipe(tmp_path / "there", **SHARED, **scale(cluster.address, 2)), console)
    here = run(recipes.recipe(tmp_path / "here", **SHARED), Console(quiet=True))
    assert np.allclose(losses(tmp_path / "here"), losses(tmp_path / "there"), rtol=1e-5), (
        "sums are made in another order"
    )
    for one, other in zip(here, there, strict=True):
        assert (one.stage, one.measure) == (other.stage, other.measure)
        assert np.allclose(one.pretrained, other.pretrained, atol=0.035), "two of 60 test images may lie on a border"


@pytest.mark.fault(7, "one of two machines")
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_machine_lost_in_the_middle_and_one_that_joins(cluster: Any, tmp_path: Path, digits: Store) -> None:
    """One or two workers, as there is room: two machines, then one, then two again; every global batch is of the images that it would have been."""
    changes = {
        "stages__pretrain__epochs": EPOCHS,
        "stages__pretrain__checkpoint_every": 3,
        **scale(cluster.address, [1, 2], resize_s=2.0),
    }
    recipe = recipes.recipe(tmp_path, **changes)

    def happen() -> None:
        for count, do in (
            (6, lambda: cluster.remove_node(cluster.workers[1])),
            (24, lambda: cluster.add_node(**MACHINE)),
        ):
            wait_until(lambda count=count: len(worlds(tmp_path)) >= count)
            do()
        wait_until(lambda: worlds(tmp_path)[-1] == 2)
        (tmp_path / "job" / traced_slowly.HURRY).touch()

    thread = threading.Thread(target=happen, daemon=True)
    with Session(recipe.scale, recipe.stream) as session:
        session.start()
        thread.start()
        launch(recipe, digits, traced_slowly.work, [Instance("pretrain", 0, "f", tmp_path / "job")])
    assert not thread.is_alive(), "both have happened"
    stage: Any = recipe.stages["pretrain"]
    its = pretrain.job(
        Worker.start(recipe, digits, on_ray=False), stage, Instance("pretrain", 0, "f", tmp_path / "job")
    ).plan
    traced.assert_shown(traced.shown(tmp_path / "job"), its, EPOCHS)
    seen = worlds(tmp_path)
    assert [world for k, world in enumerate(seen) if k == 0 or world != seen[k - 1]][:3] == [2, 1, 2]


@pytest.mark.fault(7, "a machine that trials of a search are on")
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_search_on_two_machines_of_which_one_is_lost(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials at a time; what those on the lost machine had done goes on on the other. Beside the same search in this process, one by one."""
    changes: dict[str, Any] = {
        "algorithm": "random",
        "trials": 4,
        "space": {searches.LR: {"choice": [0.1, 0.2, 0.4]}},
        "seed": 3,
        "concurrency": 2,
    }
    changes |= {"overrides": {"stages.pretrain.epochs": 400, "stages.pretrain.checkpoint_every": 12}}
    wanted = searches.plan(tmp_path, f"scale.address={cluster.address}", **changes)

    def happen() -> None:
        wait_until(
            lambda: (
                len(
                    {
                        file.parents[2]
                        for file in (tmp_path / "runs").glob("*/*/trials/*/pretrain-seed0-*/checkpoints/step-*")
                    }
                )
                >= 2
            )
        )
        cluster.remove_node(next(node for node in cluster.workers if trials_on(node)), allow_graceful=False)

    thread = threading.Thread(target=happen, daemon=True)
    thread.start()
    found = search(wanted, Console(quiet=True))
    assert not thread.is_alive(), "it has happened"
    assert [trial.state for trial in found.trials] == ["done"] * 4
    logs = [file.read_text() for file in tmp_path.glob("runs/**/trials/*/log.txt")]
    assert sum("continued from the checkpoint" in log for log in logs) >= 1, "that of the lost machine"
    monkeypatch.setattr(tune, "run_trials", in_turn)
    here = search(searches.plan(tmp_path, name="here", **changes), Console(quiet=True))
    assert [(trial.values, trial.scores) for trial in here.trials] == [
        (trial.values, trial.scores) for trial in found.trials
    ]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_cluster_that_grows_is_waited_for_and_one_that_does_not_is_refused(cluster: Any, tmp_path: Path) -> None:
    told: list[str] = []
    recipe = recipes.recipe(tmp_path, **scale(cluster.address, 3, wait_s=60))
    timer = threading.Timer(4.0, lambda: cluster.add_node(**MACHINE))
    timer.start()
    with Session(recipe.scale, recipe.stream, told.append) as session:
        session.start()
    assert len(told) == 1
    assert told[0].startswith(
        "waiting for machines, at most 60 s (scale.wait_s): scale.workers: 3 workers x 1.5 CPUs + 1 CPU for data need 5.5 CPUs"
    )
    started = time.monotonic()
    four = recipes.recipe(tmp_path, **scale(cluster.address, 4, wait_s=3))
    message = r"^scale\.workers: 4 workers x 1\.5 CPUs \+ 1 CPU for data need 7 CPUs, the cluster at '.*' has 6"
    with pytest.raises(UserError, match=message), Session(four.scale, four.stream, told.append) as session:
        session.start()
    assert time.monotonic() - started < 30
    large = recipes.recipe(tmp_path, **scale(cluster.address, 1, cpus_per_worker=2.5))
    message = r"workers: 1 workers x 2\.5 CPUs do not fit on the machines one by one: .* of ([02] CPUs, ){3}[02] CPUs; valid: 0 to 0"
    with pytest.raises(UserError, match=message), Session(large.scale, large.stream) as session:
        session.start()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_machines_that_an_autoscaler_starts_train_as_one_process(ray_free: None, tmp_path: Path) -> None:
    """A head alone, whose autoscaler starts two machines when the recipe asks for room."""
    console = Console(file=io.StringIO(), width=300)
    with growing(tmp_path, 2) as address:
        wanted = recipes.recipe(tmp_path / "there", **SHARED, **scale(address, 2, wait_s=120))
        run(wanted, console, only="pretrain")
    assert "waiting for machines, at most 120 s (scale.wait_s)" in console.file.getvalue()  # type: ignore[attr-defined]
    run(recipes.recipe(tmp_path / "here", **SHARED), Console(quiet=True), only="pretrain")
    assert np.allclose(losses(tmp_path / "here"), losses(tmp_path / "there"), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "nodes", "fit"),
    [
        ({"workers": 2, "cpus_per_worker": 1.5}, [(2, 0)] * 2, True),
        ({"workers": 2, "cpus_per_worker": 1.5}, [(3, 0)], True),
        ({"workers": 2, "cpus_per_worker": 1.5}, [(2, 0), (1, 0)], False),
        ({"workers": [1, 2], "cpus_per_worker": 1.5}, [(2, 0), (1, 0)], True),
        ({"workers": 2, "cpus_per_worker": 1.0, "gpus_per_worker": 1.0}, [(16, 1), (16, 0)], False),
        ({"workers": 2, "cpus_per_worker": 1.0, "gpus_per_worker": 0.5}, [(16, 1), (16, 0)], True),
    ],
)
def test_workers_on_machines(fields: dict[str, Any], nodes: list[tuple[float, float]], fit: bool) -> None:
    found = Scale.model_validate_json(json.dumps({"name": "test", **fields}))
    there = [Node(*node) for node in nodes]
    if fit:
        check_machines(found, there, "the cluster")
    else:
        with pytest.raises(
            UserError,
            match=r"^scale\.workers: 2 workers x .* do not fit on the machines one by one: the cluster has machines of",
        ):
            check_machines(found, there, "the cluster")


@pytest.mark.parametrize(
    ("workers", "batch", "near"), [([1, 2], 30, None), ([1, 4], 32, 24), ([2, 3], 6, None), ([2, 3], 2, 6)]
)
def test_every_number_of_workers_has_an_equal_share(tmp_path: Path, workers: Any, batch: int, near: int | None) -> None:
    recipe = recipes.recipe(
        tmp_path,
        scale__workers=workers,
        scale__cpus=8,
        stages__pretrain__batch_size=batch,
        stages__finetune__batch_size=24,
    )
    if near is None:
        preflight.check(recipe)
        return
    with pytest.raises(
        UserError,
        match=rf"^stages\.pretrain\.batch_size: {batch} is not valid: .* must be a multiple of \d+; near it: {near}$",
    ):
        preflight.check(recipe)


@pytest.mark.parametrize(
    ("workers", "cpus", "crowd"), [(1, 1.75, False), (1, 1.5, True), (2, 3.5, False), (2, 3.25, True), (4, 7.0, False)]
)
def test_workers_that_leave_nothing_for_decoding_are_refused(
    tmp_path: Path, workers: int, cpus: float, crowd: bool
) -> None:
    """A task has a quarter of a CPU; one for each worker."""
    told = crowded(recipes.recipe(tmp_path, **scale("auto", [1, 4])), workers, cpus)
    assert (told is not None) == crowd
    if told:
        assert told.startswith(f"scale.workers: {workers} workers leave {cpus - 1.5 * workers:g} CPUs of the cluster")


@pytest.mark.parametrize("workers", [[2, 2], [0, 2], [3, 1], -1])
def test_what_is_no_number_of_workers(tmp_path: Path, workers: Any) -> None:
    with pytest.raises(UserError, match=r"^scale\.workers"):
        recipes.recipe(tmp_path, scale__workers=workers)
