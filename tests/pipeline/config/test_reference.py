"""Markdown tables of the keys of a section."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from annotated_types import Ge, Gt, Lt
from pydantic import BaseModel, Field

from firstlight.pipeline.config.reference import (
    escape_markdown,
    format_parameters,
    format_type,
    own_keys,
    render_keys,
)
from tests.support.undescribed_keys import list_missing_meanings


class Inner(BaseModel):
    x: int = 0


class Base(BaseModel):
    kind: Literal["a"]
    low: float = Field(0.5, ge=0.0, lt=1.0, description="The low | end, < 1.")


class Sample(Base):
    names: tuple[str, ...] = ("b", "c")
    inner: Inner = Inner()
    path: Path | None = None
    lr: float = Field(gt=0.0)


def test_table_has_a_row_of_type_default_and_meaning_for_each_key() -> None:
    assert render_keys(Sample, skip=("path",)).splitlines() == [
        "| Key | Type and range | Default | Meaning |",
        "| --- | --- | --- | --- |",
        "| `kind` | `a` | the stage's name |  |",
        "| `low` | number ≥ 0 and &lt; 1 | `0.5` | The low \\| end, &lt; 1. |",
        "| `names` | list of texts | `[b, c]` |  |",
        "| `inner` | section | the defaults of its keys |  |",
        "| `lr` | number > 0 | required |  |",
    ]
    assert render_keys(Sample, skip=Sample.model_fields) == "No keys of its own."


def test_keys_without_meaning_are_listed() -> None:
    assert list_missing_meanings(Base) == ["kind"]


def test_own_keys_are_not_those_of_the_base() -> None:
    assert own_keys(Sample) == ["names", "inner", "path", "lr"]


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (bool, "`true` or `false`"),
        (int | None, "whole number or `null`"),
        (Literal["a", "b", "c"], "`a`, `b` or `c`"),
        (tuple[Literal["a", "b"], ...], "list of values among `a`, `b`"),
        (tuple[Annotated[int, Ge(1)], ...], "list of whole numbers ≥ 1"),
        (tuple[float, float], "list of 2 numbers"),
        (Annotated[tuple[Annotated[float, Gt(0), Lt(2)], ...], Field(min_length=1)], "list of numbers > 0 and < 2"),
        (dict[str, tuple[str, ...]], "lists of texts by name"),
        (dict[str, Inner], "sections by name"),
        (dict[str, Any], "any values by name"),
        (tuple[Inner | Sample, ...], "list of sections"),
        (Literal["all"] | Annotated[int, Ge(1)], "`all` or whole number ≥ 1"),
    ],
)
def test_type_in_words(annotation: Any, text: str) -> None:
    assert format_type(annotation) == text


def test_less_than_is_escaped_outside_code() -> None:
    assert escape_markdown("<a> `<b>` < 1") == "&lt;a> `<b>` &lt; 1"


def test_parameters_of_a_torch_class() -> None:
    found = format_parameters(torch.optim.lr_scheduler.CosineAnnealingLR, ("optimizer", "last_epoch"), {"T_max": "all"})
    assert found == "`T_max`: all, `eta_min = 0.0`"
