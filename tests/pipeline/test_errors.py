"""Texts of errors: one line, and the valid words."""

from firstlight.pipeline.errors import describe_os_error, one_line, suggest_valid, take_first_line


def test_near_word_is_suggested_before_the_valid_words() -> None:
    assert suggest_valid("wrkers", ["workers", "cpus"]) == "did you mean 'workers'? (valid: cpus, workers)"


def test_far_word_gets_the_valid_words_alone() -> None:
    assert suggest_valid("zzz", ["workers", "cpus"]) == "valid: cpus, workers"


def test_one_line_joins_lines_and_cuts() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line("x" * 300, limit=10) == "x" * 10
    assert one_line("x" * 300, limit=None) == "x" * 300


def test_first_line_is_that_of_the_text() -> None:
    assert take_first_line(ValueError("\n a\nb")) == "a"
    assert take_first_line(ValueError()) == ""


def test_os_error_is_called_by_what_the_system_says_and_others_by_their_text() -> None:
    assert describe_os_error(FileNotFoundError(2, "No such file or directory", "/x")) == "No such file or directory"
    assert describe_os_error(OSError("the disk\n is gone")) == "the disk is gone"
    assert describe_os_error(ValueError("a" * 300)) == "a" * 200
    assert describe_os_error(ValueError("a" * 300), limit=None) == "a" * 300
