"""The section `scale`: fixed and elastic numbers of workers."""

import pytest
from pydantic import ValidationError

from firstlight.pipeline.config.scale import ScaleOptions


@pytest.mark.parametrize(("workers", "bounds"), [("0", (0, 0)), ("3", (3, 3)), ("[1, 4]", (1, 4))])
def test_workers_are_a_number_or_bounds(workers: str, bounds: tuple[int, int]) -> None:
    scale = ScaleOptions.model_validate_json(f'{{"name": "x", "workers": {workers}}}')
    assert (scale.min_workers, scale.max_workers) == bounds
    assert ScaleOptions.model_validate_json(scale.model_dump_json()) == scale


@pytest.mark.parametrize(
    "workers", ["-1", "[0, 2]", "[2, 2]", "[3, 2]", "[1]", "[1, 2, 3]", "1.5", "true", '"two"', "[]"]
)
def test_other_workers_are_rejected(workers: str) -> None:
    with pytest.raises(ValidationError, match=r"\[min, max\]"):
        ScaleOptions.model_validate_json(f'{{"name": "x", "workers": {workers}}}')


@pytest.mark.parametrize("key", ["processes", "threads"])
@pytest.mark.parametrize("count", ["1", "8", '"auto"'])
def test_processes_and_threads_are_a_number_or_auto(key: str, count: str) -> None:
    scale = ScaleOptions.model_validate_json(f'{{"name": "x", "{key}": {count}}}')
    assert ScaleOptions.model_validate_json(scale.model_dump_json()) == scale


@pytest.mark.parametrize("key", ["processes", "threads"])
@pytest.mark.parametrize("count", ["0", "-1", "1.5", "true", '"two"', "null", "[1, 2]"])
def test_other_processes_and_threads_are_rejected(key: str, count: str) -> None:
    with pytest.raises(ValidationError, match=r"must be a whole number greater than or equal to 1, or auto"):
        ScaleOptions.model_validate_json(f'{{"name": "x", "{key}": {count}}}')
