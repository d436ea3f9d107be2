"""A mistake in a recipe as one line: the dotted key as the user wrote it, the value, and what would be valid."""

import json
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from firstlight.pipeline.errors import suggest_valid


def explain(error: ValidationError, raw: Any, model: type[BaseModel]) -> str:
    """A line for every mistake that pydantic found in `raw`, which should have been a `model`."""
    found = error.errors()
    return "\n".join(_explain(one, raw, model) for one in found if not _follows(one, found))


def _follows(error: Any, found: list[Any]) -> bool:
    """Whether it tells of a list only that its mistakes have left nothing of it."""
    inside = (other["loc"][: len(error["loc"])] == error["loc"] for other in found if other is not error)
    return error["type"] == "too_short" and any(inside)


def _explain(error: Any, raw: Any, model: type[BaseModel]) -> str:
    """One pydantic error as one line: dotted key, value, what is valid."""
    key = _dotted(error["loc"], raw, whole=error["type"] == "value_error")
    last, kind, context = str(error["loc"][-1]) if error["loc"] else "", error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {suggest_valid(last, _siblings(error['loc'], model))}"
    if kind == "missing":
        return f"{key}: is missing and has no default"
    if kind == "union_tag_invalid":
        tag = context["discriminator"].strip("'")
        return f"{key}.{tag}: {context['tag']!r} is unknown; {suggest_valid(context['tag'], context['expected_tags'].replace(chr(39), '').split(', '))}"
    if kind == "union_tag_not_found":
        return f"{key}.{context['discriminator'].strip(chr(39))}: is missing and has no default"
    message = (
        str(context["error"])
        if kind == "value_error"
        else error["msg"].replace("Input should", "must").replace("Tuple should", "must")
    )
    if kind == "value_error" and isinstance(
        error["input"], dict
    ):  # a check over a whole section: its text names the key
        return f"{key}: {message}" if key else message
    shown = json.dumps(error["input"], default=str)
    return f"{key}: {shown if len(shown) < 80 else shown[:77] + '...'} is not valid: {message}"


def _dotted(loc: tuple[Any, ...], raw: Any, whole: bool) -> str:
    """The key as the user wrote it: pydantic puts the tags of unions in between. `whole`: what it names is there, so a tag may end it, too."""
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


def _siblings(loc: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    """The keys that are valid beside the last part of `loc`, found by walking the models along it."""
    here: Any = model
    for part in loc[:-1]:
        here = _step(here, part)
    return list(getattr(_plain(here), "model_fields", {}))


def _plain(annotation: Any) -> Any:
    """Without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    members = [a for a in get_args(annotation) if a is not NoneType]
    return _plain(members[0]) if get_origin(annotation) in (Union, UnionType) and len(members) == 1 else annotation


def _step(annotation: Any, part: Any) -> Any:
    here = _plain(annotation)
    if isinstance(here, type) and issubclass(here, BaseModel):
        return here.model_fields[part].annotation
    if get_origin(here) in (dict, tuple):
        return get_args(here)[get_origin(here) is dict]
    tagged = (
        m
        for m in get_args(here)
        for f in m.model_fields.values()
        if get_origin(f.annotation) is Literal and part in get_args(f.annotation)
    )
    return next(tagged)
