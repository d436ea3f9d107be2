"""What is drawn for an image gives the same pixels with Pillow and in a batch: bit by bit, for every op, size and colour."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from pipeline import augment, augment_batched
from pipeline.augment import CROPS, OPS, Drawn, Jitter, generator

Ops = list[dict[str, Any]]
CROP: dict[str, Any] = {"op": "center_crop"}
PIPELINES: dict[str, Ops] = {
    **{name: [{"op": name}] if name in CROPS else [CROP, {"op": name}] for name in OPS},
    "a corner at full size": [{"op": "random_crop", "scale": 0.90625}],
    "boxes over the edge": [{"op": "random_resized_crop", "scale": (1.0, 1.0), "ratio": (3.0, 4.0)}],
    "no shift": [{"op": "random_shift", "padding": 0}],
    "shift out of the picture": [{"op": "random_shift", "padding": 40}],
    "far turns": [{"op": "random_shift"}, {"op": "random_affine", "degrees": 180.0, "scale": 0.9}],
    "strong colours": [CROP, {"op": "color_jitter", "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}],
    "no hue": [CROP, {"op": "color_jitter", "hue": 0.0}],
    "nothing but hue": [CROP, {"op": "color_jitter", "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.5}],
    "cifar": [{"op": "random_shift", "padding": 4}, {"op": "horizontal_flip"}],
    "super_and": [
        {"op": "random_resized_crop", "scale": (0.2, 1.0)},
        {"op": "color_jitter", "hue": 0.4},
        {"op": "random_grayscale"},
        {"op": "horizontal_flip"},
    ],
}
SIZES = [(32, 32, 32), (32, 32, 29), (8, 8, 8), (37, 21, 16), (96, 64, 48), (13, 50, 29), (30, 33, 29), (1, 500, 9), (500, 1, 9), (1, 1, 4)]


def pictures(count: int, width: int, height: int) -> np.ndarray:
    """(count, H, W, 3): noise, patches of few colours, and single colours."""
    rng = np.random.default_rng(0)
    noise: np.ndarray = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    noise[::3] = noise[::3] // 64 * 64
    noise[1::9] = noise[1::9, :1, :1]
    return noise


def images(pixels: np.ndarray) -> Tensor:
    return torch.tensor(pixels).permute(0, 3, 1, 2)


def drawn(ops: Ops, source: np.ndarray, size: int) -> list[list[Drawn]]:
    return [augment.draw(ops, generator(0, 1, i, 0), (source.shape[2], source.shape[1]), size) for i in range(len(source))]


def one_by_one(ops: Ops, source: np.ndarray, size: int) -> Tensor:
    return images(np.stack([augment.apply(Image.fromarray(pixels), ops, generator(0, 1, i, 0), size) for i, pixels in enumerate(source)]))


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_a_batch_has_pillows_pixels(name: str, width: int, height: int, size: int) -> None:
    source = pictures(40, width, height)
    before = source.copy()
    found = augment_batched.apply(images(source), drawn(PIPELINES[name], source, size), size)
    assert found.dtype == torch.uint8
    assert torch.equal(found, one_by_one(PIPELINES[name], source, size))
    assert np.array_equal(source, before), "what is held was changed"


def test_in_every_shape_the_passes_are_in_pillows_order() -> None:
    """It rounds between them, and which is first depends on its version and on the sizes."""
    rng = np.random.default_rng(1)
    ops: Ops = [{"op": "random_resized_crop"}]
    for width, height, size in rng.integers(4, 60, (40, 3)).tolist():
        source = pictures(6, width, height)
        found = augment_batched.apply(images(source), drawn(ops, source, size), size)
        assert torch.equal(found, one_by_one(ops, source, size)), (width, height, size)


@pytest.mark.parametrize("red", [0, 1, 100, 127, 254, 255])
def test_every_colour_has_pillows_hue(red: int) -> None:
    green, blue = np.mgrid[0:256, 0:256]
    source = np.stack((np.full_like(green, red), green, blue), 2).astype(np.uint8)
    for turns in (0.1, -0.31, 0.5):
        row = Jitter(1.0, 1.0, 1.0, turns, 3, 0, 1, 2)
        expected = np.asarray(row.on(Image.fromarray(source), 256))
        assert torch.equal(augment_batched.apply(images(source[None]), [[row]], 256), images(expected[None]))


@pytest.mark.parametrize(("k", "change"), enumerate(["brightness", "contrast", "saturation", "hue"]))
def test_colours_are_torchvisions(k: int, change: str) -> None:
    source = images(pictures(20, 24, 24))
    factors = np.random.default_rng(0).uniform(-0.4, 0.4, 20) + (k < 3)
    rows = [[Jitter(*(factor if j == k else float(j < 3) for j in range(4)), 0, 1, 2, 3)] for factor in factors.tolist()]  # type: ignore[arg-type]
    found = augment_batched.apply(source, rows, 24)
    adjust = getattr(functional, f"adjust_{change}")
    expected = torch.stack([adjust(image, factor) for image, factor in zip(source, factors.tolist(), strict=True)])
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= (16 if change == "hue" else 2), "hue and saturation are rounded to 1/255"
    assert difference.double().mean() < 1.5
    assert (found.int() - source.int()).abs().double().mean() > 2


def test_shrinking_is_torchvisions_with_antialias() -> None:
    source = images(pictures(9, 64, 64))
    boxes = np.array([(k, 2 * k, 40 + k, 30 + k) for k in range(9)], np.float64)
    found = augment_batched.crop(source, boxes, 16)
    for image, pixels, (left, top, width, height) in zip(source, found, boxes.astype(int).tolist(), strict=True):
        expected = functional.resized_crop(image, top, left, height, width, [16, 16], antialias=True)
        inner = (slice(None), slice(1, -1), slice(1, -1))  # at its edge, a box of Pillow's sees the pixels beyond it
        assert (pixels[inner].int() - expected[inner].int()).abs().max() <= 1


def test_large_batches_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    source, ops = pictures(23, 20, 30), PIPELINES["super_and"]
    whole = augment_batched.apply(images(source), drawn(ops, source, 16), 16)
    for pixels in (1, 7 * 20 * 30):
        monkeypatch.setattr(augment_batched, "PIXELS", pixels)
        assert torch.equal(augment_batched.apply(images(source), drawn(ops, source, 16), 16), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_gpu_has_the_same_pixels(name: str) -> None:
    source = pictures(60, 37, 21)
    rows = drawn(PIPELINES[name], source, 16)
    assert torch.equal(augment_batched.apply(images(source).cuda(), rows, 16).cpu(), augment_batched.apply(images(source), rows, 16))
