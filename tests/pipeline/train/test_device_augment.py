"""What is drawn for an image gives the same pixels with Pillow and in a batch: bit by bit, for every op, size and colour."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from firstlight.pipeline.data.augment import ops as augment
from firstlight.pipeline.data.augment.op_params import Jitter, OpBatch
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from firstlight.pipeline.train import device_augment
from tests.support.augmentations import PIPELINES, Ops

SIZES = [
    (32, 32, 32),
    (32, 32, 29),
    (8, 8, 8),
    (37, 21, 16),
    (96, 64, 48),
    (13, 50, 29),
    (30, 33, 29),
    (1, 500, 9),
    (500, 1, 9),
    (1, 1, 4),
]


def pictures(count: int, width: int, height: int) -> np.ndarray:
    """(count, H, W, 3): noise, patches of few colours, and single colours."""
    rng = np.random.default_rng(0)
    noise: np.ndarray = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    noise[::3] = noise[::3] // 64 * 64
    noise[1::9] = noise[1::9, :1, :1]
    return noise


def images(pixels: np.ndarray) -> Tensor:
    return torch.tensor(pixels).permute(0, 3, 1, 2)


def drawn(ops: Ops, source: np.ndarray, size: int) -> list[OpBatch]:
    ids = np.arange(len(source))
    return augment.sample_params(
        ops,
        derive_view_keys(0, np.ones_like(ids), ids, 0),
        np.tile((source.shape[2], source.shape[1]), (len(ids), 1)),
        size,
    )


def one_by_one(ops: Ops, source: np.ndarray, size: int) -> Tensor:
    pictures = [Image.fromarray(pixels) for pixels in source]
    return images(np.stack(list(augment.apply_batch(pictures, drawn(ops, source, size), size))))


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_a_batch_has_pillows_pixels(name: str, width: int, height: int, size: int) -> None:
    source = pictures(40, width, height)
    before = source.copy()
    found = device_augment.augment_batch(images(source), drawn(PIPELINES[name], source, size), size)
    assert found.dtype == torch.uint8
    assert torch.equal(found, one_by_one(PIPELINES[name], source, size))
    assert np.array_equal(source, before), "what is held was changed"


def test_in_every_shape_the_passes_are_in_pillows_order() -> None:
    """It rounds between them, and which is first depends on its version and on the sizes."""
    rng = np.random.default_rng(1)
    ops: Ops = [{"op": "random_resized_crop"}]
    for width, height, size in rng.integers(4, 60, (40, 3)).tolist():
        source = pictures(6, width, height)
        found = device_augment.augment_batch(images(source), drawn(ops, source, size), size)
        assert torch.equal(found, one_by_one(ops, source, size)), (width, height, size)


@pytest.mark.parametrize("red", [0, 1, 100, 127, 254, 255])
def test_every_colour_has_pillows_hue(red: int) -> None:
    green, blue = np.mgrid[0:256, 0:256]
    source = np.stack((np.full_like(green, red), green, blue), 2).astype(np.uint8)
    for turns in (0.1, -0.31, 0.5):
        op = OpBatch(Jitter, np.array([(1.0, 1.0, 1.0, turns, 3.0, 0.0, 1.0, 2.0)]))
        expected = np.asarray(op.params_per_image()[0].apply_to(Image.fromarray(source), 256))
        assert torch.equal(device_augment.augment_batch(images(source[None]), [op], 256), images(expected[None]))


@pytest.mark.parametrize(("k", "change"), enumerate(["brightness", "contrast", "saturation", "hue"]))
def test_colours_are_torchvisions(k: int, change: str) -> None:
    source = images(pictures(20, 24, 24))
    factors = np.random.default_rng(0).uniform(-0.4, 0.4, 20) + (k < 3)
    rows = np.array(
        [[factor if j == k else float(j < 3) for j in range(4)] + [0.0, 1.0, 2.0, 3.0] for factor in factors]
    )
    found = device_augment.augment_batch(source, [OpBatch(Jitter, rows)], 24)
    adjust = getattr(functional, f"adjust_{change}")
    expected = torch.stack([adjust(image, factor) for image, factor in zip(source, factors.tolist(), strict=True)])
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= (16 if change == "hue" else 2), "hue and saturation are rounded to 1/255"
    assert difference.double().mean() < 1.5
    assert (found.int() - source.int()).abs().double().mean() > 2


def test_shrinking_is_torchvisions_with_antialias() -> None:
    source = images(pictures(9, 64, 64))
    boxes = np.array([(k, 2 * k, 40 + k, 30 + k) for k in range(9)], np.float64)
    found = device_augment.crop_batch(source, boxes, 16)
    for image, pixels, (left, top, width, height) in zip(source, found, boxes.astype(int).tolist(), strict=True):
        expected = functional.resized_crop(image, top, left, height, width, [16, 16], antialias=True)
        inner = (slice(None), slice(1, -1), slice(1, -1))  # at its edge, a box of Pillow's sees the pixels beyond it
        assert (pixels[inner].int() - expected[inner].int()).abs().max() <= 1


@pytest.mark.parametrize("tall", [400, 900])
def test_sums_are_exact_for_strong_shrinking_and_where_float32_is_not(
    monkeypatch: pytest.MonkeyPatch, tall: int
) -> None:
    """White and near-white images have the largest sums of levels."""
    source, ops = 255 - pictures(6, 9, tall) // 100, PIPELINES["random_resized_crop"]
    expected = one_by_one(ops, source, 2)
    assert torch.equal(device_augment.augment_batch(images(source), drawn(ops, source, 2), 2), expected)
    monkeypatch.setattr(device_augment, "_float32_is_whole", lambda: False)
    assert device_augment._resampling_weights(images(source), np.zeros(6), np.full(6, 9.0), 9, 2).dtype == torch.float64
    assert torch.equal(device_augment.augment_batch(images(source), drawn(ops, source, 2), 2), expected)


def test_it_is_seen_that_torch_rounds_the_factors_of_products() -> None:
    assert device_augment._is_float32_exact()
    torch.set_float32_matmul_precision("medium")
    try:
        assert not device_augment._is_float32_exact()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert device_augment._is_float32_exact()


def test_large_batches_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    source, ops = pictures(23, 20, 30), PIPELINES["super_and"]
    whole = device_augment.augment_batch(images(source), drawn(ops, source, 16), 16)
    for pixels in (1, 7 * 20 * 30):
        monkeypatch.setitem(device_augment.PIXELS_PER_PART, "cpu", pixels)
        assert torch.equal(device_augment.augment_batch(images(source), drawn(ops, source, 16), 16), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_gpu_has_the_same_pixels(name: str) -> None:
    source = pictures(60, 37, 21)
    rows = drawn(PIPELINES[name], source, 16)
    assert torch.equal(
        device_augment.augment_batch(images(source).cuda(), rows, 16).cpu(),
        device_augment.augment_batch(images(source), rows, 16),
    )
