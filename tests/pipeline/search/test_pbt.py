"""Population-based training: who goes on from whom, what settings become, and that a training which is handed over loses nothing."""

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
from firstlight.pipeline.search.ledger import Part, Trial
from firstlight.pipeline.search.pbt import changed, check_networks, exchange, exchanges, explored, hand_over
from firstlight.pipeline.search.space import Dimension, Pbt, Search
from firstlight.pipeline.stages import pretrain
from firstlight.pipeline.stages.stage import Instance
from firstlight.pipeline.train.checkpoint import MANIFEST, Checkpoints, fingerprint
from firstlight.pipeline.train.context import Worker
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS, read_metrics
from tests.support import recipes
from tests.support.searches import LR, PERIOD, parsed, plan

PBT: dict[str, Any] = {"name": "pbt", "measure": "pretrain.loss", "mode": "min", "interval": 1}


def of_population(**changes: Any) -> Search:
    return parsed(algorithm="random", scheduler={**PBT, **changes.pop("pbt", {})}, trials=8, **changes)


def resting(values: list[float], training: str = "") -> list[Trial]:
    """Trials whose first part has come to these values."""
    rate = [0.1 + 0.01 * k for k in range(len(values))]
    parts = [[Part(1, {LR: rate[k], PERIOD: 2}, value, None)] for k, value in enumerate(values)]
    return [
        Trial(k, {LR: rate[k], PERIOD: 2}, parts=parts[k], resting=True, training=training) for k in range(len(values))
    ]


@pytest.mark.parametrize(("mode", "worst", "best"), [("max", {0, 3}, {6, 7}), ("min", {6, 7}, {0, 3})])
def test_the_worst_quarter_goes_on_from_the_best(mode: str, worst: set[int], best: set[int]) -> None:
    trials = resting([0.1, 0.5, 0.6, 0.2, 0.4, 0.7, 0.8, 0.9])
    search = of_population(pbt={"mode": mode})
    found = exchanges(search, trials)
    assert {exchange.trial for exchange in found} == worst
    assert {exchange.origin for exchange in found} <= best
    assert found == exchanges(search, list(reversed(trials))), "in whatever order they ended"
    assert found != exchanges(of_population(pbt={"mode": mode}, seed=1), trials)


@pytest.mark.parametrize(
    ("count", "quantile", "changing"), [(1, 0.25, 0), (2, 0.25, 1), (3, 0.5, 1), (5, 0.25, 2), (8, 0.5, 4)]
)
def test_nobody_is_both_best_and_worst(count: int, quantile: float, changing: int) -> None:
    found = exchanges(of_population(pbt={"quantile": quantile}), resting([0.1 * k for k in range(count)]))
    assert len(found) == changing
    assert not {exchange.trial for exchange in found} & {exchange.origin for exchange in found}


def test_both_of_the_best_are_taken_and_settings_differ() -> None:
    """Over seeds."""
    trials = resting([0.1 * k for k in range(8)])
    found = [exchange for seed in range(40) for exchange in exchanges(of_population(seed=seed), trials)]
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
def test_a_setting_changes_a_little_and_stays_in_its_space(
    dimension: dict[str, Any], value: Any, up: bool, becomes: Any
) -> None:
    found = changed(Dimension.model_validate_json(json.dumps(dimension)), value, 1.2 if up else 0.8, up)
    assert found == pytest.approx(becomes)
    assert type(found) is type(becomes)


def test_all_settings_stay_in_the_space() -> None:
    space = {
        LR: {"loguniform": [0.01, 1.0]},
        "c": {"randint": [2, 11, 4]},
        "d": {"quniform": [0.1, 1.0, 0.3]},
        PERIOD: {"choice": [1, 2]},
    }
    search, values = of_population(space=space), {LR: 0.3, "c": 6, "d": 0.4, PERIOD: 2}
    for seed in range(200):
        values = explored(search, values, np.random.default_rng(seed))
        assert 0.01 <= values[LR] <= 1.0
        assert values["c"] in (2, 6, 10)
        assert min(abs(values["d"] - grid) for grid in (0.1, 0.4, 0.7, 1.0)) < 1e-9
        assert values[PERIOD] in (1, 2)


def pretrained(folder: Path, store: Store, begin: Path | None = None, until: int | None = None, **changes: Any) -> str:
    """A hash of every bit at the end of a part of the small recipe's pretraining, of four epochs."""
    worker = Worker.start(recipes.recipe(folder, **{"stages__pretrain__epochs": 4, **changes}), store, on_ray=False)
    stage: Any = worker.recipe.stages["pretrain"]
    job = pretrain.job(worker, stage, Instance("pretrain", 3, "f", folder, begin=begin, until=until))
    with (
        contextlib.nullcontext() if until is None else pytest.raises(Paused, match=f"pauses after {until} of 4 epochs")
    ):
        fit(job, pretrain.build(worker, stage, job))
    found, _ = Checkpoints(folder / "checkpoints").newest()
    assert found is not None
    return fingerprint([found.shared, found.shards])


SCHEDULES: dict[str, Any] = {
    "none": None,
    "cosine, by step": {"name": "CosineAnnealingLR"},
    "by epoch": {"name": "MultiStepLR", "milestones": [1, 3], "gamma": 0.1, "interval": "epoch"},
    "one cycle": {"name": "OneCycleLR", "max_lr": 0.5},
    "periods": {"name": "CosineAnnealingLR", "period": 5},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_in_parts_and_handed_over_it_ends_bit_identical(tmp_path: Path, digits: Store, name: str) -> None:
    """With the same settings: all of the state is handed over, and the schedule comes to where it was."""
    changes = {"stages__pretrain__schedule": SCHEDULES[name]}
    whole = pretrained(tmp_path / "whole", digits, **changes)
    for until in (1, 2):
        pretrained(tmp_path / "parts", digits, until=until, **changes)
    begin = hand_over(tmp_path / "parts", tmp_path / "other", 2)
    assert pretrained(tmp_path / "parts", digits, **changes) == whole
    assert pretrained(tmp_path / "handed", digits, begin=begin, **changes) == whole
    steps = [
        [row["step"] for row in read_metrics(tmp_path / folder / METRICS)] for folder in ("whole", "parts", "handed")
    ]
    assert steps[0] == steps[1] == steps[2]


def test_handed_over_with_another_setting_only_that_changes(tmp_path: Path, digits: Store) -> None:
    """The learning rate becomes what the schedule of the new one has come to; the losses up to there stay, and those that come are others."""
    pretrained(tmp_path / "one", digits, until=2)
    begin = hand_over(tmp_path / "one", tmp_path / "place", 2)
    pretrained(tmp_path / "two", digits, begin=begin, stages__pretrain__optimizer__lr=0.05)
    pretrained(tmp_path / "one", digits)
    one, two = (read_metrics(tmp_path / name / METRICS) for name in ("one", "two"))
    assert [row["loss"] for row in one[:6]] == [row["loss"] for row in two[:6]]
    assert one[6]["loss"] == two[6]["loss"], "of the networks as they were handed over"
    assert one[7]["loss"] != two[7]["loss"]
    assert [row["lr"] for row in two[6:]] == pytest.approx([0.1 * row["lr"] for row in one[6:]])


def test_stopped_after_it_was_handed_over_it_goes_on_from_its_own(tmp_path: Path, digits: Store) -> None:
    pretrained(tmp_path / "one", digits, until=1)
    begin = hand_over(tmp_path / "one", tmp_path / "place", 1)
    changes = {"stages__pretrain__optimizer__lr": 0.05}
    clean = pretrained(tmp_path / "clean", digits, begin=begin, **changes)
    pretrained(tmp_path / "cut", digits, begin=begin, until=3, **changes)
    shutil.rmtree(tmp_path / "place")
    assert pretrained(tmp_path / "cut", digits, begin=begin, **changes) == clean


def test_a_checkpoint_of_other_images_is_refused(tmp_path: Path, digits: Store) -> None:
    pretrained(tmp_path / "one", digits, until=1)
    begin = hand_over(tmp_path / "one", tmp_path / "place", 1)
    with pytest.raises(StopTraining, match="other images or another order"):
        pretrained(tmp_path / "two", digits, begin=begin, stages__pretrain__batch_size=50)
    shutil.rmtree(tmp_path / "place" / pbt.HANDED / "1" / "checkpoints")
    with pytest.raises(StopTraining, match="there is no checkpoint to go on from"):
        pretrained(tmp_path / "three", digits, begin=begin)


def test_a_copy_is_whole_or_not_there(tmp_path: Path, digits: Store) -> None:
    pretrained(tmp_path / "one", digits, until=1)
    (sealed,) = {path.parent for path in (tmp_path / "one" / "checkpoints").glob(f"*3-*/{MANIFEST}")}
    file = sealed / "shared.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    assert hand_over(tmp_path / "one", tmp_path / "place", 1) is None
    assert list((tmp_path / "place" / pbt.HANDED).iterdir()) == []
    file.write_bytes(whole)
    found = hand_over(tmp_path / "one", tmp_path / "place", 1)
    shutil.rmtree(tmp_path / "one")
    assert hand_over(tmp_path / "one", tmp_path / "place", 1) == found, "one that is there is not copied again"


def test_what_made_the_networks_is_known(tmp_path: Path, digits: Store) -> None:
    """Of one that goes on from another: what that one had before, and what it had at last."""
    pretrained(tmp_path / "training", digits, until=1)
    trials = resting([0.3, 0.1, 0.2, 0.4], str(tmp_path / "training"))
    trials[1].before = [(1, {LR: 0.9, PERIOD: 1})]
    trials[1].parts = [Part(1, {LR: 0.9, PERIOD: 1}, 0.5, None), Part(2, trials[1].values, 0.1, 3)]
    trials[1].origin = 3
    before = dict(trials[1].values)
    changed_ = exchange(of_population(pbt={"factors": [0.5, 2.0]}), trials, lambda trial: tmp_path / trial.name)
    assert [(trial.number, given_up) for trial, given_up in changed_] == [(3, str(tmp_path / "training"))]
    assert (trials[3].origin, trials[3].before) == (1, [(1, {LR: 0.9, PERIOD: 1}), (2, before)])
    assert trials[1].origin is None
    assert (tmp_path / "003" / pbt.HANDED / "1").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "optuna"}, "algorithm: 'optuna' learns from trials that have ended"),
        ({"retrain": True}, "retrain: true is not valid with scheduler: pbt"),
        ({"trials": 1}, "trials: 1 is no population; valid: 2 or more"),
        ({"scheduler": {**PBT, "factors": [1.1, 1.2]}}, "factors"),
        ({"scheduler": {**PBT, "quantile": 0.6}}, "quantile"),
        ({"scheduler": {**PBT, "interval": 2}}, "scheduler.interval: 2 is not valid: stages.pretrain trains 2 epochs"),
        (
            {"space": {"stages.pretrain.batch_size": {"choice": [10, 20]}}},
            "space.stages.pretrain.batch_size: cannot change in the middle of a training",
        ),
        (
            {"space": {"stages.pretrain.optimizer.name": {"choice": ["SGD", "Adam"]}}},
            "space.stages.pretrain.optimizer.name: cannot change in the middle",
        ),
        ({"space": {"encoder.width": {"choice": [4, 8]}}}, "space.encoder.width: cannot change in the middle of a training"),
        ({"overrides": {"seeds": [0, 1]}}, "seeds: [0, 1]: scheduler: pbt trains a network a trial; valid: one seed"),
        (
            {
                "overrides": {"stages.pretrain.epochs": 6, "stages.pretrain.watch.every": 2},
                "scheduler": {**PBT, "measure": "pretrain.watch_rankme", "interval": 3},
            },
            "scheduler.interval: 3 is not valid: pretrain.watch_rankme is known every 2 epochs",
        ),
        (
            {"overrides": {"stages.pretrain.schedule": {"name": "ReduceLROnPlateau", "interval": "epoch"}}},
            "stages.pretrain.schedule.name: 'ReduceLROnPlateau' is not valid with scheduler: pbt",
        ),
    ],
)  # fmt: skip
def test_what_no_population_can_be_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(tmp_path, **{"algorithm": "random", "scheduler": PBT, **changes})
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_networks_of_other_shapes_are_refused(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"algorithm": "random", "scheduler": PBT}
    check_networks(plan(tmp_path, **changes), 10)
    wanted = plan(
        tmp_path, space={LR: {"choice": [0.1, 0.2]}, "stages.pretrain.method.dim": {"choice": [8, 16]}}, **changes
    )
    with pytest.raises(
        UserError,
        match=r"^space\.stages\.pretrain\.method\.dim: cannot change in the middle of a training: .* is .*16.* with 16 and",
    ):
        check_networks(wanted, 10)


def test_a_trial_more_makes_another_population(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"algorithm": "random", "scheduler": PBT}
    assert plan(tmp_path, trials=4, **changes).fingerprint() != plan(tmp_path, trials=5, **changes).fingerprint()
    assert plan(tmp_path, trials=4).fingerprint() == plan(tmp_path, trials=5).fingerprint()


def test_parts() -> None:
    scheduler, trial = Pbt(name="pbt", interval=3), Trial(0, {})
    seen = []
    for _ in range(pbt.parts_of(scheduler, 8)):
        pbt.advance(scheduler, trial, 8)
        seen.append(trial.until)
        trial.parts.append(Part(trial.until or 8, {}, 0.0, None))
    assert seen == [3, 6, None]
