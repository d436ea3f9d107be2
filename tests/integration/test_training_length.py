"""A training of so many `steps`: no more and no fewer, with a last epoch that may be partial, and exactly resumed."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.pretraining.job import count_steps_per_epoch
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.metrics import DROPPED_IDS_FILE, METRICS_FILE, read_metrics
from firstlight.pipeline.train.training_job import TrainingJob
from tests.support import recipes
from tests.support.gloo import Pool
from tests.support.local_training import Stopped, find_copy, train, train_with_copies

PER_EPOCH = 3
MIXED = {
    "method": {"name": "clustering_locality"},
    "labelled_per_batch": 10,
    "labels_per_class": 2,
    "accumulate": 2,
}
TRAININGS: dict[str, dict[str, Any]] = {
    "nat": {},
    "mixed batches": MIXED,
    "cosine by epoch": {"schedule": {"name": "CosineAnnealingLR", "interval": "epoch"}},
    "milestones by epoch": {"schedule": {"name": "MultiStepLR", "interval": "epoch", "milestones": [1], "gamma": 0.1}},
    "one cycle": {"schedule": {"name": "OneCycleLR", "max_lr": 0.5}},
    "periods": {"schedule": {"name": "CosineAnnealingLR", "period": 2}},
    "plateau by epoch": {"schedule": {"name": "ReduceLROnPlateau", "interval": "epoch", "patience": 0}},
    "no schedule": {"schedule": None},
    "rounds": {"method": {"name": "super_and", "dim": 8, "rounds": 2, "ue_period": 1, "chunk": 40}},
}


def changes_of(name: str, steps: int | None = None, epochs: int | None = None) -> dict[str, Any]:
    given = {**TRAININGS[name], "steps": steps, "epochs": epochs}
    return {f"stages__pretrain__{key}": value for key, value in given.items()}


def make_job(folder: Path, store: Store, **changes: Any) -> TrainingJob:
    context = StageContext.create(recipes.recipe(folder, **changes), store, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    return pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", folder / "job"))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7])
def test_training_makes_exactly_its_steps(tmp_path: Path, digits: Store, steps: int) -> None:
    train(tmp_path, digits, **changes_of("nat", steps))
    rows = read_metrics(tmp_path / "job" / METRICS_FILE)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert {(row["of"], row["steps_per_epoch"]) for row in rows} == {(steps, PER_EPOCH)}
    assert [row["epoch"] for row in rows] == [step // PER_EPOCH for step in range(steps)]
    found, _ = Checkpoints(tmp_path / "job" / "checkpoints").read_newest()
    assert found is not None
    assert found.step == steps


@pytest.mark.parametrize("name", TRAININGS)
def test_steps_of_whole_epochs_equal_these_epochs_bit_by_bit(tmp_path: Path, digits: Store, name: str) -> None:
    in_epochs, _ = train(tmp_path / "epochs", digits, **changes_of(name, epochs=2))
    rows = read_metrics(tmp_path / "epochs" / "job" / METRICS_FILE)
    in_steps, _ = train(tmp_path / "steps", digits, **changes_of(name, steps=2 * rows[0]["steps_per_epoch"]))
    assert in_steps == in_epochs
    numbers = ("step", "of", "epoch", "loss", "lr")
    again = read_metrics(tmp_path / "steps" / "job" / METRICS_FILE)
    assert [[row[key] for key in numbers] for row in again] == [[row[key] for key in numbers] for row in rows]


@pytest.mark.parametrize("name", sorted(TRAININGS.keys() - {"rounds"}))
def test_training_with_partial_epoch_resumes_bit_identical_at_every_step(
    tmp_path: Path, digits: Store, name: str
) -> None:
    per_epoch = make_job(tmp_path, digits, **changes_of(name, steps=1)).plan.steps
    steps = per_epoch + 2
    clean = train_with_copies(tmp_path / "clean", digits, range(1, steps + 1), **changes_of(name, steps))
    tails = (tmp_path / "clean" / "job" / DROPPED_IDS_FILE).read_text()
    for stop in range(1, steps + 1):
        folder = find_copy(tmp_path / "clean", stop)
        assert train(folder, digits, **changes_of(name, steps))[0] == clean, f"stopped at step {stop}"
        assert (folder / "job" / DROPPED_IDS_FILE).read_text() == tails, f"stopped at step {stop}"
        assert train(folder, digits, **changes_of(name, steps))[0] == clean, "nothing is left to do"
        assert (folder / "job" / DROPPED_IDS_FILE).read_text() == tails, "nothing is left to do"


def train_partial_on_this_rank(folder: str, store: str, stop: int | None) -> str | None:
    try:
        # The statistics of a batch in parts would depend on the number of workers.
        changes = {**changes_of("mixed batches", 5), "stages__pretrain__accumulate": 1}
        return train(Path(folder), Store.open(Path(store)), stop, **changes)[0]
    except Stopped:
        return None


def test_partial_epoch_resumes_on_two_workers_and_on_another_number(pool: Pool, tmp_path: Path, digits: Store) -> None:
    clean = pool.run(train_partial_on_this_rank, str(tmp_path / "clean"), str(digits.path), None)
    assert clean[0] == clean[1]
    for stop in (2, 4):
        folder = str(tmp_path / f"stop{stop}")
        assert pool.run(train_partial_on_this_rank, folder, str(digits.path), stop) == [None, None]
        assert pool.run(train_partial_on_this_rank, folder, str(digits.path), None) == clean
    pool.run(train_partial_on_this_rank, str(tmp_path / "fewer"), str(digits.path), 4)
    train_partial_on_this_rank(str(tmp_path / "fewer"), str(digits.path), None)
    one, two = (read_metrics(tmp_path / name / "job" / METRICS_FILE) for name in ("fewer", "clean"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # The rates after each step. A whole pass ends with step 3 alone.
        ("milestones by epoch", [0.5, 0.5, 0.05, 0.05, 0.05]),
        # Two epochs begin.
        ("cosine by epoch", [0.5, 0.5, 0.25, 0.25, 0.25]),
        ("nat", [0.25 * (1 + math.cos(math.pi * step / 5)) for step in range(1, 6)]),
        ("no schedule", [0.5] * 5),
    ],
)
def test_schedule_follows_the_steps_or_whole_epochs(
    tmp_path: Path, digits: Store, name: str, rates: list[float]
) -> None:
    train(tmp_path, digits, **changes_of(name, 5))
    assert [row["lr"] for row in read_metrics(tmp_path / "job" / METRICS_FILE)] == pytest.approx(rates)


@pytest.mark.parametrize("name", ["nat", "mixed batches"])
def test_images_that_a_partial_epoch_leaves_out_are_listed(tmp_path: Path, digits: Store, name: str) -> None:
    job = make_job(tmp_path, digits, **changes_of(name, 1))
    steps = job.plan.steps + 2
    train(tmp_path, digits, **changes_of(name, steps))
    whole, partial = map(json.loads, (tmp_path / "job" / DROPPED_IDS_FILE).read_text().splitlines())
    assert [whole["epoch"], partial["epoch"]] == [0, 1]
    assert whole["ids"] == job.plan.tail(0).tolist()
    seen = job.plan.epoch(1)[:2].ravel()
    labelled = job.plan.labelled.ids if name == "mixed batches" else []  # type: ignore[attr-defined]
    assert sorted([*partial["ids"], *np.setdiff1d(seen, labelled)]) == np.setdiff1d(job.plan.ids, labelled).tolist()
    assert len(partial["ids"]) > len(whole["ids"])


@pytest.mark.parametrize("labelled", [0, 8, 32])
def test_counted_steps_of_an_epoch_are_those_of_the_plan(tmp_path: Path, digits: Store, labelled: int) -> None:
    changes = {
        "stages__pretrain__labelled_per_batch": labelled,
        "stages__pretrain__labels_per_class": 4 if labelled else None,
        "stages__pretrain__method": MIXED["method"] if labelled else recipes.RECIPE["stages"]["pretrain"]["method"],
    }
    job = make_job(tmp_path, digits, **changes)
    context = StageContext.create(recipes.recipe(tmp_path, **changes), digits, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    assert count_steps_per_epoch(stage, context.splits, 3) == job.plan.steps


@pytest.mark.parametrize(
    ("length", "pause_after", "total", "epochs", "pause"),
    [
        ({"epochs": 4}, None, 12, 4, None),
        ({"epochs": 4}, 3, 12, 4, 9),
        ({"epochs": 4}, 4, 12, 4, None),
        ({"epochs": None, "steps": 7}, None, 7, 3, None),
        ({"epochs": None, "steps": 7}, 5, 7, 3, 5),
        ({"epochs": None, "steps": 7}, 7, 7, 3, None),
        ({"epochs": None, "steps": 6}, 3, 6, 2, 3),
        ({"epochs": None, "steps": 2}, 1, 2, 1, 1),
    ],
)
def test_length_is_counted_in_its_unit(
    tmp_path: Path,
    digits: Store,
    length: dict[str, Any],
    pause_after: int | None,
    total: int,
    epochs: int,
    pause: int | None,
) -> None:
    changes = {f"stages__pretrain__{key}": value for key, value in length.items()}
    context = StageContext.create(recipes.recipe(tmp_path, **changes), digits, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    instance = StageInstance("pretrain", 3, "f", tmp_path / "job", until=pause_after)
    job = pretrain_job.build_job(context, stage, instance)
    assert (job.total_steps, job.num_epochs, job.pause_step) == (total, epochs, pause)
