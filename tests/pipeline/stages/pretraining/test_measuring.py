"""The measurements of a trained method are those of the encoder that it hands on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.pretraining.job import build_job, build_seeded_method
from firstlight.pipeline.stages.pretraining.measuring import compute_held_out_features, score_classifier
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.pretrain.method import Method
from firstlight.tasks.teacher import Teacher
from tests.support import recipes


def build(folder: Path, store: Store) -> tuple[StageContext, Any, Method]:
    context = StageContext.create(recipes.recipe(folder), store, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    job = build_job(context, stage, StageInstance("pretrain", 3, "f", folder / "job"))
    return context, stage, build_seeded_method(context, stage, job)


def test_features_are_of_the_exported_encoder(tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    context, stage, method = build(tmp_path, digits)
    student = compute_held_out_features(context, stage, method)
    teacher: Any = Teacher(method.encoder).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(-0.5)
    monkeypatch.setattr(method, "exported_encoder", lambda: teacher.network)
    taught = compute_held_out_features(context, stage, method)
    assert student is not None
    assert taught is not None
    assert np.array_equal(student[0], taught[0])
    assert not torch.allclose(student[1], taught[1])
    ids = torch.from_numpy(student[0])
    assert set(ids.tolist()) <= set(context.splits.val.tolist())


def test_features_that_are_not_finite_are_not_compared(tmp_path: Path, digits: Store) -> None:
    context, stage, method = build(tmp_path, digits)
    with torch.no_grad():
        next(method.encoder.parameters()).fill_(float("nan"))
    assert compute_held_out_features(context, stage, method) is None


def test_method_without_a_classifier_has_no_accuracy(tmp_path: Path, digits: Store) -> None:
    assert score_classifier(*build(tmp_path, digits)) == {}
