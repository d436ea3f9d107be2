"""Figures of a store: statistics, a sample, and images per class."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.publish.figure_log import FigureLog
from firstlight.pipeline.report.store_figures import _class_figures, _draw_sample, add_store_figures
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes
from tests.support.recorded_tracking import RecordedTracking


@pytest.fixture
def context(tmp_path: Path, digits: Store) -> StageContext:
    return StageContext.create(recipes.recipe(tmp_path), digits, on_ray=False)


def test_a_store_with_labels_has_statistics_a_sample_and_classes(context: StageContext, tmp_path: Path) -> None:
    tracking: Any = RecordedTracking()
    add_store_figures(FigureLog(tracking, "run", tmp_path), context)
    assert tracking.files["figures"] == ["images.png", "sample.png", "classes.png"]


def test_bars_are_the_images_per_class_of_each_split(context: StageContext) -> None:
    (figure, title) = _class_figures(context.store, context)["classes"]
    assert title == "images per class"
    heights = sorted(round(patch.get_height()) for patch in figure.axes[0].patches)  # type: ignore[attr-defined]
    counts = [int((context.store.labels(split) == k).sum()) for split in context.store.splits for k in range(10)]
    assert heights == sorted(counts)


def test_sample_has_at_most_32_images_with_the_names_of_their_classes(context: StageContext) -> None:
    (axis,) = _draw_sample(context).axes
    assert len(axis.get_images()) == 32
    assert {text.get_text() for text in axis.texts[1:]} <= set(context.store.classes)
