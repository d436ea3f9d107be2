"""The section of exports."""

import pytest
from pydantic import ValidationError

from firstlight.pipeline.stages.sections.export import Export


def test_model_is_taken_as_a_whole_and_an_encoder_is_not() -> None:
    assert Export(kind="export", what="model").takes_model
    assert not Export(kind="export").takes_model


def test_no_format_occurs_twice() -> None:
    assert Export(kind="export").formats is None
    with pytest.raises(ValidationError, match="must not repeat a name"):
        Export(kind="export", formats=("onnx", "onnx"))
