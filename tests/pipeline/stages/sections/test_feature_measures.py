"""Measures of frozen features and their names in tables."""

import pytest

from firstlight.pipeline.config.measures import Measure
from firstlight.pipeline.stages.sections.evaluate import Evaluate
from firstlight.pipeline.stages.sections.feature_measures import compare_features, describe_features, label_features


@pytest.mark.parametrize(
    ("keys", "words"),
    [({}, [""]), ({"layers": (0, -1)}, ["layer 0", "layer -1"]), ({"features": "head"}, ["head"])],
)
def test_features_are_named_unless_they_are_of_the_deepest_map(keys: dict[str, object], words: list[str]) -> None:
    assert describe_features(Evaluate.model_validate({"kind": "evaluate", **keys})) == words


def test_details_that_are_empty_are_left_out() -> None:
    assert label_features("kNN", "k=20", "") == "kNN (k=20)"
    assert label_features("probe", "") == "probe"


def test_last_arm_is_the_baseline_under_its_title() -> None:
    stage = Evaluate(kind="evaluate", arms=("random", "pretrained"))
    assert compare_features(stage, "knn", "kNN") == Measure("knn", "kNN", ("pretrained", "random"), "random weights")
