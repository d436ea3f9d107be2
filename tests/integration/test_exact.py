"""A training stopped after any step and continued on 1, 2 or 4 workers gets the same ids and passes in every batch."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firstlight.pipeline.data.loader import Arrays, Encoded, Loader
from firstlight.pipeline.data.order.id_set import make_id_set
from firstlight.pipeline.data.order.lane_plan import LanePlan
from firstlight.pipeline.data.plan import BatchPlan, SemiSupervisedPlan, TrainingPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import LoadingOptions, TrainOrder, stream_batches
from firstlight.pipeline.run.ray_session import RaySession
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import DROPPED_IDS_FILE
from tests.support import recipes
from tests.support.gloo import Pool
from tests.support.traced_training import TracedLearner, assert_planned, launch_traced, read_steps, run_traced

EPOCHS, WORLDS = 2, (1, 2, 4)
OPTIONS = LoadingOptions(on_ray=False, prefetch=2, tasks=1, task_cpus=1.0)


class Undecoded(Loader):
    """Returns passes in the place of pixels."""

    def load(self, ids: np.ndarray, passes: np.ndarray, encoded: Encoded) -> Arrays:
        return {"id": ids, "label": np.array([encoded[i][1] for i in ids.tolist()]), "pass": passes}


def plan(kind: str) -> TrainingPlan:
    """Returns batches of 16 of 150 training images; mixed ones have 4 of 10 labelled images and 12 others."""
    ids, starts, windowed = np.arange(3, 153), np.arange(0, 1438, 20), "windowed" in kind
    if kind == "lanes":
        return LanePlan(make_id_set(ids), starts, 16, 0, 48)
    if "mixed" not in kind:
        return BatchPlan(ids, starts, 16, 0, 48, windowed)
    return SemiSupervisedPlan(
        BatchPlan(ids[::15], starts, 4, 0, 48, windowed),
        BatchPlan(np.setdiff1d(ids, ids[::15]), starts, 12, 0, 48, windowed),
    )


def streamed(store: Store, its: TrainingPlan, world: int, start: int) -> list[tuple[list[int], list[int]]]:
    """Returns ids and passes of every global batch from step `start` on, joined from the streams of all ranks."""
    loader = Undecoded(store, (), 8, 0, 1_000_000)
    orders = [TrainOrder(its, rank, world, start, EPOCHS * its.steps) for rank in range(world)]
    streams = [stream_batches(loader, order, its.batch_size // world, OPTIONS) for order in orders]
    return [
        tuple(np.concatenate([part[key] for part in parts]).tolist() for key in ("id", "pass"))  # type: ignore[misc]
        for parts in zip(*streams, strict=True)
    ]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["global", "windowed", "lanes", "mixed", "mixed windowed"])
def test_stream_continues_after_any_step_on_any_number_of_workers(digits: Store, kind: str, world: int) -> None:
    its = plan(kind)
    whole = streamed(digits, its, 1, 0)
    assert len(whole) == EPOCHS * its.steps
    for start in range(len(whole) + 1):
        assert streamed(digits, its, world, start) == whole[start:], f"from step {start}"


@pytest.mark.parametrize("kind", ["global", "windowed", "lanes", "mixed", "mixed windowed"])
def test_every_image_is_read_once_an_epoch_except_the_tail(digits: Store, kind: str) -> None:
    its = plan(kind)
    whole = streamed(digits, its, 2, 0)
    for epoch in range(EPOCHS):
        seen = [i for ids, _ in whole[epoch * its.steps : (epoch + 1) * its.steps] for i in ids]
        others = [i for i in seen if not isinstance(its, SemiSupervisedPlan) or i not in its.labelled.ids]
        assert len(set(others)) == len(others)
        assert (
            sorted([*others, *its.tail(epoch)])
            == (its.rest.ids if isinstance(its, SemiSupervisedPlan) else its.ids).tolist()
        )
        assert 0 < len(its.tail(epoch)) < its.batch_size


@pytest.fixture(scope="module")
def pool4() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


MIXED = {
    "stages__pretrain__method": {"name": "clustering_locality"},
    "stages__pretrain__labelled_per_batch": 8,
    "stages__pretrain__labels_per_class": 2,
}
RECIPES: dict[str, dict[str, Any]] = {
    "whole": {"stream__shuffle": "windowed", "stream__window": 48},
    "mixed": MIXED,
    "mixed, of 5 steps": {**MIXED, "stages__pretrain__epochs": None, "stages__pretrain__steps": 5},
}


class Stopped(Exception):
    pass


def training(folder: str, store: str, name: str, resident: str, stop: int | None) -> None:
    """Trains in `folder` to the end, or to step `stop`."""

    def stop_training(rank: int, step: int) -> None:
        if step == stop:
            raise Stopped

    failures.fault_hook = stop_training
    try:
        context = StageContext.create(
            recipes.recipe(Path(folder), stream__resident=resident, **RECIPES[name]),
            Store.open(Path(store)),
            on_ray=False,
        )
        instance = StageInstance("pretrain", 0, "f", Path(folder) / "job")
        run_traced(context, context.recipe.stages["pretrain"], instance, TracedLearner)
    except Stopped:
        pass
    finally:
        failures.fault_hook = None


def the_plan(folder: Path, store: Store, name: str) -> tuple[TrainingPlan, int]:
    """Returns the plan of the training of a recipe, and the number of its steps."""
    context = StageContext.create(recipes.recipe(folder, **RECIPES[name]), store, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 0, "f", folder / "job"))
    return job.plan, job.total_steps


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("resident", ["on", "off"])
def test_training_stopped_after_any_step_gets_the_same_batches(
    tmp_path: Path, digits: Store, name: str, resident: str
) -> None:
    its, total = the_plan(tmp_path, digits, name)
    for stop in range(1, total):
        folder = tmp_path / str(stop)
        for until in (stop, None):
            training(str(folder), str(digits.path), name, resident, until)
        assert_planned(read_steps(folder / "job"), its, total)
        tails = [
            f'{{"epoch": {epoch}, "ids": {its.tail(epoch, min(total - epoch * its.steps, its.steps)).tolist()}}}'
            for epoch in range(-(-total // its.steps))
        ]
        assert (folder / "job" / DROPPED_IDS_FILE).read_text().splitlines() == tails


@pytest.mark.fault(48, "handed from 4 workers to 2 to 1")
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("worlds", [(4, 2, 1), (1, 4, 2), (2, 1, 4)])
def test_training_continued_on_other_numbers_of_workers_gets_the_same_batches(
    tmp_path: Path, digits: Store, pool: Pool, pool4: Pool, name: str, worlds: tuple[int, int, int]
) -> None:
    its, total = the_plan(tmp_path, digits, name)
    for world, stop in zip(worlds, (2, its.steps + 1, None), strict=True):
        run: Any = {1: lambda function: function(), 2: pool.run, 4: pool4.run}[world]
        run(partial(training, str(tmp_path), str(digits.path), name, "off", stop))
    steps = read_steps(tmp_path / "job")
    assert_planned(steps, its, total)
    if isinstance(its, SemiSupervisedPlan):
        for row in steps.values():
            for world in WORLDS:
                assert [(part >= 0).sum() for part in np.split(row["labels"], world)] == [8 / world] * world, (
                    "labelled images of every worker"
                )


@pytest.mark.fault(1, "a worker is killed, under Ray: ids and passes")
@pytest.mark.ray
def test_worker_killed_on_ray_gets_the_same_batches(
    tmp_path: Path, digits: Store, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = {"scale__workers": 2, "scale__cpus": 4, "scale__cpus_per_worker": 1.0, "scale__collective_timeout_s": 60}
    recipe = recipes.recipe(tmp_path, stream__resident="off", **scale, **RECIPES["mixed"])
    monkeypatch.setenv("FIRSTLIGHT_FAULT", f"rank=0,step=4,kind=sigkill,once={tmp_path / 'once'}")
    with RaySession(recipe.scale) as session:
        session.start()
        launch_traced(recipe, digits, StageInstance("pretrain", 0, "f", tmp_path / "job"))
    assert (tmp_path / "once").exists(), "the fault was injected"
    assert len(list((tmp_path / "job").glob("trace-*"))) == 4, "two workers, twice"
    assert_planned(read_steps(tmp_path / "job"), *the_plan(tmp_path, digits, "mixed"))
