"""Parts of the sections of stages: label budgets, encoders, frozen features, the registry of sections."""

from typing import Any, Literal

import pytest
from pydantic import ValidationError

from firstlight.pipeline.config import stages
from firstlight.pipeline.config.stages import DownstreamStage, FeatureStage, LabelBudget, StageConfig, register_section


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


@pytest.mark.parametrize("encoder", ["previous", "runs:/1a2b/encoder", "models:/digits@best", "models:/digits/3"])
def test_encoder_is_previous_or_in_mlflow(encoder: str) -> None:
    assert DownstreamStage(kind="x", encoder=encoder).encoder == encoder


@pytest.mark.parametrize("encoder", ["", "best", "runs:/1a2b", "models:/", "previous2"])
def test_other_encoder_is_rejected(encoder: str) -> None:
    with pytest.raises(ValidationError):
        DownstreamStage(kind="x", encoder=encoder)


def test_head_features_need_the_head() -> None:
    assert FeatureStage(kind="x", features="head").companions == ("head",)
    assert FeatureStage(kind="x").companions == ()


def test_section_is_registered_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sample(StageConfig):
        kind: Literal["sample"]

    monkeypatch.setattr(stages, "STAGE_SECTIONS", {})
    assert register_section(Sample) == "sample"
    assert {"sample": Sample} == stages.STAGE_SECTIONS
