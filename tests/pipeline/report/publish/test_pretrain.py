"""Pretrainings: the scores that lists show, and the views that the network sees."""

from pathlib import Path
from typing import Any

import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.publish.pretrain import PretrainPublisher, _load_views
from firstlight.pipeline.report.publish.publisher import Score
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.lineage import Run
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes


def test_loss_has_no_unit_and_accuracies_are_shares() -> None:
    metrics = {"loss": 0.75, "own_classifier/test": 0.5, "watch_knn": 0.25, "images_per_s": 9.0}
    run = Run("id", "pretrain", "pretrain", "FINISHED", 0.0, 1.0, None, "", None, {}, {}, metrics)
    assert PretrainPublisher().summarise(run) == {
        "loss": Score(0.75, scale=1.0, unit=""),
        "own classifier": Score(0.5),
        "held-out kNN": Score(0.25),
    }


def test_views_differ_between_epochs_and_are_in_the_range_of_the_network(tmp_path: Path, digits: Store) -> None:
    worker = StageContext.create(recipes.recipe(tmp_path), digits, on_ray=False)
    stage: Any = worker.recipe.stages["pretrain"]
    grid = _load_views(worker, stage, StageInstance("pretrain", 0, "f", tmp_path))
    assert [row.caption for row in grid.rows] == ["epoch 1", "epoch 2"]
    first, second = (row.images for row in grid.rows)
    assert first.shape == second.shape == (8, 3, 8, 8)
    assert 0 <= first.min() < first.max() <= 1
    assert not torch.equal(first, second)
