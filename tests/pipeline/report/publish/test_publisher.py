"""The publisher of kinds without their own logs the measures of a stage, and finds them again in a run."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.report.publish.publisher import Score, StagePublisher
from firstlight.pipeline.tracking.lineage import Run
from tests.support import recipes
from tests.support.recorded_tracking import RecordedTracking
from tests.support.stage_results import evaluated, finished


def test_measures_of_all_arms_and_splits_are_logged_with_the_result(tmp_path: Path) -> None:
    stage = recipes.recipe(tmp_path).stages["evaluate"]
    instance = finished(tmp_path, "evaluate", 0, evaluated(0.0))
    tracking: Any = RecordedTracking()
    StagePublisher[Any]().publish(tracking, "run", None, stage, instance)  # type: ignore[arg-type]
    assert tracking.results == {
        "pretrained/knn_val": 0.0,
        "pretrained/knn_test": 0.5,
        "pretrained/probe_val": 0.0,
        "pretrained/probe_test": 0.6,
        "random/knn_val": 0.0,
        "random/knn_test": 0.1,
        "random/probe_val": 0.0,
        "random/probe_test": 0.2,
    }
    assert tracking.texts == {"result.json": instance.result}


@pytest.mark.parametrize(
    ("metrics", "scores"),
    [
        ({"own/score_test": 0.5, "own/score_val": 0.4, "loss": 1.0}, {"score": Score(0.5)}),
        ({"random/score_test": 0.25, "pretrained/score_test": 0.5}, {"score": Score(0.5, 0.25, "random")}),
        (
            {"given/score_test": 0.375, "pretrained/score_test": 0.5, "random/score_test": 0.25},
            {"score": Score(0.5, 0.25, "random", given_value=0.375)},
        ),
        ({"loss": 1.0}, {}),
    ],
)
def test_scores_on_test_images_are_compared_with_the_other_arm(
    metrics: dict[str, float], scores: dict[str, Score]
) -> None:
    run = Run("id", "toy", "toy", "FINISHED", 0.0, 1.0, None, "", None, {}, {}, metrics)
    assert StagePublisher[Any]().summarise(run) == scores
