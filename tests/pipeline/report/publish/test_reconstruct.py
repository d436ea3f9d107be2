"""Reconstructions: decibels in MLflow and in lists, and a figure for every grid."""

from pathlib import Path
from typing import Any

import torch

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.publish.reconstruct import ReconstructPublisher
from firstlight.pipeline.stages.pictures import PICTURES_FILE, save_pictures
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.visuals import ImageGrid, ImageRow
from tests.support import recipes
from tests.support.recorded_tracking import RecordedTracking
from tests.support.stage_results import finished


def test_ratio_and_figures_are_published(tmp_path: Path, digits: Store) -> None:
    recipe = recipes.recipe(tmp_path, stages__again={"kind": "reconstruct"})
    context = StageContext.create(recipe, digits, on_ray=False)
    instance = finished(tmp_path, "again", 0, {"images": 9, "psnr": {"test": 21.5}})
    row = ImageRow("clean", torch.rand(2, 3, 8, 8))
    save_pictures(
        [ImageGrid("reconstructions", "them", (row,)), ImageGrid("feature_maps", "these", (row,))],
        instance.folder / PICTURES_FILE,
    )
    tracking: Any = RecordedTracking()
    stage: Any = recipe.stages["again"]
    ReconstructPublisher().publish(tracking, "run", context, stage, instance)
    assert tracking.results == {"psnr_test": 21.5}
    assert {"reconstructions.png", "feature_maps.png"} <= set(tracking.files["figures"])
