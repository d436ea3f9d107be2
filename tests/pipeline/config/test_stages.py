"""Parts of the sections of stages: label budgets, encoders, frozen features, the registry of sections."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from firstlight.pipeline.config import stages
from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.stages import (
    DownstreamStage,
    LabelBudget,
    StageConfig,
    TrainingLength,
    register_section,
)
from tests.support import recipes


@pytest.mark.parametrize(
    ("keys", "given"),
    [
        ({}, {}),
        ({"labels_per_class": 3}, {"labels_per_class": 3}),
        ({"labels_fraction": 0.1, "labels_subset": None}, {"labels_fraction": 0.1}),
        ({"labels_subset": "fold0"}, {"labels_subset": "fold0"}),
    ],
)
def test_label_budget_is_one_key_at_most(keys: dict[str, Any], given: dict[str, Any]) -> None:
    assert LabelBudget(**keys).labels_given == given


def test_two_label_keys_are_named_with_their_values() -> None:
    with pytest.raises(ValidationError, match=r"labels_per_class: 3, labels_subset: fold0: only one of"):
        LabelBudget(labels_per_class=3, labels_subset="fold0")


@pytest.mark.parametrize(
    ("length", "steps", "epochs", "text"),
    [
        (TrainingLength(3, "epochs"), 21, 3, "3 epochs"),
        (TrainingLength(21, "steps"), 21, 3, "21 steps"),
        (TrainingLength(22, "steps"), 22, 4, "22 steps"),
        (TrainingLength(1, "steps"), 1, 1, "1 steps"),
        (TrainingLength(15600, "steps"), 15600, 2229, "15,600 steps"),
    ],
)
def test_length_has_steps_and_epochs_that_begin(length: TrainingLength, steps: int, epochs: int, text: str) -> None:
    assert (length.count_steps(7), length.count_epochs(7), str(length)) == (steps, epochs, text)


@pytest.mark.parametrize("given", [{"epochs": 4}, {"steps": 9}, {"epochs": None, "steps": 9}])
def test_recipe_with_either_length_is_read_again_as_it_was(tmp_path: Path, given: dict[str, Any]) -> None:
    raw = recipes.recipe(tmp_path).dump()
    del raw["stages"]["pretrain"]["epochs"], raw["stages"]["pretrain"]["steps"]
    raw["stages"]["pretrain"] |= given
    recipe = parse_recipe(raw)
    assert parse_recipe(recipe.dump()) == recipe
    stage: Any = recipe.stages["pretrain"]
    assert (stage.epochs, stage.steps) == (given.get("epochs"), given.get("steps"))


@pytest.mark.parametrize("encoder", ["previous", "runs:/1a2b/encoder", "models:/digits@best", "models:/digits/3"])
def test_encoder_is_previous_or_in_mlflow(encoder: str) -> None:
    assert DownstreamStage(kind="x", encoder=encoder).encoder == encoder


@pytest.mark.parametrize("encoder", ["", "best", "runs:/1a2b", "models:/", "previous2"])
def test_other_encoder_is_rejected(encoder: str) -> None:
    with pytest.raises(ValidationError):
        DownstreamStage(kind="x", encoder=encoder)


def test_section_is_registered_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sample(StageConfig):
        kind: Literal["sample"]

    monkeypatch.setattr(stages, "STAGE_SECTIONS", {})
    assert register_section(Sample) == "sample"
    assert {"sample": Sample} == stages.STAGE_SECTIONS
