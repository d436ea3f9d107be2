"""Markdown with texts from outside: code that no text can leave, tables, and quoted values of a front matter."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from firstlight.pipeline.terminal import escape_line


def format_code(text: str) -> str:
    """Returns a text as code on one line. The text cannot end it: its fence is longer than any backticks in the text.

    Marks of Markdown and HTML have no meaning in it.
    """
    line = escape_line(text.strip()) or " "
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def format_settings(values: Mapping[str, Any]) -> str:
    """Returns a table of keys and values, as JSON."""
    lines = [(format_code(key), format_code(json.dumps(value))) for key, value in values.items()]
    return format_table(("setting", "value"), lines)


def format_table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Returns a table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(map(_format_cell, row)) + " |" for row in rows)


def _format_cell(cell: object) -> str:
    """Returns the text of a cell, which no bar can end: it has a backslash, and that one has no other before it."""
    return re.sub(r"\\*\|", lambda match: f"{match[0][:-1]}{' ' * (len(match[0]) % 2 == 0)}\\|", str(cell))


def format_front_matter(fields: Mapping[str, Any]) -> str:
    """Returns fields as the front matter of a card: YAML, with every text quoted."""
    return "\n".join(["---", *(f"{key}: {_quote_for_yaml(value)}" for key, value in fields.items()), "---"])


def _quote_for_yaml(value: Any) -> str:
    """Returns a value as JSON that is YAML as well: all other characters than those of ASCII are escapes of YAML."""
    return re.sub(r"[^ -~]", _escape_for_yaml, json.dumps(value, ensure_ascii=False))


def _escape_for_yaml(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"
