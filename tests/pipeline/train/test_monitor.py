"""The feature monitor changes no bit of a training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.pretraining import job as pretrain_job
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train import failures, monitor
from firstlight.pipeline.train.checkpoint import Checkpoints
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.loop import fit
from firstlight.pipeline.train.metrics import METRICS_FILE, read_metrics
from firstlight.pipeline.train.monitor import FeatureMonitor
from firstlight.tasks.downstream.knn import weighted_knn
from firstlight.tasks.feature_metrics import compute_feature_metrics
from tests.support import recipes
from tests.support.gloo import Pool
from tests.support.state_hash import hash_state

WATCHED = {"every": 1, "images": 30, "knn_k": 5}
SUPER_AND = {"method": {"name": "super_and", "dim": 8, "rounds": 2, "ue_period": 1, "chunk": 40}, "accumulate": 2}
BATCH_NORM = {"method": {"name": "nat", "dim": 8, "hidden": [8], "dropout": 0.5, "norm": "batch"}}


class Stopped(Exception):
    pass


def train(
    folder: Path, store: Store, stop: int | None = None, watch: dict[str, Any] | None = None, **stage_keys: Any
) -> str:
    """Pretrains with a monitor. Returns a hash of every bit of the last checkpoint and of the exported network."""

    def stop_training(rank: int, step: int) -> None:
        if step == stop:
            raise Stopped

    changes = {f"stages__pretrain__{key}": value for key, value in {**stage_keys, "watch": watch or {}}.items()}
    failures.fault_hook = stop_training
    try:
        context = StageContext.create(recipes.recipe(folder, encoder__norm="batch", **changes), store, on_ray=False)
        stage: Any = context.recipe.stages["pretrain"]
        job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", folder / "job"))
        learner = pretrain_job.build_seeded_method(context, stage, job)
        fit(job, learner, FeatureMonitor(context, stage, stage.watch, job, learner))
    except Stopped:
        return "stopped"
    finally:
        failures.fault_hook = None
    found, _ = Checkpoints(folder / "job" / "checkpoints").read_newest()
    assert found is not None
    return hash_state([found.shared, found.shards, learner.state_dict()])


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "job" / METRICS_FILE) if "watch_rankme" in row]


@pytest.mark.parametrize(
    "stage_keys", [BATCH_NORM, SUPER_AND], ids=["dropout and batch statistics", "super_and in parts"]
)
def test_monitored_training_is_bit_identical_also_after_a_stop(
    tmp_path: Path, digits: Store, stage_keys: dict[str, Any]
) -> None:
    clean = train(tmp_path / "clean", digits, **stage_keys)
    assert train(tmp_path / "watched", digits, None, WATCHED, **stage_keys) == clean
    steps = [row["step"] for row in read_evaluations(tmp_path / "watched")]
    assert len(steps) == 2
    for stop in (steps[0], steps[0] + 1):
        folder = tmp_path / f"stop{stop}"
        assert train(folder, digits, stop, WATCHED, **stage_keys) == "stopped"
        assert train(folder, digits, None, WATCHED, **stage_keys) == clean
        values = [{k: v for k, v in row.items() if k.startswith("watch")} for row in read_evaluations(folder)]
        assert values == [
            {k: v for k, v in row.items() if k.startswith("watch")} for row in read_evaluations(tmp_path / "watched")
        ], "each evaluation once, the same"


def train_on_this_rank(folder: str, store: str, stop: int | None, watch: dict[str, Any] | None) -> str:
    return train(Path(folder), Store.open(Path(store)), stop, watch, **BATCH_NORM)


def test_monitored_training_on_two_workers_is_bit_identical(pool: Pool, tmp_path: Path, digits: Store) -> None:
    clean = pool.run(train_on_this_rank, str(tmp_path / "clean"), str(digits.path), None, None)
    assert pool.run(train_on_this_rank, str(tmp_path / "watched"), str(digits.path), None, WATCHED) == clean
    assert [row["step"] for row in read_evaluations(tmp_path / "watched")] == [3, 6]
    assert pool.run(train_on_this_rank, str(tmp_path / "stopped"), str(digits.path), 4, WATCHED) == ["stopped"] * 2
    assert pool.run(train_on_this_rank, str(tmp_path / "stopped"), str(digits.path), None, WATCHED) == clean


def build_monitor(folder: Path, store: Store, **changes: Any) -> tuple[FeatureMonitor, Any]:
    context = StageContext.create(recipes.recipe(folder, **changes), store, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = pretrain_job.build_job(context, stage, StageInstance("pretrain", 3, "f", folder / "job"))
    job.folder.mkdir(parents=True)
    method = pretrain_job.build_seeded_method(context, stage, job).train()
    return FeatureMonitor(context, stage, stage.watch, job, method), method


@pytest.mark.parametrize("features", ["encoder", "head"])
def test_metrics_are_of_held_out_images_and_never_of_test_images(tmp_path: Path, digits: Store, features: str) -> None:
    watch, method = build_monitor(
        tmp_path, digits, dataset__val_fraction=0.3, stages__pretrain__watch={**WATCHED, "features": features}
    )
    found = watch.evaluate()
    assert method.training
    splits = watch.context.splits
    assert set(watch.held_out) <= set(splits.val)
    assert set(watch.bank) <= set(splits.train)
    assert len(watch.held_out) == len(watch.bank) == 30

    @torch.no_grad()
    def compute_features(ids: np.ndarray) -> torch.Tensor:
        (batch,) = watch.context.iterate_batches(ids, 30)
        maps = method.eval().encoder(batch.views[0])
        return method.head(maps) if features == "head" else maps[-1].mean((2, 3))

    held_out, bank = compute_features(watch.held_out), compute_features(watch.bank)
    predicted = weighted_knn(held_out, bank, torch.from_numpy(splits.labels[watch.bank]), 5, 0.1).numpy()
    assert found["watch_knn"] == pytest.approx((predicted == splits.labels[watch.held_out]).mean())
    for name, value in compute_feature_metrics(held_out).items():
        assert found[f"watch_{name}"] == pytest.approx(value, rel=1e-4)
    assert 0 < found["watch_alignment"] < 4


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_features_have_the_precision_of_the_training(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype | None
) -> None:
    seen = set[torch.dtype | None]()
    forward = monitor.FeatureExtractor.forward

    def forward_seen(network: Any, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.add(network.autocast)
        return forward(network, images)

    monkeypatch.setattr(monitor.FeatureExtractor, "forward", forward_seen)
    changes = {"stages__pretrain__watch": WATCHED, "stages__pretrain__precision": precision}
    watch, _ = build_monitor(tmp_path, digits, dataset__val_fraction=0.3, **changes)
    assert watch.evaluate()
    assert seen == {dtype}


def read_notes(folder: Path) -> list[str]:
    file = folder / "job" / METRICS_FILE
    return (
        [json.loads(line)["note"] for line in file.read_text().splitlines() if "note" in line] if file.exists() else []
    )


def test_collapse_is_noted_once(tmp_path: Path, digits: Store) -> None:
    watch, method = build_monitor(tmp_path, digits, stages__pretrain__watch={**WATCHED, "features": "head"})
    with torch.no_grad():
        method.head.layers[-1].weight.zero_()
    watch.evaluate()
    watch.evaluate()
    (note,) = read_notes(tmp_path)
    assert note.startswith("features have collapsed: their effective rank is 1.00 of 8")


def test_nonfinite_features_are_noted(tmp_path: Path, digits: Store) -> None:
    watch, method = build_monitor(tmp_path, digits, stages__pretrain__watch=WATCHED)
    with torch.no_grad():
        method.encoder.stages[0][0].weight.fill_(float("nan"))
    assert watch.evaluate() == {}
    assert read_notes(tmp_path) == ["features of held-out images are not finite numbers"]


def test_unlabelled_images_have_metrics_but_no_knn(tmp_path: Path, digits: Store) -> None:
    watch, _ = build_monitor(tmp_path, digits, stages__pretrain__watch=WATCHED)
    watch.context.splits.labels[:] = -1
    unlabelled = FeatureMonitor(watch.context, watch.stage, watch.options, watch.job, watch.method)
    found = unlabelled.evaluate()
    assert "watch_knn" not in found
    assert found["watch_rankme"] > 1


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [3, 6, 9, 12]), (3, [9, 12]), (4, [12]), (9, [12])])
def test_monitor_is_due_every_n_epochs_and_at_the_end(
    tmp_path: Path, digits: Store, every: int, expected: list[int]
) -> None:
    watch, _ = build_monitor(
        tmp_path, digits, stages__pretrain__epochs=4, stages__pretrain__watch={**WATCHED, "every": every}
    )
    assert [step for step in range(1, watch.job.total_steps + 1) if watch.is_due(step)] == expected


@pytest.mark.parametrize(("steps", "expected"), [(2, [2]), (3, [3]), (7, [3, 6, 7])])
def test_monitor_is_due_at_the_end_of_a_partial_epoch(
    tmp_path: Path, digits: Store, steps: int, expected: list[int]
) -> None:
    length = {"stages__pretrain__epochs": None, "stages__pretrain__steps": steps}
    watch, _ = build_monitor(tmp_path, digits, **length, stages__pretrain__watch=WATCHED)
    assert [step for step in range(1, watch.job.total_steps + 1) if watch.is_due(step)] == expected
