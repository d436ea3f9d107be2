"""The base class of sections."""

import pytest
from pydantic import ValidationError

from firstlight.pipeline.config.schemas.strict_model import StrictModel


class Section(StrictModel):
    number: float = 1.0


@pytest.mark.parametrize("values", [{"numbre": 1.0}, {"number": "1"}, {"number": float("nan")}])
def test_unknown_keys_wrong_types_and_nan_are_errors(values: dict[str, object]) -> None:
    assert Section.model_validate({"number": 2.0}).number == 2.0
    with pytest.raises(ValidationError):
        Section.model_validate(values)


def test_section_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Section().number = 2.0  # type: ignore[misc]
