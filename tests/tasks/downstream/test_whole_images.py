"""Masks and boxes of views are brought back to the pixels of whole images."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from firstlight.pipeline.data.augment.ops import list_windows, sample_params
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from firstlight.pipeline.data.augment.targets import find_view_map, locate_image, move_boxes
from firstlight.tasks.downstream.segment import merge_windows
from firstlight.tasks.downstream.whole_images import VOID_CLASS, ImageViews, classify_pixels, move_boxes_back
from tests.support.saved_models import build_model

SIDE = 12
ONE = np.zeros(1, np.int64)


def view_of(size: tuple[int, int], *views: tuple[dict[str, Any], ...]) -> tuple[ImageViews, list[Any]]:
    """Returns an image of `size` with black views, and the parameters of the ops of each."""
    params = []
    for k, ops in enumerate(views):
        sampled = sample_params(ops, derive_view_keys(0, ONE, ONE, k), np.array([size]), SIDE)
        (one,) = zip(*(op.params_per_image() for op in sampled), strict=True)
        params.append(one)
    regions = torch.from_numpy(np.stack([locate_image(one, SIDE) for one in params]))
    maps = torch.from_numpy(np.stack([find_view_map(one, size, SIDE) for one in params]))
    return ImageViews(torch.zeros(len(params), 3, SIDE, SIDE), regions, maps, size), params


def classify_one_by_one(logits: Tensor, image: ImageViews) -> np.ndarray:
    """The definition, pixel by pixel: bilinear between the centres of logits, constant from the outermost on."""
    width, height = image.size
    found = np.full((height, width), VOID_CLASS)
    for row in range(height):
        for column in range(width):
            answers = []
            for one, to_view, region in zip(logits.double().numpy(), image.to_view, image.regions, strict=True):
                x, y = (to_view @ torch.tensor([column + 0.5, row + 0.5, 1.0], dtype=torch.float64)).tolist()
                left, top, right, bottom = region.tolist()
                if not (left - 1e-6 <= x <= right + 1e-6 and top - 1e-6 <= y <= bottom + 1e-6):
                    continue
                x, y = min(max(x, left + 0.5), right - 0.5) - 0.5, min(max(y, top + 0.5), bottom - 0.5) - 0.5
                k, j = min(int(x), SIDE - 2), min(int(y), SIDE - 2)
                a, b = x - k, y - j
                upper = (1 - a) * one[:, j, k] + a * one[:, j, k + 1]
                lower = (1 - a) * one[:, j + 1, k] + a * one[:, j + 1, k + 1]
                answers.append((1 - b) * upper + b * lower)
            if answers:
                found[row, column] = np.mean(answers, 0).argmax()
    return found


@pytest.mark.parametrize(
    ("size", "views"),
    [
        ((31, 17), [({"op": "fit"},)]),
        ((9, 30), [({"op": "fit"},)]),
        ((31, 17), [({"op": "center_crop", "scale": 0.8},)]),
        (
            (20, 14),
            [({"op": "corner_crop", "corner": "top_left"},), ({"op": "corner_crop", "corner": "bottom_right"},)],
        ),
        ((20, 14), [({"op": "fit"}, {"op": "horizontal_flip", "p": 1.0})]),
        ((20, 14), [({"op": "fit"}, {"op": "random_affine", "degrees": 30.0})]),
    ],
)
def test_every_pixel_has_the_class_of_its_place_in_the_views(size: tuple[int, int], views: list[Any]) -> None:
    image, _ = view_of(size, *views)
    logits = torch.randn(len(views), 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    found = classify_pixels(logits, image)
    assert found.dtype == torch.uint8
    expected = classify_one_by_one(logits, image)
    assert found.shape == expected.shape == size[::-1]
    assert (found.numpy() == expected).mean() > 0.998, "but for pixels where two classes are equal up to rounding"
    assert np.array_equal(found.numpy() == VOID_CLASS, expected == VOID_CLASS)


def test_pixels_outside_of_a_crop_have_no_class() -> None:
    image, _ = view_of((30, 10), ({"op": "center_crop"},))
    found = classify_pixels(torch.ones(1, 2, SIDE, SIDE), image)
    assert (found[:, :10] == VOID_CLASS).all()
    assert (found[:, 10:20] == 0).all()
    assert (found[:, 20:] == VOID_CLASS).all()


def test_windows_are_merged_as_they_are_scored() -> None:
    size = (40, 17)
    views = list_windows(np.array([size]), 0.6, None)
    image, params = view_of(size, *views)
    assert len(views) > 4
    logits = torch.randn(len(views), 5, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    windows = [(p.left, p.top, p.width, p.height) for (p,) in params]
    merged = merge_windows(logits, windows, size).argmax(0)
    found = classify_pixels(logits, image)
    assert float((found == merged).double().mean()) > 0.998
    assert not (found == VOID_CLASS).any()


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = view_of((31, 17), ({"op": "fit"},))
    logits = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    whole = classify_pixels(logits, image)
    monkeypatch.setattr("firstlight.tasks.downstream.whole_images.MASK_BLOCK_PIXELS", 70)
    assert torch.equal(classify_pixels(logits, image), whole)


@pytest.mark.parametrize(
    "ops",
    [
        ({"op": "fit"},),
        ({"op": "center_crop"},),
        ({"op": "random_shift", "padding": 1},),
        ({"op": "fit"}, {"op": "horizontal_flip", "p": 1.0}),
    ],
)
def test_boxes_come_back_to_where_they_were(ops: tuple[dict[str, Any], ...]) -> None:
    image, (params,) = view_of((31, 17), ops)
    boxes = np.array([[9.0, 3.0, 14.0, 9.0], [12.0, 5.0, 20.0, 12.0]])
    moved, visible = move_boxes(boxes, params, SIDE)
    assert visible.all()
    back = move_boxes_back(torch.from_numpy(moved), image)
    assert back.dtype == torch.float64
    assert back.numpy() == pytest.approx(boxes, abs=1e-4)


def test_boxes_end_at_the_edges_of_the_image() -> None:
    image, _ = view_of((31, 17), ({"op": "fit"},))
    back = move_boxes_back(torch.tensor([[-3.0, -3.0, 40.0, 40.0]]), image)
    assert back.tolist() == [[0.0, 0.0, 31.0, 17.0]]


@pytest.mark.parametrize("name", ["segment", "detect"])
def test_padding_has_no_part_in_the_normalisation_of_a_prediction(name: str) -> None:
    task, _ = build_model(name, encoder={"normalize": "image"})
    side = task.encoder.image_size
    view = torch.zeros(1, 3, side, side)
    shown = slice(side // 4, 3 * side // 4)
    view[:, :, shown] = torch.rand(1, 3, side // 2, side, generator=torch.Generator().manual_seed(3))
    region = torch.tensor([[0.0, side // 4, side, 3 * side // 4]])
    plain = torch.eye(2, 3, dtype=torch.float64)[None]
    seen: list[Tensor] = []
    hook = task.encoder.input.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.inference_mode():
        task.predict_images([ImageViews(view, region, plain, (side, side))])
    hook.remove()
    assert float(seen[0][:, :, shown].mean()) == pytest.approx(0.0, abs=1e-5)
    assert not seen[0][:, :, : side // 4].any(), "the padding is the mean"
