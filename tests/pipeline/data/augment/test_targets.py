"""Masks and boxes move like pixels: an image that shows its own mask or boxes goes through the same ops."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.annotations import VOID_VALUE, Annotation
from firstlight.pipeline.data.augment import ops as augment
from firstlight.pipeline.data.augment import random_numbers
from firstlight.pipeline.data.augment.op_params import POLICY_KINDS, POLICY_STEP_WIDTH, Affine, CropBox, Policy
from firstlight.pipeline.data.augment.policies import POLICY_POOLS
from firstlight.pipeline.data.augment.targets import Targets, find_view_map, locate_image, move_boxes, move_mask
from tests.support.png_maps import png

SIZE = 48
OPS: dict[str, list[dict[str, Any]]] = {
    "center": [{"op": "center_crop"}],
    "corner": [{"op": "corner_crop", "corner": "bottom_right", "scale": 0.7}, {"op": "horizontal_flip", "p": 1.0}],
    "pixels": [{"op": "random_crop", "size": 25}, {"op": "horizontal_flip"}],
    "copied": [{"op": "center_crop", "size": SIZE}],
    "window": [{"op": "window_crop", "index": 2, "scale": 0.7}],
    "resized": [{"op": "random_resized_crop", "scale": [0.3, 1.0]}, {"op": "horizontal_flip"}],
    "shift": [{"op": "random_shift", "padding": 9}, {"op": "horizontal_flip"}],
    "affine": [{"op": "center_crop"}, {"op": "random_affine", "degrees": 30.0, "scale": 0.3}],
    "fit": [{"op": "fit"}, {"op": "horizontal_flip"}],
    "turned over": [{"op": "random_crop", "size": 25}, {"op": "vertical_flip", "p": 0.7}, {"op": "horizontal_flip"}],
    "colour": [{"op": "fit"}, {"op": "color_jitter"}, {"op": "random_grayscale"}],
}
CHANGES_OF_LEVELS: list[dict[str, Any]] = [
    *({"op": name, "p": 1.0} for name in ("gaussian_blur", "solarize", "equalize", "autocontrast", "sharpness")),
    *({"op": "posterize", "bits": 3}, {"op": "random_erasing", "p": 1.0}, {"op": "cutout"}),
]


def rows_of(ops: list[dict[str, Any]], size: tuple[int, int], n: int) -> list[list[augment.OpParams]]:
    """Returns the parameters that are drawn for `n` images of one size."""
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
    """Returns true for pixels around which all within `reach` pixels have the same value."""
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


def test_changes_of_levels_and_erasing_leave_targets_unchanged() -> None:
    plain, changed = (rows_of([{"op": "fit"}, *ops], (80, 50), 8) for ops in ((), CHANGES_OF_LEVELS))
    boxes = np.array([[10, 10, 40, 30]], np.float32)
    for before, rows in zip(plain, changed, strict=True):
        assert len(rows) == 1 + len(CHANGES_OF_LEVELS)
        assert np.array_equal(move_mask(patches(80, 50, 0), rows, SIZE), move_mask(patches(80, 50, 0), before, SIZE))
        assert np.array_equal(move_boxes(boxes, rows, SIZE)[0], move_boxes(boxes, before, SIZE)[0])
        assert np.array_equal(locate_image(rows, SIZE), locate_image(before, SIZE))


@pytest.mark.parametrize("name", ["rand_augment", "trivial_augment"])
def test_ops_of_a_policy_move_targets_one_by_one(name: str) -> None:
    """Shears, shifts and rotations that were chosen, as if each were an op of the recipe."""
    moved = 0
    for rows in rows_of([{"op": "fit"}, {"op": name}], (60, 50), 60):
        policy = rows[1]
        assert isinstance(policy, Policy)
        steps = [rows[0], *policy.steps]
        moves = [step for step in steps[1:] if isinstance(step, Affine)]
        mask, boxes = patches(60, 50, 0), np.array([[18, 16, 40, 38]], np.float32)
        assert np.array_equal(move_mask(mask, rows, SIZE), move_mask(mask, steps, SIZE))
        for found, expected in zip(move_boxes(boxes, rows, SIZE), move_boxes(boxes, steps, SIZE), strict=True):
            assert np.array_equal(found, expected)
        assert np.array_equal(locate_image(rows, SIZE), locate_image(steps, SIZE))
        assert np.array_equal(find_view_map(rows, (60, 50), SIZE), find_view_map(steps, (60, 50), SIZE))
        assert np.array_equal(move_mask(mask, rows, SIZE), move_mask(mask, rows[:1], SIZE)) == (not moves)
        moved += bool(moves)
    assert 10 < moved < 55


def test_box_moves_with_its_pixels_under_the_moves_of_a_policy() -> None:
    """A white box on black under shears, shifts and rotations, each a policy of one op."""
    for place in (1, 2, 3, 4, 5):
        batch = POLICY_POOLS["torchvision"][place].build_batch(np.array([0.4]), np.array([-1.0]), SIZE)
        assert batch is not None
        step = batch.params_per_image()[0]
        policy = Policy(POLICY_KINDS.index(Affine), *step, *[0.0] * (POLICY_STEP_WIDTH - 7))
        params = [CropBox(0, 0, SIZE, SIZE), policy]
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        image[16:30, 14:32] = 255
        ys, xs = np.nonzero(augment.apply_params(Image.fromarray(image), params, SIZE)[..., 0] > 127)
        boxes, seen = move_boxes(np.array([[14, 16, 32, 30]], np.float32), params, SIZE)
        assert seen[0]
        assert boxes[0] == pytest.approx([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], abs=1.5)


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


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", [(60, 60), (80, 50), (33, 71)])
def test_region_is_where_the_image_is_shown(name: str, size: tuple[int, int]) -> None:
    """All pixels of a white image that are not black, in the view; a turned image has the box around them."""
    for rows in rows_of([op for op in OPS[name] if "color" not in op["op"]], size, 12):
        white = Image.new("RGB", size, (255, 255, 255))
        ys, xs = np.nonzero(augment.apply_params(white, rows, SIZE)[..., 0])
        left, top, right, bottom = locate_image(rows, SIZE)
        tolerance = 1.5 if name == "affine" else 0.0
        assert (left, top) == pytest.approx((xs.min(), ys.min()), abs=tolerance)
        assert (right, bottom) == pytest.approx((xs.max() + 1, ys.max() + 1), abs=tolerance)


def test_masks_and_boxes_come_with_the_region_of_their_image() -> None:
    drawn = augment.sample_params([{"op": "fit"}], np.zeros(1, np.uint64), np.array([[80, 60]]), SIZE)
    boxes = Annotation(
        boxes=np.array([[8.0, 6.0, 40.0, 30.0]], np.float32), box_classes=np.array([0]), difficult=np.array([False])
    )
    found = Targets("boxes", 1).build_arrays([boxes], drawn, SIZE)
    assert found["region"].tolist() == [[0.0, 6.0, 48.0, 42.0]]
    assert found["region"].dtype == np.float32
    mask = Annotation(mask=png(np.zeros((60, 80), np.uint8)))
    assert Targets("mask").build_arrays([mask], drawn, SIZE)["region"].tolist() == [[0.0, 6.0, 48.0, 42.0]]
    present = Annotation(present=np.array([1], np.int8))
    assert set(Targets("present").build_arrays([present], drawn, SIZE)) == {"present"}


@pytest.mark.parametrize("op", ["center_crop", "random_crop", "corner_crop"])
def test_crop_of_the_size_of_the_view_copies_masks_and_shifts_boxes(op: str) -> None:
    corner = {"corner": "top_right"} if op == "corner_crop" else {}
    for seed, rows in enumerate(rows_of([{"op": op, "size": SIZE, **corner}], (60, 53), 20)):
        mask, crop = patches(60, 53, seed), rows[0]
        assert isinstance(crop, CropBox)
        left, top = int(crop.left), int(crop.top)
        assert np.array_equal(move_mask(mask, rows, SIZE), mask[top : top + SIZE, left : left + SIZE])
        boxes, seen = move_boxes(np.array([[20, 20, 31, 30]], np.float32), rows, SIZE)
        assert seen[0]
        assert boxes[0].tolist() == [20 - left, 20 - top, 31 - left, 30 - top]


@pytest.mark.parametrize(
    "ops",
    [
        [{"op": "fit"}],
        [{"op": "center_crop"}, {"op": "horizontal_flip", "p": 1.0}],
        [{"op": "center_crop"}, {"op": "vertical_flip", "p": 1.0}],
        [{"op": "random_shift", "padding": 4}],
        [{"op": "fit"}, {"op": "random_affine", "degrees": 40.0}],
    ],
)
def test_map_of_a_view_moves_points_as_boxes_without_an_extent(ops: list[dict[str, Any]]) -> None:
    params = rows_of(ops, (60, 40), 1)[0]
    found = find_view_map(params, (60, 40), SIZE)
    for x, y in ((25.0, 20.0), (31.5, 17.25)):
        moved, _ = move_boxes(np.array([[x, y, x, y]]), params, SIZE)
        assert found @ np.array([x, y, 1.0]) == pytest.approx(moved[0, :2], abs=1e-4)
        assert moved[0, :2] == pytest.approx(moved[0, 2:])


def test_whole_masks_are_kept_with_the_places_of_their_windows() -> None:
    masks = [patches(60, 40, 0), patches(30, 50, 1)]
    sizes = np.array([mask.shape[::-1] for mask in masks])
    windows = augment.list_windows(sizes, scale=0.9)
    keys = random_numbers.derive_view_keys(0, np.zeros(2, np.int64), np.arange(2), 0)
    views = [augment.sample_params(ops, keys, sizes, SIZE) for ops in windows]
    annotations = [Annotation(mask=png(mask)) for mask in masks]
    found = Targets("mask", canvas=(70, 55)).build_whole_masks(annotations, views)
    assert found["whole_mask"].shape == (2, 55, 70)
    assert found["whole_size"].tolist() == [[60, 40], [30, 50]]
    assert found["windows"].shape == (2, len(windows), 4)
    for k, mask in enumerate(masks):
        height, width = mask.shape
        assert np.array_equal(found["whole_mask"][k, :height, :width], mask)
        outside = found["whole_mask"][k].copy()
        outside[:height, :width] = VOID_VALUE
        assert (outside == VOID_VALUE).all()
        assert found["windows"][k, -1].tolist() == pytest.approx(
            [*(sizes[k] - 0.9 * sizes[k].min()), *[0.9 * sizes[k].min()] * 2]
        )
