"""The publisher of kinds without their own logs the measures of a stage, and finds them again in a run."""

from pathlib import Path
from typing import Any

from firstlight.pipeline.report.publish.publisher import StagePublisher
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
