"""Policies: each op of a pool is torchvision's or the paper's, and ops, signs and magnitudes have their frequencies."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chisquare, kstest
from torchvision.transforms import InterpolationMode, v2

from firstlight.pipeline.data.augment.op_params import NO_OP, POLICY_KINDS, POLICY_STEP_WIDTH, Policy
from firstlight.pipeline.data.augment.ops import sample_params
from firstlight.pipeline.data.augment.policies import MAX_POLICY_OPS, POLICY_POOLS, WIDE_POOL, PolicyOp
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from tests.support.noise_images import make_extremes

SIDES = (8, 45)
# Few levels, ramps and noise.
IMAGES = [Image.fromarray(pixels) for side in SIDES for pixels in make_extremes(side)[4:]]
WIDE, STANDARD = v2.TrivialAugmentWide(), v2.RandAugment()


def apply_op(op: PolicyOp, magnitude: float, sign: float, image: Image.Image) -> np.ndarray:
    batch = op.build_batch(np.array([magnitude]), np.array([sign]), image.width)
    return np.asarray(batch.params_per_image()[0].apply_to(image, image.width) if batch else image)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("transform", "pool"), [(STANDARD, POLICY_POOLS["torchvision"]), (WIDE, WIDE_POOL)])
@pytest.mark.parametrize("place", range(14))
def test_ops_are_torchvisions(transform: Any, pool: tuple[PolicyOp, ...], place: int, sign: float) -> None:
    """With bilinear interpolation and exact magnitudes (theirs are float32, which moves a whole pixel by 0.999999).

    They compute the matrices of rotations and shears by other trigonometry: rounding may differ, and for shears also
    whether a point on the edge of the image is inside.
    """
    assert len(pool) == len(transform._AUGMENTATION_SPACE) == 14
    name, (magnitudes_fn, is_signed) = list(transform._AUGMENTATION_SPACE.items())[place]
    assert pool[place].is_signed is is_signed
    changed = 0
    for bin_number in range(0, 31, 5):
        for image in IMAGES:
            magnitudes, magnitude = magnitudes_fn(31, image.height, image.width), 0.0
            if magnitudes is not None and not magnitudes.is_floating_point():
                magnitude = float(magnitudes[bin_number])
            elif magnitudes is not None:
                first, last = (round(float(end), 4) for end in magnitudes[[0, -1]])
                magnitude = (first + (last - first) * bin_number / 30) * (sign if is_signed else 1.0)
            # Theirs may be 238.0000001, which is 239.
            bound = {"Solarize": round(255 * magnitude, 6) / 255}.get(name, magnitude)
            expected = transform._apply_image_or_video_transform(image, name, bound, InterpolationMode.BILINEAR, {})
            found = apply_op(pool[place], bin_number / 30, sign, image)
            difference = np.abs(found.astype(int) - np.asarray(expected))
            if name == "Rotate":
                assert difference.max() <= 1
            else:
                assert (difference > 1).mean() <= (0.002 if name.startswith("Shear") else 0.0)
                assert (difference > 0).mean() <= (0.06 if name.startswith("Shear") else 0.0)
            changed += bool((found != np.asarray(image)).any())
    assert (changed == 0) == (name == "Identity")


def move_by(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


# FixMatch's Table 12: the op for a value in its range, its lowest and its highest value.
FIXMATCH: list[tuple[Callable[[Image.Image, float], Image.Image], float, float]] = [
    (lambda image, _: ImageOps.autocontrast(image), 0, 0),
    (lambda image, value: ImageEnhance.Brightness(image).enhance(value), 0.05, 0.95),
    (lambda image, value: ImageEnhance.Color(image).enhance(value), 0.05, 0.95),
    (lambda image, value: ImageEnhance.Contrast(image).enhance(value), 0.05, 0.95),
    (lambda image, _: ImageOps.equalize(image), 0, 0),
    (lambda image, _: image, 0, 0),
    (lambda image, value: ImageOps.posterize(image, int(value)), 4, 8),
    (lambda image, value: image.rotate(value, Image.Resampling.BILINEAR), 0, 30),
    (lambda image, value: ImageEnhance.Sharpness(image).enhance(value), 0.05, 0.95),
    (lambda image, value: move_by(image, 1, value, 0, 0, 1, 0), 0, 0.3),
    (lambda image, value: move_by(image, 1, 0, 0, value, 1, 0), 0, 0.3),
    (lambda image, value: ImageOps.solarize(image, int(np.ceil(256 * (1 - value)))), 0, 1),
    (lambda image, value: move_by(image, 1, 0, -int(value * image.width), 0, 1, 0), 0, 0.3),
    (lambda image, value: move_by(image, 1, 0, 0, 0, 1, -int(value * image.width)), 0, 0.3),
]


@pytest.mark.parametrize("place", range(14))
def test_ops_of_fixmatch_are_those_of_its_table(place: int) -> None:
    change, low, high = FIXMATCH[place]
    op = POLICY_POOLS["fixmatch"][place]
    for magnitude in (0.0, 0.25, 0.4, 1.0):
        for image in IMAGES:
            for sign in (1.0, -1.0) if op.is_signed else (1.0,):
                expected = np.asarray(change(image, sign * (low + (high - low) * magnitude)))
                difference = np.abs(apply_op(op, magnitude, sign, image).astype(int) - expected)
                assert difference.max() <= 1
                assert (difference > 0).mean() <= (0.02 if place == 7 else 0.0)


def draw_policies(name: str, count: int = 20_000, side: int = 32, **parameters: Any) -> np.ndarray:
    ids = np.arange(count)
    keys = derive_view_keys(0, ids * 0, ids, 0)
    (batch,) = sample_params([{"op": name, **parameters}], keys, np.full((count, 2), 40), side)
    assert batch.kind is Policy
    return batch.rows


def test_ops_are_equally_frequent_and_independent() -> None:
    """Seen by the kinds of their parameters, of two ops."""
    rows = draw_policies("rand_augment")
    assert rows.shape[1] == 2 * POLICY_STEP_WIDTH
    expected = np.zeros(len(POLICY_KINDS) + 1)
    for op in POLICY_POOLS["torchvision"]:
        batch = op.build_batch(np.ones(1), np.ones(1), 32)
        expected[NO_OP if batch is None else POLICY_KINDS.index(batch.kind)] += 1 / 14
    found = np.zeros((len(expected),) * 2)
    np.add.at(found, (rows[:, 0].astype(int), rows[:, POLICY_STEP_WIDTH].astype(int)), 1)
    assert chisquare(found.ravel(), np.outer(expected, expected).ravel() * len(rows)).pvalue > 1e-3


def find_rotations(rows: np.ndarray) -> np.ndarray:
    """Returns the degrees of the rotations among the first ops; the other affine maps have a = 1."""
    turned = rows[(rows[:, 0] == 0) & (rows[:, 1] != 1.0)]
    return np.degrees(np.arctan2(-turned[:, 2], turned[:, 1]))


def test_fixed_magnitudes_are_one_and_both_signs_are_equally_frequent() -> None:
    degrees = find_rotations(draw_policies("rand_augment", magnitude=10, num_magnitude_bins=31))
    assert set(np.round(degrees, 9)) == {10.0, -10.0}
    assert 0.45 < (degrees > 0).mean() < 0.55
    assert set(np.round(find_rotations(draw_policies("rand_augment", magnitude=4, num_magnitude_bins=5)), 9)) == {
        30,
        -30,
    }


def test_random_magnitudes_are_uniform_and_each_op_is_applied_half_of_the_time() -> None:
    rows = draw_policies("rand_augment", magnitudes="random", pool="fixmatch")
    assert kstest(find_rotations(rows), "uniform", (-30, 60)).pvalue > 1e-3
    assert (rows[:, 0] == NO_OP).mean() == pytest.approx(0.5 + 0.5 / 14, abs=0.015)
    assert (rows[:, POLICY_STEP_WIDTH] == NO_OP).mean() == pytest.approx(0.5 + 0.5 / 14, abs=0.015)


@pytest.mark.parametrize(("chosen", "p"), [({}, 1.0), ({"p": 0.2}, 0.2), ({"p": 1.0, "magnitudes": "random"}, 1.0)])
def test_share_of_applied_ops_is_p(chosen: dict[str, Any], p: float) -> None:
    applied = draw_policies("rand_augment", **chosen)[:, 0] != NO_OP
    assert applied.mean() == pytest.approx(p * 13 / 14, abs=0.015)


def test_trivial_augment_has_one_op_of_a_random_strength() -> None:
    rows = draw_policies("trivial_augment")
    assert rows.shape[1] == POLICY_STEP_WIDTH
    degrees, counts = np.unique(np.round(np.abs(find_rotations(rows)), 9), return_counts=True)
    # A rotation by nothing is the identity, whose a is 1.
    assert np.allclose(degrees, 135 * np.arange(1, 31) / 30)
    assert chisquare(counts).pvalue > 1e-3


def test_most_ops_use_all_numbers_of_an_op_and_no_more() -> None:
    rows = draw_policies("rand_augment", 2000, num_ops=MAX_POLICY_OPS)
    assert rows.shape[1] == MAX_POLICY_OPS * POLICY_STEP_WIDTH
    assert 0.9 < (rows[:, -POLICY_STEP_WIDTH] != NO_OP).mean() < 0.96
    with pytest.raises(AssertionError):
        draw_policies("rand_augment", 2, num_ops=MAX_POLICY_OPS + 1)


def test_translations_are_shares_of_the_view() -> None:
    for side in (32, 224):
        rows = draw_policies("rand_augment", 5000, side, magnitude=30)
        moved = rows[(rows[:, 0] == 0) & (rows[:, 3] != 0) & (rows[:, 1] == 1.0)]
        assert set(np.abs(moved[:, 3])) == {float(int(150 / 331 * side))}
