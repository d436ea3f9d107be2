"""Types as JSON values: what is read back accepts and refuses the same values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NewType

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError

from firstlight.pipeline.config.schemas.parameter_types import decode_default, decode_type, encode_type

Network = NewType("Network", dict[str, Any])
NAMED = {Network: "network"}


@pytest.mark.parametrize(
    ("hint", "valid", "refused"),
    [
        (int, [1], [1.5, "1", None]),
        (float, [1.5], ["1"]),
        (bool, [True], [1]),
        (str, ["a"], [1]),
        (float | None, [None, 2.0], ["x"]),
        (Literal["a", 2], ["a", 2], ["b", 3]),
        (Literal["all"] | Annotated[int, Ge(1)], ["all", 3], [0, "none"]),
        (tuple[int, ...], [[], [1, 2]], [[1.5], 1]),
        (tuple[int, float], [[1, 2.0]], [[1], [1, 2.0, 3]]),
        (Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1), MaxLen(2)], [[1], [1, 2]], [[], [0], [1, 2, 3]]),
        (Annotated[float, Gt(0.0), Lt(1.0)], [0.5], [0.0, 1.0]),
        (Annotated[int, Ge(0), Le(30)], [0, 30], [-1, 31]),
        (dict[str, int], [{"a": 1}], [{"a": "x"}, {"a": None}]),
    ],
)
def test_type_that_is_read_back_accepts_and_refuses_the_same(hint: Any, valid: list[Any], refused: list[Any]) -> None:
    written = json.loads(json.dumps(encode_type(hint, NAMED)))
    for found in (hint, decode_type(written, {})):
        adapter = TypeAdapter(found, config=ConfigDict(strict=True))
        for value in valid:
            assert adapter.validate_json(json.dumps(value)) is not False
        for value in refused:
            with pytest.raises(ValidationError):
                adapter.validate_json(json.dumps(value))


def test_named_type_is_replaced() -> None:
    written = encode_type(Network | None, NAMED)
    assert written == {"union": ["network", "null"]}
    assert decode_type(written, {"network": int}) == int | None


@pytest.mark.parametrize("hint", [Path, Network, Callable[[], int], Annotated[int, "a note"], dict[int, int]])
def test_other_types_are_refused(hint: Any) -> None:
    with pytest.raises(TypeError, match="key of a recipe"):
        encode_type(hint, {})


def test_lists_of_defaults_are_tuples_again() -> None:
    default = (1, ("a", ()), None, 0.1)
    assert decode_default(json.loads(json.dumps(default))) == default
