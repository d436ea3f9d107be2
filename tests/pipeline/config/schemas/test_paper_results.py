"""The results of a paper and of a full run that a recipe states."""

import pytest
from pydantic import ValidationError

from firstlight.pipeline.config.schemas.paper_results import ExpectedResult, ResourceEstimate


def test_expected_result_is_of_the_pretrained_arm_by_default() -> None:
    found = ExpectedResult(stage="evaluate", measure="knn", paper=89.2, source="table 1")
    assert (found.arm, found.against) == ("pretrained", None)
    with pytest.raises(ValidationError, match="source"):
        ExpectedResult(stage="evaluate", measure="knn", paper=89.2, source="")


def test_estimate_takes_some_time() -> None:
    with pytest.raises(ValidationError, match="hours"):
        ResourceEstimate(data="digits", gpus=0, hours=0.0, estimate="measured")
