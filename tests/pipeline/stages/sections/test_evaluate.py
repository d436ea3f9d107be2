"""The section of evaluations."""

import pytest
from pydantic import ValidationError

from firstlight.pipeline.stages.sections.evaluate import Evaluate


def test_measures_of_several_layers_have_their_endings() -> None:
    stage = Evaluate(kind="evaluate", layers=(0, -1), arms=("pretrained", "random"))
    assert [measure.name for measure in stage.measures] == [
        "knn_layer0",
        "probe_layer0",
        "knn_layer-1",
        "probe_layer-1",
    ]
    assert stage.feature_layers == (0, -1)


def test_bank_is_a_companion_and_its_measure_comes_first() -> None:
    stage = Evaluate(kind="evaluate", features="head", knn_bank=True)
    assert stage.companions == ("head", "bank")
    assert [measure.name for measure in stage.measures] == ["knn_bank", "knn", "probe"]


def test_no_layer_occurs_twice() -> None:
    with pytest.raises(ValidationError, match="must not repeat a layer"):
        Evaluate(kind="evaluate", layers=(1, 1))
