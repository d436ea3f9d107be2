from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.nn.input_normalization import GRAY_WEIGHTS, InputNormalization, SharedEncoderOptions


def ramp(slope_x: float, slope_y: float, size: int = 6) -> Tensor:
    """A (1, 3, size, size) gray image that rises by `slope_x` to the right and by `slope_y` downwards."""
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    return (slope_x * x + slope_y * y).expand(1, 3, size, size)


def naive_sobel(gray: list[list[float]], padding: str = "replicate") -> np.ndarray:
    """(2, h, w) gradients to the right and downwards, by a loop over pixels; outside is the nearest pixel or 0."""
    h, w = len(gray), len(gray[0])

    def pixel(i: int, j: int) -> float:
        if padding == "zeros" and not (0 <= i < h and 0 <= j < w):
            return 0.0
        return gray[min(max(i, 0), h - 1)][min(max(j, 0), w - 1)]

    out = np.zeros((2, h, w))
    for i in range(h):
        for j in range(w):
            for k, weight in ((-1, 1.0), (0, 2.0), (1, 1.0)):
                out[0, i, j] += weight * (pixel(i + k, j + 1) - pixel(i + k, j - 1))
                out[1, i, j] += weight * (pixel(i + 1, j + k) - pixel(i - 1, j + k))
    return out


def plain(kind: str, **options: Any) -> InputNormalization:
    """The input's filter without normalisation, in float64."""
    options |= {"input": kind, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return InputNormalization(**options).double()


@pytest.mark.parametrize(("slope_x", "slope_y"), [(0.1, 0.0), (0.0, 0.1), (0.03, -0.07)])
def test_sobel_of_a_ramp_is_constant_inside(slope_x: float, slope_y: float) -> None:
    image = ramp(slope_x, slope_y).double()
    found = plain("sobel")(image)[0]
    inside = found[:, 1:-1, 1:-1]
    scale = sum(GRAY_WEIGHTS["luma"])
    torch.testing.assert_close(inside[0], torch.full_like(inside[0], 8 * slope_x * scale), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(inside[1], torch.full_like(inside[1], 8 * slope_y * scale), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.numpy(), naive_sobel((image[0, 0] * scale).tolist()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("padding", ["replicate", "zeros"])
@pytest.mark.parametrize(("kind", "weights"), [("luma", (0.299, 0.587, 0.114)), ("mean", (1 / 3, 1 / 3, 1 / 3))])
def test_sobel_of_a_random_image_equals_the_loop(kind: str, weights: tuple[float, ...], padding: str) -> None:
    image = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gray = sum(weight * image[0, c] for c, weight in enumerate(weights))
    assert isinstance(gray, Tensor)
    found = plain("sobel", gray=kind, padding=padding)(image)[0]
    np.testing.assert_allclose(found.numpy(), naive_sobel(gray.tolist(), padding), atol=1e-6)
    torch.testing.assert_close(plain("gray", gray=kind, padding=padding)(image)[0, 0], gray, rtol=0, atol=1e-6)


def test_mean_and_zeros_are_the_filters_of_the_authors_code() -> None:
    """NAT's code takes one third of each gradient from every channel, by a convolution with padding 1.

    Super-AND's code takes the mean, then such a convolution.
    """
    image = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    dx = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    kernel = torch.stack((dx, dx.T))[:, None]
    found = plain("sobel", gray="mean", padding="zeros")(image)
    torch.testing.assert_close(found, F.conv2d(image, kernel.expand(2, 3, 3, 3) / 3, padding=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, F.conv2d(image.mean(1, keepdim=True), kernel, padding=1), rtol=0, atol=1e-6)


def test_zero_padding_is_0_of_the_normalised_image() -> None:
    constant = torch.full((1, 3, 6, 6), 0.7)
    black = InputNormalization(input="sobel", mean=(0.7, 0.7, 0.7), padding="zeros")(constant)
    assert black.abs().max() < 1e-5
    assert InputNormalization(input="sobel", mean=(0.2, 0.2, 0.2), padding="zeros")(constant)[:, :, 0].abs().max() > 1


def test_high_pass_sees_the_padding_too() -> None:
    image = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    nearest, zeros = plain("high_pass")(image), plain("high_pass", padding="zeros")(image)
    torch.testing.assert_close(nearest[..., 2:-2, 2:-2], zeros[..., 2:-2, 2:-2])
    assert not torch.allclose(nearest, zeros)
    row = torch.tensor([1.0, 4, 6, 4, 1], dtype=torch.float64) / 16
    blur = torch.outer(row, row).expand(3, 1, 5, 5)
    torch.testing.assert_close(zeros, image - F.conv2d(image, blur, padding=2, groups=3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["sobel", "high_pass"])
def test_filters_of_a_constant_image_are_0_up_to_the_border(kind: str) -> None:
    assert plain(kind)(torch.full((2, 3, 9, 9), 0.7, dtype=torch.float64)).abs().max() < 1e-6


def test_high_pass_is_the_image_minus_its_blur() -> None:
    dot = torch.zeros(1, 3, 9, 9, dtype=torch.float64)
    dot[0, 1, 4, 4] = 1.0
    row = np.array([1, 4, 6, 4, 1]) / 16
    expected = np.zeros((3, 9, 9))
    expected[1, 2:7, 2:7] = -np.outer(row, row)
    expected[1, 4, 4] += 1
    np.testing.assert_allclose(plain("high_pass")(dot)[0].numpy(), expected, atol=1e-7)


def test_normalize_dataset_uses_mean_and_std() -> None:
    x = torch.rand(4, 3, 5, 5)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    found = InputNormalization(mean=mean, std=std)(x).numpy()
    for c in range(3):
        np.testing.assert_allclose(found[:, c], (x.numpy()[:, c] - mean[c]) / std[c], rtol=1e-5, atol=1e-6)


def test_normalize_image_uses_the_statistics_of_each_image_over_its_channels() -> None:
    x = torch.rand(4, 3, 5, 5)
    found = InputNormalization(normalize="image", mean=(9.0, 9.0, 9.0))(x).numpy()
    for image, result in zip(x.numpy(), found, strict=True):
        np.testing.assert_allclose(result, (image - image.mean()) / image.std(ddof=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["rgb", "gray", "sobel", "high_pass"])
def test_constant_images_normalised_one_by_one_are_finite_and_small(kind: str) -> None:
    normalization = InputNormalization(input=kind, normalize="image")  # type: ignore[arg-type]
    for value in (0.0, 0.3, 1.0):
        out = normalization(torch.full((2, 3, 8, 8), value))
        assert out.abs().max() < 1.0


def test_shared_options_build_one_input_per_network() -> None:
    options: dict[str, Any] = {
        "normalize": "image",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "gray": "mean",
        "padding": "zeros",
    }
    for kind in ("rgb", "gray", "sobel", "high_pass"):
        (one,) = SharedEncoderOptions(input=kind, **options).build_inputs()  # type: ignore[arg-type]
        assert one.input == kind
    towers = SharedEncoderOptions(input="rgb_sobel", **options).build_inputs()
    assert [(tower.input, tower.channels) for tower in towers] == [("rgb", 3), ("sobel", 2)]
    x = torch.rand(2, 3, 5, 5)
    for tower in towers:
        assert torch.equal(tower(x), InputNormalization(input=tower.input, **options)(x))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["rgb", "gray", "sobel", "high_pass"])
def test_composed_filters_equal_filters_after_the_input(kind: Any) -> None:
    """The border is left out: the two pad in different ways."""
    made = InputNormalization(input=kind, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    filters = torch.randn(4, made.channels, 3, 3, dtype=torch.float64)
    whole = made.compose_filters(filters)
    seen = images if whole.shape[1] == 3 else (images * made.weights).sum(1, keepdim=True)
    wanted = F.conv2d(made(images), filters, padding=1)
    found = F.conv2d(seen, whole, padding=whole.shape[-1] // 2)
    assert whole.shape[-1] == {"rgb": 3, "gray": 3, "sobel": 5, "high_pass": 7}[kind]
    torch.testing.assert_close(found[:, :, 4:-4, 4:-4], wanted[:, :, 4:-4, 4:-4])


def on_black(images: Tensor, size: int, left: int, top: int) -> tuple[Tensor, Tensor]:
    """Images on black squares, and the (B, 4) regions that show them."""
    n, _, height, width = images.shape
    views = torch.zeros(n, 3, size, size, dtype=images.dtype)
    views[:, :, top : top + height, left : left + width] = images
    return views, torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32).expand(n, 4)


@pytest.mark.parametrize(("width", "height", "left", "top"), [(16, 12, 0, 2), (12, 16, 2, 0), (16, 16, 0, 0)])
def test_black_bars_have_no_part_in_the_statistics_of_an_image_and_become_its_mean(
    width: int, height: int, left: int, top: int
) -> None:
    images = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    views, region = on_black(images, 16, left, top)
    made = InputNormalization(normalize="image").double()
    found, alone = made(views, region), made(images)
    inside = found[:, :, top : top + height, left : left + width]
    torch.testing.assert_close(inside, alone, rtol=1e-12, atol=1e-12)
    assert float(found.abs().sum()) == pytest.approx(float(inside.abs().sum()), rel=1e-12), "0 outside"
    if width != height:
        assert abs(float(made(views).std() / alone.std()) - 1) < 0.01, "of the whole square, as it was"
        assert float((made(views)[:, :, top : top + height, left : left + width] - alone).abs().max()) > 0.3


def test_gradients_of_an_image_on_black_are_those_of_the_image_with_zero_padding() -> None:
    """Fast R-CNN pads images with zeros after it has subtracted their mean."""
    images = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    views, region = on_black(images, 16, 0, 2)
    made = InputNormalization(input="sobel", gray="mean", padding="zeros", normalize="image").double()
    torch.testing.assert_close(made(views, region)[:, :, 2:14], made(images), rtol=1e-9, atol=1e-9)
    # The bars' edges are the strongest gradients without the region.
    assert float(made(views)[:, :, 1:3].square().mean()) > 4 * float(made(views)[:, :, 4:12].square().mean())


@pytest.mark.parametrize("normalize", ["dataset", "image"])
def test_region_of_the_whole_view_changes_nothing_and_an_empty_one_stays_finite(normalize: Any) -> None:
    x, made = torch.rand(2, 3, 6, 8), InputNormalization(normalize=normalize)
    torch.testing.assert_close(made(x, torch.tensor([[0.0, 0.0, 8.0, 6.0]]).expand(2, 4)), made(x))
    assert bool(torch.isfinite(made(x, torch.zeros(2, 4))).all())
