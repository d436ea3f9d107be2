"""Texts of errors: one line, and the valid words."""

from firstlight.pipeline.errors import one_line, suggest_valid


def test_near_word_is_suggested_before_the_valid_words() -> None:
    assert suggest_valid("wrkers", ["workers", "cpus"]) == "did you mean 'workers'? (valid: cpus, workers)"


def test_far_word_gets_the_valid_words_alone() -> None:
    assert suggest_valid("zzz", ["workers", "cpus"]) == "valid: cpus, workers"


def test_one_line_joins_lines_and_cuts() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line("x" * 300, limit=10) == "x" * 10
