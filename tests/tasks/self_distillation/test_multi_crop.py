"""Views that are made of a data set's augmentations."""

import pytest

from firstlight.pipeline.stages.pretraining.views import parse_augment
from firstlight.tasks.self_distillation.multi_crop import choose_local_side, compose_crop_ops

FLIPPED = ({"op": "random_resized_crop", "scale": [0.3, 1.0], "ratio": [0.9, 1.1]}, {"op": "horizontal_flip"})
SHIFTED = ({"op": "random_shift", "padding": 2}, {"op": "random_affine", "degrees": 15.0})


@pytest.mark.parametrize(
    ("image_size", "side"), [(224, 96), (128, 48), (96, 48), (64, 32), (48, 16), (32, 16), (28, 12), (16, 8), (8, 4)]
)
def test_small_crops_have_a_side_that_patches_divide(image_size: int, side: int) -> None:
    assert choose_local_side(image_size) == side


def names(ops: object) -> list[str]:
    return [op["op"] for op in ops]  # type: ignore[attr-defined]


def test_views_of_large_images_are_those_of_the_authors_code() -> None:
    first, second, small = compose_crop_ops(FLIPPED, 224)
    common = ["random_resized_crop", "horizontal_flip", "color_jitter", "random_grayscale", "gaussian_blur"]
    assert (names(first), names(second), names(small)) == (common, [*common, "solarize"], common)
    assert [ops[0]["scale"] for ops in (first, second, small)] == [(0.4, 1.0), (0.4, 1.0), (0.05, 0.4)]
    assert [ops[4]["p"] for ops in (first, second, small)] == [1.0, 0.1, 0.5]
    assert all(ops[0]["ratio"] == [0.9, 1.1] for ops in (first, second, small))
    assert second[5]["p"] == 0.2


def test_small_images_are_not_blurred_and_their_small_crops_are_larger() -> None:
    first, second, small = compose_crop_ops(FLIPPED, 32)
    assert not any("gaussian_blur" in names(ops) for ops in (first, second, small))
    assert names(second)[-1] == "solarize"
    assert small[0]["scale"] == (0.2, 0.4)


def test_ops_of_the_data_set_stay_and_are_not_added_twice() -> None:
    own = {"op": "color_jitter", "brightness": 0.1}
    for ops in compose_crop_ops((*SHIFTED, own), 64):
        assert names(ops)[:3] == ["random_resized_crop", "random_affine", "color_jitter"]
        assert names(ops).count("color_jitter") == 1
        assert ops[2] is own
        assert "padding" not in ops[0]


@pytest.mark.parametrize("augment", [FLIPPED, SHIFTED])
@pytest.mark.parametrize("image_size", [8, 32, 64, 224])
def test_views_are_valid_augmentations(augment: object, image_size: int) -> None:
    for ops in compose_crop_ops(augment, image_size):  # type: ignore[arg-type]
        assert len(parse_augment(ops)) == len(ops)
