"""Renders the sections of recipes as Markdown tables: every key with its type, range, default and meaning."""

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

HEADINGS = ("Key", "Type and range", "Default", "Meaning")
# (singular, plural)
TYPE_NAMES = {
    str: ("text", "texts"),
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    bool: ("`true` or `false`", "`true` or `false`"),
    Path: ("path", "paths"),
    Any: ("any value", "any values"),
    NoneType: ("`null`", "`null`"),
}
BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


def render_keys(model: type[BaseModel], skip: Iterable[str] = ()) -> str:
    """Returns a table of the fields of a model without those in `skip`."""
    left_out = set(skip)
    rows = [
        (
            f"`{name}`",
            format_type(field.annotation, field.metadata),
            format_default(name, field),
            field.description or "",
        )
        for name, field in model.model_fields.items()
        if name not in left_out
    ]
    return render_table(HEADINGS, rows) if rows else "No keys of its own."


def render_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [tuple(headings), ("---",) * len(headings), *rows]
    return "\n".join(
        f"| {' | '.join(escape_markdown(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def escape_markdown(text: str) -> str:
    """Returns Markdown in which < is a character and begins no HTML tag; code between backticks stays as it is."""
    parts = text.split("`")
    return "`".join(part if k % 2 else part.replace("<", "&lt;") for k, part in enumerate(parts))


def own_keys(model: type[BaseModel]) -> list[str]:
    """Returns the fields that a model itself declares, not its bases."""
    return [name for name in model.model_fields if name in inspect.get_annotations(model)]


def union_members(union: Any) -> tuple[type[BaseModel], ...]:
    """Returns the models of a tagged union."""
    return get_args(get_args(union)[0]) if get_origin(union) is Annotated else (union,)


def format_type(annotation: Any, metadata: Sequence[Any] = (), plural: bool = False) -> str:
    """Returns a type and its range in words, for example "list of numbers > 0"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return format_type(arguments[0], (*arguments[1:], *metadata), plural)
    if origin is Literal:
        choices = [f"`{_format_value(value)}`" for value in arguments]
        return f"values among {', '.join(choices)}" if plural else _join_choices(choices)
    if origin in (Union, UnionType):
        return _format_union(arguments, metadata, plural)
    if origin is tuple:
        return _format_list(arguments, metadata, plural)
    if origin is dict:
        return f"{format_type(arguments[1], plural=True)} by name"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "sections" if plural else "section"
    return TYPE_NAMES[annotation][plural] + _describe_range(metadata)


def format_default(name: str, field: FieldInfo) -> str:
    """Returns the default of a field as YAML; "required" if it has none."""
    if name == "kind":
        return "the stage's name"
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return "the defaults of its keys"
    return f"`{_format_value(field.default)}`"


def _format_union(members: Sequence[Any], metadata: Sequence[Any], plural: bool) -> str:
    texts = [format_type(member, metadata if member is not NoneType else (), plural) for member in members]
    return " or ".join(dict.fromkeys(texts))


def _format_list(arguments: Sequence[Any], metadata: Sequence[Any], plural: bool) -> str:
    if arguments[-1] is not ...:
        return f"list of {len(arguments)} {format_type(arguments[0], plural=True)}"
    least = max((item.min_length for item in metadata if isinstance(item, MinLen)), default=0)
    most = min((item.max_length for item in metadata if isinstance(item, MaxLen)), default=None)
    size = f" ({least} to {most} of them)" if most else " (at least one)" if least == 1 else ""
    return f"{'lists' if plural else 'list'} of {format_type(arguments[0], plural=True)}{size}"


def _describe_range(metadata: Iterable[Any]) -> str:
    """Returns the bounds of a number and the pattern of a text, each with a space before it."""
    found = list(metadata)
    bounds = [
        f"{sign} {getattr(item, attribute):g}"
        for kind, attribute, sign in BOUNDS
        for item in found
        if isinstance(item, kind)
    ]
    patterns = [pattern for item in found if (pattern := getattr(item, "pattern", None))]
    return f" {' and '.join(bounds)}" * bool(bounds) + "".join(f" that matches `{pattern}`" for pattern in patterns)


def _format_value(value: Any) -> str:
    """Returns a value as YAML on one line."""
    if isinstance(value, float):
        text = f"{value:.6g}"
        return text if re.search(r"[.e]", text) else f"{text}.0"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_format_value, value))}]"
    if isinstance(value, str | Path):
        return str(value) or '""'
    return json.dumps(value)


def _join_choices(choices: Sequence[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)


def format_parameters(function: Any, skip: Iterable[str] = (), filled: Mapping[str, str] | None = None) -> str:
    """Returns the parameters of a class or function of a library, with their defaults.

    `skip`: parameters that are left out. `filled`: texts for parameters that have another default in recipes.
    """
    left_out, texts = set(skip), []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in left_out:
            continue
        default = "" if parameter.default is parameter.empty else f" = {_format_value(parameter.default)}"
        texts.append(f"`{name}`: {filled[name]}" if filled and name in filled else f"`{name}{default}`")
    return ", ".join(texts)
