"""Views are those of the data set, with the papers' ops where it lacks them."""

from typing import Any

from firstlight.tasks.joint_embedding.pair_ops import BYOL_BLUR, BYOL_SOLARIZE, compose_pair_ops

CROP, FLIP = {"op": "random_resized_crop", "scale": [0.3, 1.0]}, {"op": "horizontal_flip"}
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
COLORS = [{"op": "color_jitter", **JITTER, "p": 0.8}, {"op": "random_grayscale", "p": 0.2}]


def compose(size: int, *ops: dict[str, Any], blur: tuple[float, float] = BYOL_BLUR) -> list[list[Any]]:
    return [list(view) for view in compose_pair_ops(ops, size, JITTER, blur, BYOL_SOLARIZE)]


def test_small_images_have_equal_views_without_blur() -> None:
    first, second = compose(63, CROP, FLIP)
    assert first == second == [CROP, FLIP, *COLORS]


def test_larger_images_have_the_blur_and_solarisation_of_each_view() -> None:
    first, second = compose(64, CROP, FLIP)
    assert first == [CROP, FLIP, *COLORS, {"op": "gaussian_blur", "p": 1.0}]
    assert second == [CROP, FLIP, *COLORS, {"op": "gaussian_blur", "p": 0.1}, {"op": "solarize", "p": 0.2}]


def test_ops_of_the_data_set_are_kept_as_they_are() -> None:
    given = [CROP, {"op": "random_grayscale", "p": 0.7}, {"op": "gaussian_blur", "p": 0.3}]
    first, second = compose(64, *given)
    assert first == [*given, COLORS[0]]
    assert second == [*given, COLORS[0], {"op": "solarize", "p": 0.2}]
