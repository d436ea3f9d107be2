"""Weights that are not finite, and numbers that no network of the weights has, are named."""

from typing import Any

import pytest
import torch

from firstlight.pipeline.stages.artifacts.weight_checks import check_finite_weights, check_spec_numbers


def test_tensor_that_is_not_finite_is_named() -> None:
    weights = {"a": torch.ones(3), "steps": torch.tensor(2), "b": torch.tensor([1.0, torch.inf])}
    with pytest.raises(ValueError, match=r"^b has numbers that are not finite$"):
        check_finite_weights(weights)
    check_finite_weights({name: weights[name] for name in ("a", "steps")})


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"width": 1025}, "spec.width is 1025, and no size of the weights is larger than 1024"),
        ({"norm": {"groups": [8, -5000]}}, "spec.norm.groups.1 is -5000, and no size"),
    ],
)
def test_number_that_no_size_reaches_is_named_by_its_key(spec: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=rf"^{told}"):
        check_spec_numbers(spec, {"a": torch.ones(3)})
    check_spec_numbers(spec, {"a": torch.ones(2, 5000)})


def test_small_numbers_are_not_compared_with_the_weights() -> None:
    spec, weights = {"width": 1024, "name": "convnet", "lr": 1e9, "sizes": [3, None]}, {"a": torch.ones(3)}
    check_spec_numbers(spec, weights)
    with pytest.raises(ValueError, match=r"^spec\.sizes\.0 is 1025, and no size"):
        check_spec_numbers({**spec, "sizes": [1025, None]}, weights)
