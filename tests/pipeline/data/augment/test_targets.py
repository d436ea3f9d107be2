"""Masks and boxes move like pixels: an image that shows its own mask or boxes goes through the same ops."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.annotations import VOID_VALUE
from firstlight.pipeline.data.augment import ops as augment
from firstlight.pipeline.data.augment import random_numbers
from firstlight.pipeline.data.augment.targets import move_boxes, move_mask

SIZE = 48
OPS: dict[str, list[dict[str, Any]]] = {
    "center": [{"op": "center_crop"}],
    "corner": [{"op": "corner_crop", "corner": "bottom_right", "scale": 0.7}, {"op": "horizontal_flip", "p": 1.0}],
    "resized": [{"op": "random_resized_crop", "scale": [0.3, 1.0]}, {"op": "horizontal_flip"}],
    "shift": [{"op": "random_shift", "padding": 9}, {"op": "horizontal_flip"}],
    "affine": [{"op": "center_crop"}, {"op": "random_affine", "degrees": 30.0, "scale": 0.3}],
    "fit": [{"op": "fit"}, {"op": "horizontal_flip"}],
    "colour": [{"op": "fit"}, {"op": "color_jitter"}, {"op": "random_grayscale"}],
}


def rows_of(ops: list[dict[str, Any]], size: tuple[int, int], n: int) -> list[list[augment.OpParams]]:
    """What is drawn for `n` images of one size."""
    ids = np.arange(n)
    drawn = augment.sample_params(
        ops, random_numbers.derive_view_keys(3, np.zeros(n, np.int64), ids, 0), np.tile(size, (n, 1)), SIZE
    )
    return [list(rows) for rows in zip(*(op.params_per_image() for op in drawn), strict=True)]


def patches(width: int, height: int, seed: int) -> np.ndarray:
    """A mask of a few large rectangles, one of them void."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for value in (1, 2, 3, VOID_VALUE):
        x, y = rng.integers(0, width * 2 // 3), rng.integers(0, height * 2 // 3)
        mask[y : y + height // 2, x : x + width // 2] = value
    return mask


def uniform(mask: np.ndarray, reach: int = 2) -> np.ndarray:
    """Where all within `reach` pixels have the same value."""
    same = np.ones_like(mask, bool)
    padded = np.pad(mask, reach, constant_values=77)
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            same &= padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]] == mask
    return same


@pytest.mark.parametrize("name", [name for name in OPS if name != "colour"])
@pytest.mark.parametrize("size", [(60, 60), (80, 50), (33, 71)])
def test_masks_move_with_their_pixels(name: str, size: tuple[int, int]) -> None:
    compared = 0
    for seed, rows in enumerate(rows_of(OPS[name], size, 12)):
        mask = patches(*size, seed)
        levels = np.where(mask == VOID_VALUE, 250, 40 + 40 * mask.astype(int)).astype(np.uint8)
        shown = augment.apply_params(Image.fromarray(levels).convert("RGB"), rows, SIZE)[..., 0].astype(int)
        moved = move_mask(mask, rows, SIZE)
        assert moved.shape == (SIZE, SIZE)
        inside = uniform(moved, 3) & (moved != VOID_VALUE)
        assert (abs(shown - 40 - 40 * moved.astype(int))[inside] <= 1).all()
        black = uniform((shown == 0).astype(np.uint8)) & (shown == 0)
        assert (moved[black] == VOID_VALUE).all()  # what comes from outside belongs to no class
        compared += int(inside.sum())
    assert compared > 12 * SIZE**2 / 20


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("colour", "affine")])
@pytest.mark.parametrize("size", [(60, 60), (80, 50), (33, 71)])
def test_boxes_move_with_their_pixels(name: str, size: tuple[int, int]) -> None:
    found = 0
    for seed, rows in enumerate(rows_of(OPS[name], size, 20)):
        rng = np.random.default_rng(seed)
        x, y = int(rng.integers(0, size[0] // 2)), int(rng.integers(0, size[1] // 2))
        w, h = int(rng.integers(12, size[0] // 2)), int(rng.integers(12, size[1] // 2))
        image = np.zeros((size[1], size[0], 3), np.uint8)
        image[y : y + h, x : x + w] = 255
        shown = augment.apply_params(Image.fromarray(image), rows, SIZE)[..., 0] > 127
        boxes, seen = move_boxes(np.array([[x, y, x + w, y + h]], np.float32), rows, SIZE)
        if seen[0]:
            ys, xs = np.nonzero(shown)
            assert boxes[0] == pytest.approx([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], abs=1.01)
            found += 1
        else:
            assert shown.sum() < 0.5 * SIZE**2
    assert found >= 3


def test_rotated_boxes_contain_their_pixels() -> None:
    for rows in rows_of(OPS["affine"], (60, 60), 20):
        image = np.zeros((60, 60, 3), np.uint8)
        image[22:38, 18:40] = 255
        ys, xs = np.nonzero(augment.apply_params(Image.fromarray(image), rows, SIZE)[..., 0] > 127)
        boxes, seen = move_boxes(np.array([[18, 22, 40, 38]], np.float32), rows, SIZE)
        assert seen[0]
        assert (boxes[0] - [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] <= [1.5, 1.5, np.inf, np.inf]).all()
        assert (boxes[0] - [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] >= [-np.inf, -np.inf, -1.5, -1.5]).all()
        area = float((boxes[0, 2] - boxes[0, 0]) * (boxes[0, 3] - boxes[0, 1]))
        assert area < 3.5 * len(xs)


def test_changes_of_colour_leave_targets_unchanged() -> None:
    for rows, plain in zip(rows_of(OPS["colour"], (80, 50), 8), rows_of([{"op": "fit"}], (80, 50), 8), strict=True):
        mask = patches(80, 50, 0)
        assert np.array_equal(move_mask(mask, rows, SIZE), move_mask(mask, plain, SIZE))


def test_cut_off_boxes_are_not_visible() -> None:
    rows = rows_of([{"op": "corner_crop", "corner": "top_left", "scale": 0.5}], (100, 100), 1)[
        0
    ]  # the upper left quarter
    boxes = np.array(
        [[0, 0, 40, 40], [40, 40, 60, 60], [60, 60, 90, 90], [0, 30, 50, 70], [10, 10, 10.2, 30]], np.float32
    )
    cut, seen = move_boxes(boxes, rows, SIZE)
    assert seen.tolist() == [True, False, False, True, False]
    assert cut[0] == pytest.approx([0, 0, 38.4, 38.4])
    assert cut[3] == pytest.approx([0, 28.8, 48, 48])
    assert move_boxes(np.empty((0, 4), np.float32), rows, SIZE)[0].shape == (0, 4)
