"""The training of a pretraining: its method knows what it is trained on, and for how long."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.pretraining.job import build_job, build_seeded_method, count_steps_per_epoch
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.pipeline.train.training_job import TrainingJob
from firstlight.tasks.pretrain.method import Method
from tests.support import recipes


def build(folder: Path, store: Store, seed: int = 3, **keys: Any) -> tuple[TrainingJob, Method, StageContext]:
    changes = {f"stages__pretrain__{key}": value for key, value in keys.items()}
    context = StageContext.create(recipes.recipe(folder, **changes), store, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = build_job(context, stage, StageInstance("pretrain", seed, "f", folder / "job"))
    return job, build_seeded_method(context, stage, job), context


def test_method_knows_its_images_length_and_views(tmp_path: Path, digits: Store) -> None:
    two_views = {"name": "super_and", "dim": 8, "rounds": 1}
    job, method, context = build(tmp_path, digits, method=two_views, views=[{}, {"size": 6}], epochs=3)
    info, stage = method.info, context.recipe.stages["pretrain"]
    assert (info.size, info.classes, info.epochs, info.seed) == (len(context.splits.train), 10, 3, 3)
    steps_per_epoch = count_steps_per_epoch(stage, context.splits, 3)  # type: ignore[arg-type]
    assert info.steps == job.total_steps == 3 * steps_per_epoch
    assert info.view_sizes == (8, 6)
    assert info.labels is not None
    assert np.array_equal(info.labels.numpy(), context.splits.labels[job.plan.ids])


def test_steps_are_those_of_a_length_in_steps(tmp_path: Path, digits: Store) -> None:
    _, method, _ = build(tmp_path, digits, epochs=None, steps=5)
    assert method.info.steps == 5


def test_fresh_weights_follow_from_the_seed(tmp_path: Path, digits: Store) -> None:
    first, again, other = (build(tmp_path, digits, seed)[1].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
