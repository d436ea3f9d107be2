"""Population-based training: which trials copy which, how settings change, and that a copy continues exactly."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import Paused, StopTraining, UserError
from firstlight.pipeline.search import pbt
from firstlight.pipeline.search.ledger import Segment, Trial
from firstlight.pipeline.search.pbt import (
    apply_exchanges,
    check_networks,
    copy_checkpoint,
    explore_values,
    perturb_value,
    select_exchanges,
)
from firstlight.pipeline.search.space import Dimension, Pbt, Search
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.folder_manifest import FOLDER_MANIFEST
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics
from tests.support import recipes
from tests.support.searches import LR, PERIOD, make_plan, make_search
from tests.support.state_hash import hash_state

PBT: dict[str, Any] = {"name": "pbt", "measure": "pretrain.loss", "mode": "min", "interval": 1}


def population_search(**changes: Any) -> Search:
    return make_search(algorithm="random", scheduler={**PBT, **changes.pop("pbt", {})}, trials=8, **changes)


def paused_trials(values: list[float], training: str = "") -> list[Trial]:
    """Returns trials whose first segment reached these values."""
    rate = [0.1 + 0.01 * k for k in range(len(values))]
    parts = [[Segment(1, {LR: rate[k], PERIOD: 2}, value, None)] for k, value in enumerate(values)]
    return [
        Trial(k, {LR: rate[k], PERIOD: 2}, parts=parts[k], resting=True, training=training) for k in range(len(values))
    ]


@pytest.mark.parametrize(("mode", "worst", "best"), [("max", {0, 3}, {6, 7}), ("min", {6, 7}, {0, 3})])
def test_worst_quarter_copies_the_best_quarter(mode: str, worst: set[int], best: set[int]) -> None:
    trials = paused_trials([0.1, 0.5, 0.6, 0.2, 0.4, 0.7, 0.8, 0.9])
    search = population_search(pbt={"mode": mode})
    found = select_exchanges(search, trials)
    assert {exchange.trial for exchange in found} == worst
    assert {exchange.origin for exchange in found} <= best
    assert found == select_exchanges(search, list(reversed(trials))), "independent of the order in which trials ended"
    assert found != select_exchanges(population_search(pbt={"mode": mode}, seed=1), trials)


@pytest.mark.parametrize(
    ("count", "quantile", "changing"), [(1, 0.25, 0), (2, 0.25, 1), (3, 0.5, 1), (5, 0.25, 2), (8, 0.5, 4)]
)
def test_no_trial_is_both_best_and_worst(count: int, quantile: float, changing: int) -> None:
    found = select_exchanges(
        population_search(pbt={"quantile": quantile}), paused_trials([0.1 * k for k in range(count)])
    )
    assert len(found) == changing
    assert not {exchange.trial for exchange in found} & {exchange.origin for exchange in found}


def test_all_of_the_best_are_copied_and_settings_are_perturbed() -> None:
    """Over 40 seeds."""
    trials = paused_trials([0.1 * k for k in range(8)])
    found = [exchange for seed in range(40) for exchange in select_exchanges(population_search(seed=seed), trials)]
    assert {exchange.origin for exchange in found} == {0, 1}
    ratios = [exchange.values[LR] / trials[exchange.origin].values[LR] for exchange in found]
    perturbed = [ratio for ratio in ratios if ratio == pytest.approx(0.8) or ratio == pytest.approx(1.2)]
    assert 0.6 < len(perturbed) / len(ratios) < 0.9, "resample: 0.25"
    assert len({round(ratio, 6) for ratio in perturbed}) == 2


@pytest.mark.parametrize(
    ("dimension", "value", "up", "becomes"),
    [
        ({"uniform": [0.0, 1.0]}, 0.5, True, 0.6),
        ({"uniform": [0.0, 1.0]}, 0.9, True, 1.0),
        ({"loguniform": [0.1, 1.0]}, 0.11, False, 0.1),
        ({"uniform": [-1.0, 1.0]}, -0.5, True, -0.6),
        ({"randint": [2, 10]}, 10, False, 8),
        ({"randint": [1, 10]}, 2, True, 3),  # 2.4 is 2 again
        ({"randint": [1, 10]}, 1, False, 1),
        ({"randint": [2, 10, 4]}, 6, True, 10),
        ({"randint": [2, 11, 4]}, 10, True, 10),
        ({"quniform": [0.0, 1.0, 0.25]}, 0.5, True, 0.75),
        ({"quniform": [0.0, 1.0, 0.25]}, 0.0, False, 0.0),
        ({"choice": ["a", "b", "c"]}, "b", True, "c"),
        ({"choice": ["a", "b", "c"]}, "a", False, "a"),
        ({"choice": [1, [2], None]}, [2], True, None),
    ],
)
def test_perturbed_value_differs_and_stays_in_its_dimension(
    dimension: dict[str, Any], value: Any, up: bool, becomes: Any
) -> None:
    found = perturb_value(Dimension.model_validate_json(json.dumps(dimension)), value, 1.2 if up else 0.8, up)
    assert found == pytest.approx(becomes)
    assert type(found) is type(becomes)


def test_explored_settings_stay_in_the_space() -> None:
    space = {
        LR: {"loguniform": [0.01, 1.0]},
        "c": {"randint": [2, 11, 4]},
        "d": {"quniform": [0.1, 1.0, 0.3]},
        PERIOD: {"choice": [1, 2]},
    }
    search, values = population_search(space=space), {LR: 0.3, "c": 6, "d": 0.4, PERIOD: 2}
    for seed in range(200):
        values = explore_values(search, values, np.random.default_rng(seed))
        assert 0.01 <= values[LR] <= 1.0
        assert values["c"] in (2, 6, 10)
        assert min(abs(values["d"] - grid) for grid in (0.1, 0.4, 0.7, 1.0)) < 1e-9
        assert values[PERIOD] in (1, 2)


def hash_of_training(
    folder: Path, store: Store, begin: Path | None = None, until: int | None = None, **changes: Any
) -> str:
    """Returns a hash of all state at the end of a segment of the small recipe's pretraining, by default of four
    epochs.
    """
    worker = StageContext.create(
        recipes.recipe(folder, **{"stages__pretrain__epochs": 4, **changes}), store, on_ray=False
    )
    stage: Any = worker.recipe.stages["pretrain"]
    job = pretrain_job.build_job(worker, stage, StageInstance("pretrain", 3, "f", folder, begin=begin, until=until))
    with (
        contextlib.nullcontext()
        if until is None
        else pytest.raises(Paused, match=f"pauses after {until} of {stage.length}")
    ):
        fit(job, pretrain_job.build_seeded_method(worker, stage, job))
    found, _ = Checkpoints(folder / "checkpoints").read_newest()
    assert found is not None
    return hash_state([found.shared, found.shards])


SCHEDULES: dict[str, Any] = {
    "none": None,
    "cosine, by step": {"name": "CosineAnnealingLR"},
    "by epoch": {"name": "MultiStepLR", "milestones": [1, 3], "gamma": 0.1, "interval": "epoch"},
    "one cycle": {"name": "OneCycleLR", "max_lr": 0.5},
    "periods": {"name": "CosineAnnealingLR", "period": 5},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_in_segments_and_its_copy_end_bit_identical(tmp_path: Path, digits: Store, name: str) -> None:
    """With the same settings: the copy has all of the state, and its schedule continues where it was."""
    changes = {"stages__pretrain__schedule": SCHEDULES[name]}
    whole = hash_of_training(tmp_path / "whole", digits, **changes)
    for until in (1, 2):
        hash_of_training(tmp_path / "parts", digits, until=until, **changes)
    begin = copy_checkpoint(tmp_path / "parts", tmp_path / "other", 2)
    assert hash_of_training(tmp_path / "parts", digits, **changes) == whole
    assert hash_of_training(tmp_path / "copied", digits, begin=begin, **changes) == whole
    steps = [
        [row["step"] for row in read_metrics(tmp_path / folder / METRICS_FILE)]
        for folder in ("whole", "parts", "copied")
    ]
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_in_steps_is_cut_into_segments_inside_epochs(tmp_path: Path, digits: Store, name: str) -> None:
    """The training has 11 steps, three in an epoch; with the same settings the copy ends as the whole training."""
    length = {"stages__pretrain__epochs": None, "stages__pretrain__steps": 11}
    changes = {"stages__pretrain__schedule": SCHEDULES[name], **length}
    whole = hash_of_training(tmp_path / "whole", digits, **changes)
    for until in (4, 8):
        hash_of_training(tmp_path / "parts", digits, until=until, **changes)
    begin = copy_checkpoint(tmp_path / "parts", tmp_path / "other", 8)
    assert hash_of_training(tmp_path / "parts", digits, **changes) == whole
    assert hash_of_training(tmp_path / "copied", digits, begin=begin, **changes) == whole


def test_copy_with_another_setting_changes_only_that(tmp_path: Path, digits: Store) -> None:
    """The learning rate follows the schedule of the new setting. Losses are equal up to the copy, and differ after."""
    hash_of_training(tmp_path / "one", digits, until=2)
    begin = copy_checkpoint(tmp_path / "one", tmp_path / "place", 2)
    hash_of_training(tmp_path / "two", digits, begin=begin, stages__pretrain__optimizer__lr=0.05)
    hash_of_training(tmp_path / "one", digits)
    one, two = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("one", "two"))
    assert [row["loss"] for row in one[:6]] == [row["loss"] for row in two[:6]]
    assert one[6]["loss"] == two[6]["loss"], "the loss of the networks as they were copied"
    assert one[7]["loss"] != two[7]["loss"]
    assert [row["lr"] for row in two[6:]] == pytest.approx([0.1 * row["lr"] for row in one[6:]])


def test_copy_that_was_stopped_resumes_from_its_own_checkpoint(tmp_path: Path, digits: Store) -> None:
    hash_of_training(tmp_path / "one", digits, until=1)
    begin = copy_checkpoint(tmp_path / "one", tmp_path / "place", 1)
    changes = {"stages__pretrain__optimizer__lr": 0.05}
    clean = hash_of_training(tmp_path / "clean", digits, begin=begin, **changes)
    hash_of_training(tmp_path / "cut", digits, begin=begin, until=3, **changes)
    shutil.rmtree(tmp_path / "place")
    assert hash_of_training(tmp_path / "cut", digits, begin=begin, **changes) == clean


def test_checkpoint_of_other_images_is_refused(tmp_path: Path, digits: Store) -> None:
    hash_of_training(tmp_path / "one", digits, until=1)
    begin = copy_checkpoint(tmp_path / "one", tmp_path / "place", 1)
    with pytest.raises(StopTraining, match="other images or another order"):
        hash_of_training(tmp_path / "two", digits, begin=begin, stages__pretrain__batch_size=50)
    shutil.rmtree(tmp_path / "place" / pbt.COPIED_FOLDER / "1" / "checkpoints")
    with pytest.raises(StopTraining, match="has no checkpoint to continue from"):
        hash_of_training(tmp_path / "three", digits, begin=begin)


def test_copy_is_complete_or_missing(tmp_path: Path, digits: Store) -> None:
    hash_of_training(tmp_path / "one", digits, until=1)
    (sealed,) = {path.parent for path in (tmp_path / "one" / "checkpoints").glob(f"*3-*/{FOLDER_MANIFEST}")}
    file = sealed / "shared.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    assert copy_checkpoint(tmp_path / "one", tmp_path / "place", 1) is None
    assert list((tmp_path / "place" / pbt.COPIED_FOLDER).iterdir()) == []
    file.write_bytes(whole)
    found = copy_checkpoint(tmp_path / "one", tmp_path / "place", 1)
    shutil.rmtree(tmp_path / "one")
    assert copy_checkpoint(tmp_path / "one", tmp_path / "place", 1) == found, "a complete copy is not made again"


def test_copied_networks_keep_the_settings_that_trained_them(tmp_path: Path, digits: Store) -> None:
    """A trial that copies another one records the earlier and the last settings of that one."""
    hash_of_training(tmp_path / "training", digits, until=1)
    trials = paused_trials([0.3, 0.1, 0.2, 0.4], str(tmp_path / "training"))
    trials[1].before = [(1, {LR: 0.9, PERIOD: 1})]
    trials[1].parts = [Segment(1, {LR: 0.9, PERIOD: 1}, 0.5, None), Segment(2, trials[1].values, 0.1, 3)]
    trials[1].origin = 3
    before = dict(trials[1].values)
    search = population_search(pbt={"factors": [0.5, 2.0]})
    exchanged = apply_exchanges(search, trials, lambda trial: tmp_path / trial.name)
    assert [(trial.number, replaced) for trial, replaced in exchanged] == [(3, str(tmp_path / "training"))]
    assert (trials[3].origin, trials[3].before) == (1, [(1, {LR: 0.9, PERIOD: 1}), (2, before)])
    assert trials[1].origin is None
    assert (tmp_path / "003" / pbt.COPIED_FOLDER / "1").exists()


def test_networks_of_different_shapes_are_refused(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"algorithm": "random", "scheduler": PBT}
    check_networks(make_plan(tmp_path, **changes), 10)
    wanted = make_plan(
        tmp_path, space={LR: {"choice": [0.1, 0.2]}, "stages.pretrain.method.dim": {"choice": [8, 16]}}, **changes
    )
    with pytest.raises(
        UserError,
        match=r"^space\.stages\.pretrain\.method\.dim: cannot change in the middle of a training: .* is .*16.* with 16",
    ):
        check_networks(wanted, 10)


def test_segments_end_every_interval_and_at_the_end() -> None:
    scheduler, trial = Pbt(name="pbt", interval=3), Trial(0, {})
    seen = []
    for _ in range(pbt.count_segments(scheduler, 8)):
        pbt.schedule_next_segment(scheduler, trial, 8)
        seen.append(trial.until)
        trial.parts.append(Segment(trial.until or 8, {}, 0.0, None))
    assert seen == [3, 6, None]
