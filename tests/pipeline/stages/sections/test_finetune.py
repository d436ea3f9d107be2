"""The section of fine-tunings."""

from typing import Any

import pytest
from pydantic import ValidationError

from firstlight.pipeline.stages.sections.finetune import Finetune
from tests.support import recipes

KEYS: dict[str, Any] = {"kind": "finetune", "task": {"name": "classify"}, "epochs": 1, "batch_size": 4}
OPTIMIZER = recipes.RECIPE["stages"]["pretrain"]["optimizer"]


def read_section(**keys: Any) -> Finetune:
    return Finetune.model_validate({**KEYS, "optimizer": OPTIMIZER, **keys})


def test_measure_is_that_of_the_task_and_of_each_group_of_classes() -> None:
    stage = read_section(task={"name": "segment"}, class_groups={"animals": ("cat",)})
    assert stage.score_names == ("mean_iou", "mean_iou_animals")
    assert [measure.label for measure in stage.measures] == ["segment mean_iou", "segment mean_iou_animals"]
    assert [measure.label for measure in read_section().measures] == ["classify"]


def test_decoder_is_a_companion_of_the_arm_that_starts_from_it() -> None:
    assert read_section().companions == ()
    assert read_section(arms=("pretrained_decoder", "scratch")).companions == ("decoder",)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rates": (0.1, 0.1000000001)}, "must differ in their first six digits"),
        ({"class_groups": {"Animals": ("cat",)}}, "'Animals' is no name of a group"),
        ({"class_groups": {"animals": ()}}, "animals has no classes"),
        ({"class_groups": {"animals": ("cat", "cat")}}, "must not repeat a class"),
        ({"arms": ("scratch", "scratch")}, "must not repeat an arm"),
    ],
)
def test_wrong_values_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read_section(**keys)
