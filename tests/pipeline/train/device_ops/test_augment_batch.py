"""Augmented batches have the pixels of Pillow, bit by bit, for every op and size."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from firstlight.pipeline.data.augment import ops as augment
from firstlight.pipeline.data.augment.op_params import OpBatch
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from firstlight.pipeline.train.device_ops import augment_batch as module
from tests.support.augmentations import CROP, PIPELINES, Ops
from tests.support.noise_images import make_noise, to_batch_of_images

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


def sample_params(ops: Ops, source: np.ndarray, size: int) -> list[OpBatch]:
    ids = np.arange(len(source))
    return augment.sample_params(
        ops,
        derive_view_keys(0, np.ones_like(ids), ids, 0),
        np.tile((source.shape[2], source.shape[1]), (len(ids), 1)),
        size,
    )


def augment_with_pillow(ops: Ops, source: np.ndarray, size: int) -> Tensor:
    pictures = [Image.fromarray(pixels) for pixels in source]
    return to_batch_of_images(np.stack(list(augment.apply_batch(pictures, sample_params(ops, source, size), size))))


@pytest.mark.parametrize("name", PIPELINES)
def test_augmented_batch_has_pillows_pixels(name: str) -> None:
    """At every size; of what follows the central crop, which is tested itself, at every size of a view."""
    ops, sizes = PIPELINES[name], SIZES
    if len(ops) > 1 and ops[0] == CROP:
        sizes = [*{size[2]: size for size in reversed(SIZES)}.values()]
    for width, height, size in sizes:
        source = make_noise(40, width, height)
        before = source.copy()
        found = module.augment_batch(to_batch_of_images(source), sample_params(ops, source, size), size)
        assert found.dtype == torch.uint8
        assert torch.equal(found, augment_with_pillow(ops, source, size)), (width, height, size)
        assert np.array_equal(source, before), "what is held was changed"


@pytest.mark.parametrize("name", PIPELINES)
def test_one_channel_of_gray_images_gives_their_three(name: str) -> None:
    for size in (16, 29):
        gray = to_batch_of_images(make_noise(40, 37, 29))[:, :1]
        whole = gray.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
        found = module.augment_batch(gray, sample_params(PIPELINES[name], whole, size), size)
        assert torch.equal(found, augment_with_pillow(PIPELINES[name], whole, size))


def test_resampling_passes_are_in_pillows_order_for_every_shape() -> None:
    """It rounds between them, and which is first depends on its version and on the sizes."""
    rng = np.random.default_rng(1)
    ops: Ops = [{"op": "random_resized_crop"}]
    for width, height, size in rng.integers(4, 60, (40, 3)).tolist():
        source = make_noise(6, width, height)
        found = module.augment_batch(to_batch_of_images(source), sample_params(ops, source, size), size)
        assert torch.equal(found, augment_with_pillow(ops, source, size)), (width, height, size)


def test_shrinking_is_close_to_torchvisions_with_antialias() -> None:
    source = to_batch_of_images(make_noise(9, 64, 64))
    boxes = np.array([(k, 2 * k, 40 + k, 30 + k) for k in range(9)], np.float64)
    found = module.crop_batch(source, boxes, 16)
    for image, pixels, (left, top, width, height) in zip(source, found, boxes.astype(int).tolist(), strict=True):
        expected = functional.resized_crop(image, top, left, height, width, [16, 16], antialias=True)
        inner = (slice(None), slice(1, -1), slice(1, -1))  # at its edge, a box of Pillow's sees the pixels beyond it
        assert (pixels[inner].int() - expected[inner].int()).abs().max() <= 1


@pytest.mark.parametrize("tall", [400, 900])
def test_weighted_sums_are_exact_for_strong_shrinking_and_inexact_float32(
    monkeypatch: pytest.MonkeyPatch, tall: int
) -> None:
    """White and near-white images have the largest sums of levels."""
    source, ops = 255 - make_noise(6, 9, tall) // 100, PIPELINES["random_resized_crop"]
    expected = augment_with_pillow(ops, source, 2)
    assert torch.equal(module.augment_batch(to_batch_of_images(source), sample_params(ops, source, 2), 2), expected)
    monkeypatch.setattr(module, "_is_float32_exact", lambda: False)
    assert (
        module._resampling_weights(to_batch_of_images(source), np.zeros(6), np.full(6, 9.0), 9, 2).dtype
        == torch.float64
    )
    assert torch.equal(module.augment_batch(to_batch_of_images(source), sample_params(ops, source, 2), 2), expected)


def test_rounding_of_factors_by_torch_is_detected() -> None:
    assert module._is_float32_exact()
    torch.set_float32_matmul_precision("medium")
    try:
        assert not module._is_float32_exact()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert module._is_float32_exact()


def test_large_batches_are_augmented_in_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    source, ops = make_noise(23, 20, 30), PIPELINES["super_and"]
    whole = module.augment_batch(to_batch_of_images(source), sample_params(ops, source, 16), 16)
    for pixels in (1, 7 * 20 * 30):
        monkeypatch.setitem(module.PIXELS_PER_PART, "cpu", pixels)
        assert torch.equal(module.augment_batch(to_batch_of_images(source), sample_params(ops, source, 16), 16), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PIPELINES)
def test_pixels_on_a_gpu_are_the_same(name: str) -> None:
    source = make_noise(60, 37, 21)
    rows = sample_params(PIPELINES[name], source, 16)
    assert torch.equal(
        module.augment_batch(to_batch_of_images(source).cuda(), rows, 16).cpu(),
        module.augment_batch(to_batch_of_images(source), rows, 16),
    )
