"""Types of parameters as JSON values, so that the parameters of a class are known without importing it.

The types are those that keys of recipes have: numbers, texts, choices, lists, mappings from texts, and their bounds.
"""

from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

# The types by the names that stand for them in JSON.
PLAIN_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "null": NoneType, "any": Any}
BOUND_TYPES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "gt": (Gt, "gt"),
    "ge": (Ge, "ge"),
    "lt": (Lt, "lt"),
    "le": (Le, "le"),
    "min_length": (MinLen, "min_length"),
    "max_length": (MaxLen, "max_length"),
}


def encode_type(hint: Any, named: Mapping[Any, str]) -> Any:
    """Returns a type as a JSON value. `named`: further types by the names that stand for them.

    Raises:
        TypeError: a key of a recipe cannot have this type.
    """
    for name, plain in PLAIN_TYPES.items():
        if hint is plain or (hint is None and plain is NoneType):
            return name
    for other, name in named.items():
        if hint is other:
            return name
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"choices": list(arguments)}
    if origin in (Union, UnionType):
        return {"union": [encode_type(member, named) for member in arguments]}
    if origin is tuple and arguments[-1] is ...:
        return {"list": encode_type(arguments[0], named)}
    if origin is tuple:
        return {"items": [encode_type(item, named) for item in arguments]}
    if origin is dict and arguments[0] is str:
        return {"by_name": encode_type(arguments[1], named)}
    if origin is Annotated:
        return {"bounded": encode_type(arguments[0], named), "bounds": dict(map(_encode_bound, arguments[1:]))}
    raise TypeError(f"the type {hint!r} cannot be that of a key of a recipe")


def _encode_bound(bound: Any) -> tuple[str, Any]:
    for key, (kind, attribute) in BOUND_TYPES.items():
        if isinstance(bound, kind):  # type: ignore[arg-type]
            return key, getattr(bound, attribute)
    raise TypeError(f"{bound!r} cannot be the bound of a key of a recipe")


def decode_type(value: Any, named: Mapping[str, Any]) -> Any:
    """Returns the type that `encode_type` has written. `named`: the types that names stand for."""
    if isinstance(value, str):
        return PLAIN_TYPES[value] if value in PLAIN_TYPES else named[value]
    ((form, content), *rest) = value.items()
    if form == "choices":
        return Literal[tuple(content)]
    if form == "union":
        return Union[tuple(decode_type(member, named) for member in content)]  # noqa: UP007
    if form == "list":
        return tuple[decode_type(content, named), ...]  # type: ignore[misc]
    if form == "items":
        return tuple[tuple(decode_type(item, named) for item in content)]  # type: ignore[misc]
    if form == "by_name":
        return dict[str, decode_type(content, named)]  # type: ignore[misc]
    ((_, bounds),) = rest
    hint = decode_type(content, named)
    for key, bound in bounds.items():
        hint = Annotated[hint, BOUND_TYPES[key][0](bound)]
    return hint


def decode_default(value: Any) -> Any:
    """Returns a default that was read from JSON, with tuples, as recipes have them, for its lists."""
    return tuple(map(decode_default, value)) if isinstance(value, list) else value
