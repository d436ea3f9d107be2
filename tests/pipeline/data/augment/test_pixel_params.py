"""Changes of levels against torchvision's, on noise and on images of few levels, and the blur against its formula."""

import itertools

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional

from firstlight.pipeline.data.augment.op_params import OpParams
from firstlight.pipeline.data.augment.pixel_params import (
    BLUR_WEIGHT_SUM,
    NO_THRESHOLD,
    NOISE,
    AutoContrast,
    Blur,
    Equalize,
    Erase,
    Posterize,
    Sharpness,
    Solarize,
    blur_weights,
    reflect_indices,
)
from tests.support.noise_images import make_extremes

SIDES = (8, 32, 45, 96)
IMAGES = [Image.fromarray(pixels) for side in SIDES for pixels in make_extremes(side)]


def apply(params: OpParams, image: Image.Image) -> np.ndarray:
    return np.asarray(params.apply_to(image, image.width)).astype(int)


@pytest.mark.parametrize(
    ("params", "name", "arguments"),
    [
        *[(Solarize(level), "solarize", (level,)) for level in (0.0, 1.0, 127.5, 128.0, 255.0)],
        *[(Posterize(bits), "posterize", (bits,)) for bits in range(1, 9)],
        *[(Sharpness(factor), "adjust_sharpness", (factor,)) for factor in (0.0, 0.3, 1.0, 1.9, 5.0)],
        (Equalize(1.0), "equalize", ()),
        (AutoContrast(1.0), "autocontrast", ()),
    ],
)
def test_changes_of_levels_are_torchvisions(params: OpParams, name: str, arguments: tuple[float, ...]) -> None:
    changed = 0
    for image in IMAGES:
        found = apply(params, image)
        assert np.array_equal(found, np.asarray(getattr(functional, name)(image, *arguments)))
        changed += not np.array_equal(found, np.asarray(image))
    assert changed or params in (Posterize(8), Sharpness(1.0))


@pytest.mark.parametrize(
    "params",
    [
        Solarize(NO_THRESHOLD),
        Posterize(8),
        Equalize(0),
        AutoContrast(0),
        Sharpness(1),
        Blur(0, 3),
        Erase(2, 5, 2, 9, 7, 0),
    ],
)
def test_neutral_parameters_change_nothing(params: OpParams) -> None:
    for image in IMAGES:
        assert np.array_equal(apply(params, image), np.asarray(image))


@pytest.mark.parametrize(("sigma", "radius"), [(0.1, 1), (0.7, 1), (2.0, 1), (0.5, 4), (1.3, 4), (2.0, 4), (9.0, 7)])
def test_blur_is_torchvisions_to_one_level(sigma: float, radius: int) -> None:
    for image in IMAGES:
        expected = np.asarray(functional.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)).astype(int)
        assert np.abs(apply(Blur(sigma, radius), image) - expected).max() <= 1


@pytest.mark.parametrize(("sigma", "radius"), [(0.3, 1), (2.0, 1), (1.1, 11), (2.0, 11), (4.0, 31)])
def test_blur_is_its_formula_rounded(sigma: float, radius: int) -> None:
    """Written naively in float64. Weights of 14 bits and quarters of levels between the passes cost less than 0.2."""
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    for pixels in make_extremes(40):
        padded = np.pad(pixels.astype(float), ((radius, radius), (radius, radius), (0, 0)), "reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape, (0, 1))
        expected = np.einsum("hwcyx,yx->hwc", windows, kernel)
        assert np.abs(apply(Blur(sigma, radius), Image.fromarray(pixels)) - expected).max() < 0.7


def test_image_of_one_level_is_not_changed_by_a_blur() -> None:
    for level, sigma, radius in itertools.product((0, 1, 128, 254, 255), (0.01, 0.5, 3.0, 100.0), (1, 5, 31)):
        image = Image.new("RGB", (9, 9), (level, level, level))
        assert np.array_equal(apply(Blur(sigma, radius), image), np.asarray(image))


def test_weights_of_a_blur_have_one_sum_and_decrease() -> None:
    for radius in (1, 4, 31):
        weights = blur_weights(np.array([0.01, 0.1, 0.6, 2.0, 100.0]), radius)
        assert weights.dtype == np.float32
        assert (weights[:, 0] + 2 * weights[:, 1:].sum(1) == BLUR_WEIGHT_SUM).all()
        assert (weights >= 0).all()
        assert (np.diff(weights[:4, 1:]) <= 0).all()
        assert weights[0, 0] == BLUR_WEIGHT_SUM


@pytest.mark.parametrize(("side", "radius"), [(1, 3), (2, 5), (3, 1), (8, 31), (32, 3)])
def test_reflected_pixels_are_those_of_numpy(side: int, radius: int) -> None:
    assert np.array_equal(reflect_indices(side, radius), np.pad(np.arange(side), radius, "reflect"))


def test_erased_box_has_one_level_and_the_rest_stays() -> None:
    image = Image.fromarray(make_extremes(20)[-1])
    found, expected = apply(Erase(3, 5, 10, 20, 127, 0), image), np.array(image).astype(int)
    expected[5:20, 3:10] = 127
    assert np.array_equal(found, expected)


def test_noise_is_a_function_of_its_key_and_uniform() -> None:
    image = Image.new("RGB", (64, 64))
    first, again, other = (apply(Erase(0, 0, 64, 64, NOISE, key), image) for key in (5.0, 5.0, 2.0**53 - 1))
    assert np.array_equal(first, again)
    assert (first != other).mean() > 0.98
    counts = np.bincount(first.ravel(), minlength=256)
    assert counts.min() > 20
    assert abs(first.mean() - 127.5) < 4
    assert np.abs(np.corrcoef(first.reshape(-1, 3).T)[np.triu_indices(3, 1)]).max() < 0.06
    part = apply(Erase(10, 20, 30, 40, NOISE, 5.0), image)
    assert np.array_equal(part[20:40, 10:30], first[20:40, 10:30])
    assert part.sum() == part[20:40, 10:30].sum()
