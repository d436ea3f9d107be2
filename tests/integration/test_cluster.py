"""Tests on a cluster of several machines, each a raylet on this one.

Images and numbers are those of one machine, also when a machine is lost or joins.
"""

import contextlib
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

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import preflight
from firstlight.pipeline.run.ray_session import RaySession
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.search import tune
from firstlight.pipeline.search.search import run_search
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics
from tests.support import recipes, searches
from tests.support.autoscaling_cluster import growing
from tests.support.cluster_scale import scale
from tests.support.traced_training import HURRY_FILE, assert_planned, launch_traced, read_steps
from tests.support.trials_in_turn import run_in_turn

CPUS = 2  # of a machine: a worker of 1.5 leaves half a one for decoding
SHARED: dict[str, Any] = {"stages__pretrain__method__dropout": 0.0}  # nothing rests on a worker's own part of a batch
EPOCHS = 150  # more than there is time for until nothing more is to happen
NOTICE = "a machine is about to be taken away"
# Seconds between a notice and the loss of the machine.
NOTICE_S = 25.0
MACHINE: dict[str, Any] = {"num_cpus": CPUS, "object_store_memory": 100 * 2**20}


@contextlib.contextmanager
def start_cluster(misses_machines_soon: bool) -> Iterator[Any]:
    """A cluster with a head that has no CPU, and two machines.

    `misses_machines_soon`: one that does not answer for two seconds is lost; on a busy machine, one that is there may
    be lost, too.
    """
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        # Ray's own handler lets no thread but the first add a machine.
        patch.setattr("ray._private.utils.set_sigterm_handler", lambda handler: None)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        if misses_machines_soon:
            patch.setenv("RAY_health_check_period_ms", "500")
            patch.setenv("RAY_health_check_failure_threshold", "4")
        # Nobody looks at the dashboard or at logs here, which take twenty seconds of a CPU.
        head = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={**head, "include_log_monitor": False})
        cluster.workers = [cluster.add_node(**MACHINE) for _ in range(2)]
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def shared_cluster(forked_ray_workers: None) -> Iterator[Any]:
    """For tests that lose no machine."""
    with start_cluster(misses_machines_soon=False) as cluster:
        yield cluster


@pytest.fixture
def cluster() -> Iterator[Any]:
    with start_cluster(misses_machines_soon=True) as cluster:
        yield cluster


def worlds(folder: Path) -> list[int]:
    """Returns the number of workers of every step, in the order of the steps."""
    files = sorted(folder.glob("job/trace-0-*.jsonl"), key=lambda file: file.stat().st_mtime)
    return [json.loads(line)["world"] for file in files for line in file.read_text().splitlines()]


def wait_until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.2)


def trials_on(node: Any) -> list[psutil.Process]:
    """Returns the processes of trials below the raylet of a machine."""
    (raylet,) = node.all_processes["raylet"]
    below = psutil.Process(raylet.process.pid).children(recursive=True)
    return [process for process in below if process.is_running() and "ImplicitFunc" in " ".join(process.cmdline()[:1])]


def losses(storage: Path) -> list[float]:
    (file,) = storage.glob(f"small/pretrain-*/{METRICS_FILE}")
    return [row["loss"] for row in read_metrics(file)]


@pytest.mark.ray
def test_two_machines_give_the_numbers_of_one_process(shared_cluster: Any, tmp_path: Path) -> None:
    """Runs the whole recipe on two machines with a worker each, and again in this process without Ray."""
    console = Console(file=io.StringIO(), width=200)
    there = run_recipe(recipes.recipe(tmp_path / "there", **SHARED, **scale(shared_cluster.address, 2)), console).rows
    here = run_recipe(recipes.recipe(tmp_path / "here", **SHARED), Console(quiet=True)).rows
    assert np.allclose(losses(tmp_path / "here"), losses(tmp_path / "there"), rtol=1e-5), (
        "sums are made in another order"
    )
    for one, other in zip(here, there, strict=True):
        assert (one.stage, one.measure) == (other.stage, other.measure)
        assert np.allclose(one.pretrained, other.pretrained, atol=0.035), "two of 60 test images may lie on a border"


def train_while(happen: Callable[[], None], recipe: Recipe, store: Store, job: Path) -> None:
    """Trains on Ray, slowly, while `happen` runs, all of which happens before the end."""
    thread = threading.Thread(target=happen, daemon=True)
    with RaySession(recipe.scale, recipe.stream) as session:
        session.start()
        thread.start()
        launch_traced(recipe, store, StageInstance("pretrain", 0, "f", job), slowly=True)
    assert not thread.is_alive(), "all has happened"


def assert_whole_batches(recipe: Recipe, store: Store, job: Path) -> None:
    """Compares every global batch with that of a training in which nothing happens."""
    stage: Any = recipe.stages["pretrain"]
    context = StageContext.create(recipe, store, on_ray=False)
    its = pretrain_job.build_job(context, stage, StageInstance("pretrain", 0, "f", job)).plan
    assert_planned(read_steps(job), its, EPOCHS * its.steps)


@pytest.mark.fault(7, "one of two machines")
@pytest.mark.slow
@pytest.mark.ray
def test_losing_and_adding_a_machine_keeps_every_global_batch(cluster: Any, tmp_path: Path, digits: Store) -> None:
    """Trains on two machines, then one, then two again; every global batch has the same images as without a loss."""
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
        (tmp_path / "job" / HURRY_FILE).touch()

    train_while(happen, recipe, digits, tmp_path / "job")
    assert_whole_batches(recipe, digits, tmp_path / "job")
    seen = worlds(tmp_path)
    assert [world for k, world in enumerate(seen) if k == 0 or world != seen[k - 1]][:3] == [2, 1, 2]


def drain_machine(cluster: Any, node: Any, seconds: float) -> None:
    """Gives the notice that a cloud gives before it takes a machine away."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int(1000 * (time.time() + seconds))
    accepted, why = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "taken away", deadline)
    assert accepted, why


@pytest.mark.fault(7, "a machine that is taken away with a notice")
@pytest.mark.slow
@pytest.mark.ray
def test_notice_of_a_machine_writes_a_checkpoint_from_which_the_other_continues(
    cluster: Any, tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other checkpoint is due, and no failure is allowed: it counts as none."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    changes = {
        "stages__pretrain__epochs": EPOCHS,
        "stages__pretrain__checkpoint_every": 1_000_000,
        **scale(cluster.address, [1, 2], max_failures=0),
    }
    recipe, checkpoints = recipes.recipe(tmp_path, **changes), tmp_path / "job" / "checkpoints"

    def happen() -> None:
        wait_until(lambda: len(worlds(tmp_path)) >= 3)
        assert not list(checkpoints.glob("step-*"))
        began = time.monotonic()
        drain_machine(cluster, cluster.workers[1], NOTICE_S)
        wait_until(lambda: any(checkpoints.glob("step-*")) and NOTICE in (tmp_path / "job" / METRICS_FILE).read_text())
        assert time.monotonic() - began < NOTICE_S, "before the machine goes"
        time.sleep(began + NOTICE_S - time.monotonic())
        cluster.remove_node(cluster.workers[1], allow_graceful=False)
        wait_until(lambda: worlds(tmp_path)[-1] == 1)
        (tmp_path / "job" / HURRY_FILE).touch()

    train_while(happen, recipe, digits, tmp_path / "job")
    notes = [json.loads(line).get("note", "") for line in (tmp_path / "job" / METRICS_FILE).read_text().splitlines()]
    (saved, *_) = [int(note.rpartition(" ")[2]) for note in notes if NOTICE in note]
    assert saved >= 3
    rows = [json.loads(line) for file in tmp_path.glob("job/trace-0-*.jsonl") for line in file.read_text().splitlines()]
    assert min(row["step"] for row in rows if row["world"] == 1) >= saved, "nothing before the checkpoint is repeated"
    assert_whole_batches(recipe, digits, tmp_path / "job")


@pytest.mark.fault(7, "a machine that trials of a search are on")
@pytest.mark.slow
@pytest.mark.ray
def test_search_that_loses_a_machine_ends_with_the_same_scores(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials run at a time; those of the lost machine continue on the other. Scores are those of this process."""
    changes: dict[str, Any] = {
        "algorithm": "random",
        "trials": 4,
        "space": {searches.LR: {"choice": [0.1, 0.2, 0.4]}},
        "seed": 3,
        "concurrency": 2,
    }
    changes |= {"overrides": {"stages.pretrain.epochs": 400, "stages.pretrain.checkpoint_every": 12}}
    wanted = searches.make_plan(tmp_path, f"scale.address={cluster.address}", **changes)

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
    found = run_search(wanted, Console(quiet=True))
    assert not thread.is_alive(), "it has happened"
    assert [trial.state for trial in found.trials] == ["done"] * 4
    logs = [file.read_text() for file in tmp_path.glob("runs/**/trials/*/log.txt")]
    assert sum("continued from the checkpoint" in log for log in logs) >= 1, "that of the lost machine"
    monkeypatch.setattr(tune, "run_trials", run_in_turn)
    here = run_search(searches.make_plan(tmp_path, name="here", **changes), Console(quiet=True))
    assert [(trial.values, trial.scores) for trial in here.trials] == [
        (trial.values, trial.scores) for trial in found.trials
    ]


@pytest.mark.ray
def test_growing_cluster_is_waited_for_and_too_small_one_is_refused(shared_cluster: Any, tmp_path: Path) -> None:
    told: list[str] = []
    recipe = recipes.recipe(tmp_path, **scale(shared_cluster.address, 3, wait_s=60))
    timer = threading.Timer(4.0, lambda: shared_cluster.add_node(**MACHINE))
    timer.start()
    with RaySession(recipe.scale, recipe.stream, told.append) as session:
        session.start()
    assert len(told) == 1
    assert told[0].startswith(
        "waiting for machines, at most 60 s (scale.wait_s): "
        "scale.workers: 3 workers x 1.5 CPUs + 1 CPU for data need 5.5 CPUs"
    )
    started = time.monotonic()
    four = recipes.recipe(tmp_path, **scale(shared_cluster.address, 4, wait_s=3))
    message = r"^scale\.workers: 4 workers x 1\.5 CPUs \+ 1 CPU for data need 7 CPUs, the cluster at '.*' has 6"
    with pytest.raises(UserError, match=message), RaySession(four.scale, four.stream, told.append) as session:
        session.start()
    assert time.monotonic() - started < 30
    large = recipes.recipe(tmp_path, **scale(shared_cluster.address, 1, cpus_per_worker=2.5))
    message = (
        r"workers: 1 workers x 2\.5 CPUs do not fit on the machines one by one: "
        r".* of ([02] CPUs, ){3}[02] CPUs; valid: 0 to 0"
    )
    with pytest.raises(UserError, match=message), RaySession(large.scale, large.stream) as session:
        session.start()


@pytest.mark.slow
@pytest.mark.ray
def test_machines_started_by_an_autoscaler_give_the_losses_of_one_process(ray_free: None, tmp_path: Path) -> None:
    """The cluster is a head alone, whose autoscaler starts two machines for the recipe."""
    console = Console(file=io.StringIO(), width=300)
    with growing(tmp_path, 2) as address:
        wanted = recipes.recipe(tmp_path / "there", **SHARED, **scale(address, 2, wait_s=120))
        run_recipe(wanted, console, only="pretrain")
    assert "waiting for machines, at most 120 s (scale.wait_s)" in console.file.getvalue()  # type: ignore[attr-defined]
    run_recipe(recipes.recipe(tmp_path / "here", **SHARED), Console(quiet=True), only="pretrain")
    assert np.allclose(losses(tmp_path / "here"), losses(tmp_path / "there"), rtol=1e-5)


@pytest.mark.parametrize(
    ("workers", "batch", "near"), [([1, 2], 30, None), ([1, 4], 32, 24), ([2, 3], 6, None), ([2, 3], 2, 6)]
)
def test_batch_size_must_divide_by_every_number_of_workers(
    tmp_path: Path, workers: Any, batch: int, near: int | None
) -> None:
    recipe = recipes.recipe(
        tmp_path,
        scale__workers=workers,
        scale__cpus=8,
        stages__pretrain__batch_size=batch,
        stages__finetune__batch_size=24,
    )
    if near is None:
        preflight.check_recipe(recipe)
        return
    with pytest.raises(
        UserError,
        match=rf"^stages\.pretrain\.batch_size: {batch} is not valid: .* must be a multiple of \d+; near it: {near}$",
    ):
        preflight.check_recipe(recipe)


@pytest.mark.parametrize("workers", [[2, 2], [0, 2], [3, 1], -1])
def test_invalid_number_of_workers_is_refused(tmp_path: Path, workers: Any) -> None:
    with pytest.raises(UserError, match=r"^scale\.workers"):
        recipes.recipe(tmp_path, scale__workers=workers)
