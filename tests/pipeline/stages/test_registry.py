"""Kinds of stages are found by the name that their section allows, and no name is taken twice."""

from pathlib import Path
from typing import Literal

import pytest

from firstlight.pipeline.config.stages import STAGE_SECTIONS
from firstlight.pipeline.stages.registry import STAGES, register_stage, stage_kind
from firstlight.pipeline.stages.sections.known import KNOWN_SECTIONS
from tests.support import recipes
from tests.support.own_training import OwnTraining, OwnTrainingStage, know_own_training


class OtherTraining(OwnTraining):
    """Another section of the same name."""

    kind: Literal["own_training"]


class OtherTrainingStage(OwnTrainingStage):
    section = OtherTraining


def test_each_known_section_has_a_kind_that_takes_it() -> None:
    assert [STAGES[kind].section for kind in STAGES] == list(KNOWN_SECTIONS)
    assert all(STAGE_SECTIONS[kind] is STAGES[kind].section for kind in STAGES)


def test_kind_of_a_section_is_that_of_its_name(tmp_path: Path) -> None:
    for name, stage in recipes.recipe(tmp_path).stages.items():
        assert stage_kind(stage) is STAGES[name]


def test_second_kind_of_a_name_is_refused_and_the_first_stays() -> None:
    with know_own_training():
        first = STAGES["own_training"]
        with pytest.raises(
            ValueError, match=r"'own_training' is the kind of OwnTraining .*; OtherTraining needs anoth"
        ):
            register_stage(OtherTrainingStage())
        assert STAGES["own_training"] is first
        assert STAGE_SECTIONS["own_training"] is OwnTraining
        # The same kind again, as of a notebook's cell that is run again.
        register_stage(OwnTrainingStage())
    assert "own_training" not in STAGES
