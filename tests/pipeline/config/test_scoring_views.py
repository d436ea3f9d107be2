"""The views that a task is scored by: crops in shares or pixels, and windows that cover an image."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from firstlight.pipeline.config.scoring_views import ScoringViews


@pytest.mark.parametrize(
    ("given", "scale", "size"), [({}, None, None), ({"test_scale": 0.5}, 0.5, None), ({"test_size": 89}, None, 89)]
)
def test_corner_crops_have_the_side_that_is_given(given: dict[str, Any], scale: float | None, size: int | None) -> None:
    crops = ScoringViews(**given).build_corner_crops()
    assert len(crops) == 10
    assert {(crop[0].scale, crop[0].size) for crop in crops} == {(scale, size)}


def test_windows_cover_the_image_that_takes_most() -> None:
    views = ScoringViews(scored_pixels="image", test_scale=225 / 256)
    windows = views.build_covering_windows(np.array([[256, 256], [500, 375], [500, 120]]))
    assert [ops[0].index for ops in windows] == list(range(10)), "five in a row, in two rows"
    assert {(ops[0].op, ops[0].scale) for ops in windows} == {("window_crop", 225 / 256)}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"test_scale": 0.5, "test_size": 89}, "test_scale: 0.5 and test_size: 89 are both given; valid: one of them"),
        ({"test_crop": "random"}, "test_crop: 'random' is not valid with test_crops: 1"),
        ({"test_size": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_views_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ScoringViews(**given)
