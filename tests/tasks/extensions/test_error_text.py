"""Texts of errors on one line, as those of the pipeline."""

import pytest

from firstlight.pipeline.errors import one_line
from firstlight.tasks.extensions.error_text import join_error_lines, take_last_line


@pytest.mark.parametrize("text", ["", "a\n  b\tc", "x" * 300])
def test_lines_are_joined_as_in_the_pipeline(text: str) -> None:
    assert join_error_lines(ValueError(text)) == one_line(ValueError(text))


def test_last_line_is_that_of_the_text() -> None:
    assert take_last_line(RuntimeError("Error(s) in loading:\n\tsize mismatch \n")) == "size mismatch"
    assert take_last_line(RuntimeError()) == ""
