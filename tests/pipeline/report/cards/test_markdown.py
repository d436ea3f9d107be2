"""Texts from outside stay what they are in Markdown, in tables and in YAML."""

import re

import pytest
import yaml

from firstlight.pipeline.report.cards.markdown import (
    format_code,
    format_front_matter,
    format_settings,
    format_table,
)

HOSTILE = (
    "`</code><script>alert(1)</script>",
    "a ``` b `` c",
    "x\n---\nlicense: mit\n# Heading\n[link](javascript:alert(1))",
    "a | b \\| c \\\\| <img src=x onerror=alert(1)> |",
    "\u202egpj.exe\u2028\x00\x1b[31m\x85\ufeff",
    '": {a: !!python/object/apply:os.system [x]}\\',
    "\U0001f600 \uffff \ud800 \x7f",
)


def read_code(text: str) -> str:
    """Returns the content of a code span, by CommonMark's rule: the first run of as many backticks ends it."""
    opening = re.match(r"`+", text)
    assert opening
    runs = [run for run in re.finditer(r"`+", text) if len(run[0]) == len(opening[0])]
    assert runs[1].end() == len(text), "it ends before the end of the text"
    return text[opening.end() : runs[1].start()]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_leaves_its_code(text: str) -> None:
    code = format_code(text)
    assert len(code.splitlines()) == 1
    content = read_code(code)
    assert ("<" in content) == ("<" in text), "code has no entities: renderers escape it"
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u202e\ufeff]", content)


def test_short_texts_are_plain_code() -> None:
    assert format_code("Apache-2.0") == "`Apache-2.0`"
    assert format_code("a`b") == "``a`b``"
    assert format_code("`") == "`` ` ``"
    assert format_code(" ") == "` `"


def split_cells(row: str) -> list[str]:
    """Returns the cells of a row by GitHub's rule: a backslash takes the next mark with it."""
    return re.findall(r"\|((?:\\[^\w\s]|[^|])*)(?=\|)", row)


@pytest.mark.parametrize("text", [*HOSTILE, "|", "\\|", "\\\\|", "\\\\\\|"])
def test_no_text_leaves_its_cell(text: str) -> None:
    (row,) = format_table(("a", "b"), [(format_code(text), 1)]).splitlines()[2:]
    assert len(split_cells(row)) == 2
    assert split_cells(row)[1] == " 1 "


def test_bars_in_cells_are_escaped() -> None:
    assert format_table(("a", "b"), [("x|y", 1)]).splitlines()[-1] == r"| x\|y | 1 |"


@pytest.mark.parametrize("text", HOSTILE)
def test_front_matter_gives_back_every_text(text: str) -> None:
    matter = format_front_matter({"license": "other", "name": text, "tags": [text, "b"]})
    lines = matter.splitlines()
    assert lines[0] == lines[-1] == "---"
    assert len(lines) == 5
    found = yaml.safe_load("\n".join(lines[1:-1]))
    assert found == {"license": "other", "name": text, "tags": [text, "b"]}


def test_settings_are_json() -> None:
    assert format_settings({"a": None}).splitlines()[-1] == "| `a` | `null` |"
