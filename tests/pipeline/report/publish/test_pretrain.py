"""Pretrainings: the scores that lists show, and the views that the network sees."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.publish import pretrain as module
from firstlight.pipeline.report.publish.pretrain import _add_curves, _load_views
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.visuals import Plot
from tests.support import recipes


def test_rounds_of_a_length_in_steps_are_drawn_as_periods_of_epochs(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "super_and", "dim": 8, "rounds": 2}
    length = {"stages__pretrain__epochs": None, "stages__pretrain__steps": 12}
    context = StageContext.create(recipes.recipe(tmp_path, stages__pretrain__method=method, **length), digits, False)
    drawn: list[Plot] = []
    monkeypatch.setattr(module.curves, "plot_loss", lambda rows: None)
    monkeypatch.setattr(module.curves, "plot_speed", lambda rows: None)
    monkeypatch.setattr(module.curves, "plot_periods", lambda rows, plot: drawn.append(plot))
    stage: Any = context.recipe.stages["pretrain"]
    _add_curves(mock.Mock(), context, stage, StageInstance("pretrain", 0, "f", tmp_path))
    assert [(plot.unit, plot.every) for plot in drawn] == [("round", 2)], "4 epochs of 3 steps"


def test_views_differ_between_epochs_and_are_in_the_range_of_the_network(tmp_path: Path, digits: Store) -> None:
    context = StageContext.create(recipes.recipe(tmp_path), digits, on_ray=False)
    stage: Any = context.recipe.stages["pretrain"]
    grid = _load_views(context, stage, StageInstance("pretrain", 0, "f", tmp_path))
    assert [row.caption for row in grid.rows] == ["epoch 1", "epoch 2"]
    first, second = (row.images for row in grid.rows)
    assert first.shape == second.shape == (8, 3, 8, 8)
    assert 0 <= first.min() < first.max() <= 1
    assert not torch.equal(first, second)
