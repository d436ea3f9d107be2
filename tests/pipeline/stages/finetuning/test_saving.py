"""The model of the first arm is saved with how it was made, and the filters of all arms if they were trained."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.finetuning.saving import save_arm_models
from firstlight.pipeline.stages.pictures import FILTERS_FILE
from firstlight.pipeline.stages.prediction.saved_model import MODEL_FOLDER, read_model
from tests.support.finetunings import start_arm


@pytest.mark.parametrize("arm", ["scratch", "pretrained"])
def test_model_of_the_first_arm_is_saved_with_its_facts(tmp_path: Path, digits: Store, arm: str) -> None:
    context, stage, instance, task = start_arm(tmp_path, digits, arm, stages__finetune__arms=[arm])
    save_arm_models(context, stage, instance, {arm: task}, {"labels": 40, arm: {"lr": 0.3}})
    model = read_model(instance.folder / MODEL_FOLDER)
    assert model.facts == {"arm": arm, "lr": 0.3, "labels": 40, "store": digits.hash, "seed": 3}
    assert model.classes == digits.classes
    own, saved = task.state_dict(), model.task.state_dict()
    assert all(bool((own[name] == saved[name]).all()) for name in own)


@pytest.mark.parametrize(("train", "has_filters"), [("all", True), ("head", False)])
def test_filters_are_saved_where_the_encoder_was_trained(
    tmp_path: Path, digits: Store, train: Any, has_filters: bool
) -> None:
    changes = {"stages__finetune__task": {"name": "classify", "train": train}, "stages__finetune__arms": ["scratch"]}
    context, stage, instance, task = start_arm(tmp_path, digits, "scratch", **changes)
    save_arm_models(context, stage, instance, {"scratch": task}, {"labels": 40, "scratch": {"lr": 0.3}})
    assert (instance.folder / FILTERS_FILE).exists() == has_filters
