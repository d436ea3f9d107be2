from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.encoders import ENCODERS, GRAY, Encoder, Input, pooled, pooled_size

SPECS: list[tuple[dict[str, Any], int, list[tuple[int, ...]]]] = [
    ({"name": "convnet", "width": 4, "depth": 3}, 32, [(4, 16, 16), (8, 8, 8), (16, 4, 4)]),
    ({"name": "convnet", "width": 2, "depth": 5}, 32, [(2, 16, 16), (4, 8, 8), (8, 4, 4), (8, 2, 2), (8, 1, 1)]),
    ({"name": "alexnet"}, 224, [(96, 27, 27), (256, 13, 13), (384, 13, 13), (384, 13, 13), (256, 6, 6)]),
    ({"name": "alexnet", "stem": "cifar"}, 32, [(96, 15, 15), (256, 7, 7), (384, 7, 7), (384, 7, 7), (256, 3, 3)]),
    ({"name": "resnet18"}, 64, [(64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
    ({"name": "resnet18", "stem": "cifar"}, 32, [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
    ({"name": "resnet50"}, 32, [(64, 8, 8), (256, 8, 8), (512, 4, 4), (1024, 2, 2), (2048, 1, 1)]),
    ({"name": "resnet50", "stem": "cifar"}, 8, [(64, 8, 8), (256, 8, 8), (512, 4, 4), (1024, 2, 2), (2048, 1, 1)]),
]


def ids(spec: object) -> str:
    return "-".join(map(str, spec.values())) if isinstance(spec, dict) else ""


def ramp(slope_x: float, slope_y: float, size: int = 6) -> Tensor:
    """(1, 3, size, size): gray, rising by `slope_x` to the right and by `slope_y` downwards."""
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    return (slope_x * x + slope_y * y).expand(1, 3, size, size)


def naive_sobel(gray: list[list[float]]) -> np.ndarray:
    """(2, h, w) gradients to the right and downwards, place by place; outside, the nearest pixel."""
    h, w = len(gray), len(gray[0])
    out = np.zeros((2, h, w))
    for i in range(h):
        for j in range(w):
            for k, weight in ((-1, 1.0), (0, 2.0), (1, 1.0)):
                above, below, middle = max(i - 1, 0), min(i + 1, h - 1), min(max(i + k, 0), h - 1)
                left, right, centre = max(j - 1, 0), min(j + 1, w - 1), min(max(j + k, 0), w - 1)
                out[0, i, j] += weight * (gray[middle][right] - gray[middle][left])
                out[1, i, j] += weight * (gray[below][centre] - gray[above][centre])
    return out


def plain(kind: str) -> Input:
    """The filter without normalisation, in float64."""
    return Input(input=kind, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).double()  # type: ignore[arg-type]


def test_every_encoder_is_tested() -> None:
    assert {spec["name"] for spec, _, _ in SPECS} == set(ENCODERS)


@pytest.mark.parametrize(("spec", "size", "shapes"), SPECS, ids=ids)
def test_shapes_are_the_documented_ones_and_those_of_a_forward_pass(spec: dict, size: int, shapes: list[tuple]) -> None:
    encoder = Encoder(spec, size)
    maps = encoder.eval()(torch.rand(2, 3, size, size))
    assert encoder.shapes == shapes
    assert [tuple(m.shape) for m in maps] == [(2, *shape) for shape in shapes]
    c, h, w = shapes[-1]
    assert (pooled_size(encoder, "avg"), pooled_size(encoder, "flatten")) == (c, c * h * w)
    assert pooled(maps, "flatten").shape == (2, c * h * w)
    torch.testing.assert_close(pooled(maps, "avg"), maps[-1].flatten(2).mean(2))


def test_a_new_encoder_is_in_training_mode_and_measuring_it_left_no_trace() -> None:
    encoder = Encoder({"name": "convnet", "width": 4, "depth": 2}, 8)
    assert all(m.training for m in encoder.modules())
    assert int(encoder.state_dict()["stages.0.1.num_batches_tracked"]) == 0
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize(
    ("spec", "size"), [({"name": "convnet", "depth": 4}, 15), ({"name": "alexnet"}, 62), ({"name": "alexnet", "stem": "cifar"}, 14)]
)
def test_too_small_images_are_named(spec: dict, size: int) -> None:
    with pytest.raises(ValueError, match=rf"images of {size} pixels are too small for {spec['name']}"):
        Encoder(spec, size)
    assert Encoder(spec, size + 1).shapes[-1][1:] == (1, 1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_take_the_smallest_images_that_a_config_allows(name: str) -> None:
    assert Encoder({"name": name}, 4).shapes[-1][1:] == (1, 1)


@pytest.mark.parametrize(("slope_x", "slope_y"), [(0.1, 0.0), (0.0, 0.1), (0.03, -0.07)])
def test_sobel_of_a_ramp_is_constant_inside(slope_x: float, slope_y: float) -> None:
    image = ramp(slope_x, slope_y).double()
    found = plain("sobel")(image)[0]
    inside = found[:, 1:-1, 1:-1]
    scale = sum(GRAY)
    torch.testing.assert_close(inside[0], torch.full_like(inside[0], 8 * slope_x * scale), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(inside[1], torch.full_like(inside[1], 8 * slope_y * scale), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.numpy(), naive_sobel((image[0, 0] * scale).tolist()), rtol=1e-6, atol=1e-7)


def test_sobel_of_a_random_image_equals_the_loop() -> None:
    image = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gray = sum(weight * image[0, c] for c, weight in enumerate(GRAY))
    assert isinstance(gray, Tensor)
    np.testing.assert_allclose(plain("sobel")(image)[0].numpy(), naive_sobel(gray.tolist()), atol=1e-6)
    torch.testing.assert_close(plain("gray")(image)[0, 0], gray, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["sobel", "high_pass"])
def test_filters_see_nothing_in_a_constant_image_not_even_at_its_border(kind: str) -> None:
    assert plain(kind)(torch.full((2, 3, 9, 9), 0.7, dtype=torch.float64)).abs().max() < 1e-6


def test_high_pass_is_the_image_minus_its_blur() -> None:
    dot = torch.zeros(1, 3, 9, 9, dtype=torch.float64)
    dot[0, 1, 4, 4] = 1.0
    row = np.array([1, 4, 6, 4, 1]) / 16
    expected = np.zeros((3, 9, 9))
    expected[1, 2:7, 2:7] = -np.outer(row, row)
    expected[1, 4, 4] += 1
    np.testing.assert_allclose(plain("high_pass")(dot)[0].numpy(), expected, atol=1e-7)


def test_normalize_dataset() -> None:
    x = torch.rand(4, 3, 5, 5)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    found = Input(mean=mean, std=std)(x).numpy()
    for c in range(3):
        np.testing.assert_allclose(found[:, c], (x.numpy()[:, c] - mean[c]) / std[c], rtol=1e-5, atol=1e-6)


def test_normalize_image_uses_the_statistics_of_each_image_over_its_channels() -> None:
    x = torch.rand(4, 3, 5, 5)
    found = Input(normalize="image", mean=(9.0, 9.0, 9.0))(x).numpy()
    for image, result in zip(x.numpy(), found, strict=True):
        np.testing.assert_allclose(result, (image - image.mean()) / image.std(ddof=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["rgb", "gray", "sobel", "high_pass"])
def test_constant_images_normalised_one_by_one_are_finite_and_small(kind: str) -> None:
    for value in (0.0, 0.3, 1.0):
        out = Input(input=kind, normalize="image")(torch.full((2, 3, 8, 8), value))  # type: ignore[arg-type]
        assert out.abs().max() < 1.0


@pytest.mark.parametrize(("kind", "channels"), [("rgb", 3), ("gray", 1), ("sobel", 2), ("high_pass", 3)])
def test_the_input_has_nothing_to_learn_and_its_constants_are_no_state(kind: str, channels: int) -> None:
    encoder = Encoder({"name": "convnet", "input": kind, "mean": [0.1, 0.2, 0.3], "width": 4, "depth": 2}, 8)
    assert list(encoder.input.parameters()) == []
    assert all(name.startswith("stages.") for name in encoder.state_dict())
    assert encoder.input(torch.rand(2, 3, 8, 8)).shape == (2, channels, 8, 8)
    assert encoder.state_dict()["stages.0.0.weight"].shape[1] == channels
