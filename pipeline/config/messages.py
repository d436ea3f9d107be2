"""Describes a mistake in a recipe in one line: the dotted key as the user wrote it, the value, and what is valid."""

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from firstlight.pipeline.config.yaml_reader import HALF_PAIR, LARGEST_INTEGER
from firstlight.pipeline.errors import suggest_valid

# The placeholder in the message of a section's check that stands for the section's dotted key.
SECTION_KEY = "{section}"


# Lines of one error message.
MAX_MISTAKES = 20


def explain_errors(error: ValidationError, raw: Any, model: type[BaseModel]) -> str:
    """Returns a line for every mistake that pydantic found when it validated `raw` as a `model`, up to MAX_MISTAKES."""
    found = error.errors()
    mistakes = [one for one in found if not _is_consequence(one, found)]
    lines = [_explain_error(one, raw, model) for one in mistakes[:MAX_MISTAKES]]
    more = len(mistakes) - len(lines)
    return "\n".join([*lines, *([f"and {more:,} more mistakes"] if more else [])])


def explain_invalid_values(raw: Any, key: str = "") -> Iterator[str]:
    """Yields a line for every integer in a config that has more than 64 bits, and every text that is not Unicode."""
    if isinstance(raw, dict | list | tuple):
        for name, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
            yield from explain_invalid_values(name)
            yield from explain_invalid_values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(raw, int) and abs(raw) > LARGEST_INTEGER:
        shown = raw if abs(raw) < 10**30 else "an integer of more than 30 digits"
        yield f"{key}: {shown} is not valid: integers are at most {LARGEST_INTEGER}"
    elif isinstance(raw, str) and HALF_PAIR.search(raw):
        yield f"{key}: {raw!a} is not valid: it has half of a surrogate pair, which is no character"


def _is_consequence(error: Any, found: list[Any]) -> bool:
    """Returns True for an error that a list is too short only because its elements have errors."""
    inside = (other["loc"][: len(error["loc"])] == error["loc"] for other in found if other is not error)
    return error["type"] == "too_short" and any(inside)


def _explain_error(error: Any, raw: Any, model: type[BaseModel]) -> str:
    """Returns one pydantic error as one line: dotted key, value, what is valid."""
    key = _format_key(error["loc"], raw, whole=error["type"] == "value_error")
    last, kind, context = str(error["loc"][-1]) if error["loc"] else "", error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {suggest_valid(last, _list_valid_keys(error['loc'], model))}"
    if kind == "missing":
        return f"{key}: is missing and has no default"
    if kind == "union_tag_invalid":
        tag, valid = context["discriminator"].strip("'"), context["expected_tags"].replace("'", "").split(", ")
        return f"{key}.{tag}: {context['tag']!r} is unknown; {suggest_valid(context['tag'], valid)}"
    if kind == "union_tag_not_found":
        tag = context["discriminator"].strip("'")
        return f"{key}.{tag}: is missing and has no default"
    message = (
        str(context["error"]).replace(SECTION_KEY, key)
        if kind == "value_error"
        else error["msg"].replace("Input should", "must").replace("Tuple should", "must")
    )
    # A check of a whole section names the wrong key in its message, or writes the whole dotted key itself.
    if kind == "value_error" and isinstance(error["input"], dict):
        return f"{key}: {message}" if key and not message.startswith(f"{key}.") else message
    value = json.dumps(error["input"], default=str)
    return f"{key}: {value if len(value) < 80 else value[:77] + '...'} is not valid: {message}"


def _format_key(loc: tuple[Any, ...], raw: Any, whole: bool) -> str:
    """Returns the dotted key as the user wrote it, without the tags of unions that pydantic inserts into `loc`.

    `whole`: the key exists in `raw`, so that also the last part of `loc` can be a tag.
    """
    parts: list[str] = []
    for depth, part in enumerate(loc):
        here = raw[part] if isinstance(raw, list) and isinstance(part, int) and part < len(raw) else None
        if isinstance(raw, dict) and part in raw:
            here = raw[part]
        elif here is None and (whole or depth < len(loc) - 1):
            continue
        parts.append(str(part))
        if depth < len(loc) - 1:
            raw = here
    return ".".join(parts)


def _list_valid_keys(loc: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    """Returns the valid keys of the section that contains the last part of `loc`."""
    here: Any = model
    for part in loc[:-1]:
        here = _child_annotation(here, part)
    return list(getattr(_unwrap_annotation(here), "model_fields", {}))


def _unwrap_annotation(annotation: Any) -> Any:
    """Returns the type inside `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _unwrap_annotation(get_args(annotation)[0])
    members = [a for a in get_args(annotation) if a is not NoneType]
    return (
        _unwrap_annotation(members[0])
        if get_origin(annotation) in (Union, UnionType) and len(members) == 1
        else annotation
    )


def _child_annotation(annotation: Any, part: Any) -> Any:
    """Returns the type of what `part` selects: a field, an element, or the member of a union with this tag."""
    here = _unwrap_annotation(annotation)
    if isinstance(here, type) and issubclass(here, BaseModel):
        return here.model_fields[part].annotation
    if get_origin(here) in (dict, tuple):
        return get_args(here)[get_origin(here) is dict]
    return next(
        member
        for member in get_args(here)
        for field in member.model_fields.values()
        if get_origin(field.annotation) is Literal and part in get_args(field.annotation)
    )
