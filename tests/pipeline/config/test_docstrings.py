"""Meanings of parameters, read from docstrings."""

import pytest

from firstlight.pipeline.config.docstrings import SHARED_MEANINGS, parse_parameter_meanings, summarize

NAMES = ["dim", "assign", "low", "high", "scale", "norm"]


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("`dim`: the dimension. It is large.", {"dim": "The dimension. It is large."}),
        ("`dim`: d, the dimension.", {"dim": "d, the dimension."}),
        ("`assign: local` is cheap; `global` is not.", {"assign": "`local` is cheap; `global` is not."}),
        ("`assign: local`: the cheap way.", {"assign": "`local`: the cheap way."}),
        ("`low` and `high`: the bounds.", {"low": "The bounds.", "high": "The bounds."}),
        ("`dim`: one. `low`: two.", {"dim": "One.", "low": "Two."}),
        ("`dim`: one.\n`low`: two.", {"dim": "One.", "low": "Two."}),
        ("`dim`: one.\n\nAnother text.", {"dim": "One."}),
        ("A summary.\n\n- `dim`: one\n  and a half.\n- `low`: two.", {"dim": "One and a half.", "low": "Two."}),
        ("A crop of `scale` times the side. More.", {"scale": "A crop of `scale` times the side."}),
        ("A summary.\n\nRaises:\n    ValueError: `dim`: wrong.", {}),
        ("`other`: nothing. `dim` is mentioned.", {"dim": "`dim` is mentioned."}),
        (None, {}),
    ],
)
def test_meanings_of_a_docstring(docstring: str | None, found: dict[str, str]) -> None:
    meanings = parse_parameter_meanings([docstring], NAMES)
    assert meanings == {"norm": SHARED_MEANINGS["norm"], **found}


def test_first_docstring_that_defines_a_parameter_counts() -> None:
    assert parse_parameter_meanings(["`dim` is used.", "`dim`: own.", "`dim`: base."], ["dim"]) == {"dim": "Own."}


def test_own_description_replaces_the_shared_one() -> None:
    assert parse_parameter_meanings(["`norm`: of the decoder."], ["norm"]) == {"norm": "Of the decoder."}


def test_summary_ends_before_the_errors() -> None:
    assert summarize("One\n    line.\n\n    Two.\n\n    Raises:\n        ValueError: x.\n    ") == "One line.\n\nTwo."
    assert summarize(None) == ""
