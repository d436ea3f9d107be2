"""Crops: their places, their sizes, and the copies that those of the result's size are."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from firstlight.pipeline.data.augment import op_params
from firstlight.pipeline.data.augment.crops import count_windows
from firstlight.pipeline.data.augment.ops import list_ten_crops, list_windows
from tests.support.augmentations import make_image, run_ops
from tests.support.paths import SHARED_DATA


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """(left, top, width, height) of every box that a crop resamples."""
    found: list[tuple[float, ...]] = []
    real = op_params._resize_box

    def record(source: Image.Image, *box_and_size: Any) -> Image.Image:
        found.append(box_and_size[:4])
        return real(source, *box_and_size)

    monkeypatch.setattr(op_params, "_resize_box", record)
    return found


def test_center_crop_of_result_size_is_the_image() -> None:
    source = make_image(16, 16)
    assert np.array_equal(run_ops(source, [{"op": "center_crop"}]), np.asarray(source))


def test_center_crop_is_in_the_centre(boxes: list[tuple[float, ...]]) -> None:
    run_ops(make_image(300, 200), [{"op": "center_crop"}])
    run_ops(make_image(100, 200), [{"op": "center_crop", "scale": 0.5}])
    assert boxes == [(50, 0, 200, 200), (25, 75, 50, 50)]


def test_random_crops_are_squares_all_over_the_image(boxes: list[tuple[float, ...]]) -> None:
    for k in range(500):
        run_ops(make_image(30, 20), [{"op": "random_crop", "scale": 0.5}], 4, (k, 0, 0, 0))
    left, top, width, height = np.array(boxes).T
    assert set(width) == set(height) == {10.0}
    assert 0 <= left.min() < 0.5
    assert 19.5 < left.max() <= 20
    assert 0 <= top.min() < 0.5
    assert 9.5 < top.max() <= 10


def test_random_shift_without_padding_is_the_center_crop() -> None:
    source = make_image(16, 16)
    assert np.array_equal(run_ops(source, [{"op": "random_shift", "padding": 0}]), np.asarray(source))


def test_random_shifts_are_windows_of_the_padded_image_each_equally_often() -> None:
    source, padding, size = make_image(6, 6), 1, 6
    padded = np.pad(np.asarray(source), ((1, 1), (1, 1), (0, 0)))
    windows = {padded[y : y + size, x : x + size].tobytes(): (x, y) for x in range(3) for y in range(3)}
    counts = dict.fromkeys(windows.values(), 0)
    for k in range(900):
        counts[
            windows[run_ops(source, [{"op": "random_shift", "padding": padding}], size, (k, 0, 0, 0)).tobytes()]
        ] += 1
    assert all(60 <= count <= 140 for count in counts.values()), counts


def torchvisions(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], draws: int
) -> np.ndarray:
    torch.manual_seed(0)
    blank = Image.new("RGB", (width, height))
    found = [RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(draws)]
    return np.array([(left, top, w, h) for top, left, h, w in found], float)


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((300, 200), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((64, 64), (0.3, 1.0), (3 / 4, 4 / 3)),
        ((200, 90), (0.5, 1.0), (0.5, 2.0)),
    ],
)
def test_boxes_are_distributed_like_torchvisions(
    boxes: list[tuple[float, ...]], size: tuple[int, int], scale: Any, ratio: Any
) -> None:
    draws, source = 3000, make_image(*size)
    for k in range(draws):
        run_ops(source, [{"op": "random_resized_crop", "scale": scale, "ratio": ratio}], 2, (0, 0, k, 0))
    ours, theirs = np.array(boxes, float), torchvisions(*size, scale, ratio, draws)
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: np.log(b[:, 2] / b[:, 3]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        a, b = measure(ours), measure(theirs)
        error = math.hypot(a.std() / draws**0.5, b.std() / draws**0.5)
        assert abs(a.mean() - b.mean()) < 4 * error
        assert ks_2samp(a, b).pvalue > 1e-4


@pytest.mark.parametrize(
    ("size", "ratio"),
    [((500, 1), (0.75, 1.33)), ((1, 500), (0.75, 1.33)), ((30, 20), (3.0, 4.0)), ((20, 30), (0.2, 0.3))],
)
def test_central_box_of_torchvision_if_none_fits(
    boxes: list[tuple[float, ...]], size: tuple[int, int], ratio: tuple[float, float]
) -> None:
    run_ops(make_image(*size), [{"op": "random_resized_crop", "scale": (1.0, 1.0), "ratio": ratio}])
    _, _, w, h = torchvisions(*size, (1.0, 1.0), ratio, 1)[0]
    assert boxes == [((size[0] - w) / 2, (size[1] - h) / 2, w, h)]


@pytest.mark.parametrize("ratio", [(3.0, 4.0), (0.2, 0.3)])
def test_single_pixel_has_a_crop_of_any_ratio(ratio: tuple[float, float]) -> None:
    for k in range(20):
        pixels = run_ops(
            Image.new("RGB", (1, 1), (9, 8, 7)), [{"op": "random_resized_crop", "ratio": ratio}], 4, (k, 0, 0, 0)
        )
        assert (pixels == (9, 8, 7)).all()


@pytest.mark.parametrize("op", ["center_crop", "random_crop"])
def test_crop_of_result_size_copies_pixels(op: str) -> None:
    """29 of 32 pixels (the denoising auto-encoder's crop): between pixels it would be a blur."""
    source = make_image(32, 32)
    pixels, seen = np.asarray(source), set()
    for seed in range(60):
        found = run_ops(source, [{"op": op, "scale": 0.90625}], 29, (seed, 0, 0, 0))
        places = [(y, x) for y in range(4) for x in range(4) if np.array_equal(pixels[y : y + 29, x : x + 29], found)]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) == (1 if op == "center_crop" else 16)


@pytest.mark.parametrize(("side", "size"), [(32, 28), (20, 12), (16, 16)])
def test_ten_crops_are_torchvisions(side: int, size: int) -> None:
    source = make_image(side, side)
    found = [run_ops(source, list(ops), size) for ops in list_ten_crops(size / side)]
    expected = [np.asarray(crop) for crop in torchvision.transforms.TenCrop(size)(source)]
    assert len(found) == 10
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_corner_crops_are_in_the_corners(boxes: list[tuple[float, ...]]) -> None:
    for corner in ("top_left", "top_right", "bottom_left", "bottom_right", "center"):
        run_ops(make_image(300, 200), [{"op": "corner_crop", "corner": corner, "scale": 0.5}])
    assert [box[:2] for box in boxes] == [(0, 0), (200, 0), (0, 100), (200, 100), (100, 50)]
    assert {box[2:] for box in boxes} == {(100, 100)}


# Published crops: of CIFAR, of STL-10 (section 3.4 of arXiv 1611.09119), and of ImageNet at 256 pixels.
PUBLISHED = [(32, 29), (96, 89), (256, 225)]


@pytest.mark.parametrize(("side", "size"), PUBLISHED)
@pytest.mark.parametrize("op", ["center_crop", "random_crop"])
def test_crop_in_pixels_copies_pixels_at_every_place(op: str, side: int, size: int) -> None:
    source, free = make_image(side, side), side - size
    pixels, seen = np.asarray(source), set()
    for seed in range(40):
        found = run_ops(source, [{"op": op, "size": size}], size, (seed, 0, 0, 0))
        first = [(y, x) for y in range(free + 1) for x in range(free + 1) if (pixels[y, x] == found[0, 0]).all()]
        places = [(y, x) for y, x in first if np.array_equal(pixels[y : y + size, x : x + size], found)]
        assert len(places) == 1
        seen |= set(places)
    assert seen == {(-(-free // 2), -(-free // 2))} if op == "center_crop" else len(seen) > min(10, free)


def test_ten_crops_in_pixels_are_torchvisions() -> None:
    source = make_image(96, 120)
    found = [run_ops(source, list(ops), 88) for ops in list_ten_crops(size=88)]
    expected = [np.asarray(crop) for crop in torchvision.transforms.TenCrop(88)(source)]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("op", ["center_crop", "random_crop", "corner_crop", "window_crop"])
def test_crop_in_pixels_of_another_size_than_the_result_is_on_whole_pixels(
    boxes: list[tuple[float, ...]], op: str
) -> None:
    corner = {"corner": "center"} if op == "corner_crop" else {}
    for seed in range(20):
        run_ops(make_image(50, 41), [{"op": op, "size": 20, **corner}], 16, (seed, 0, 0, 0))
    assert [box[2:] for box in boxes] == [(20, 20)] * 20
    assert all(place == int(place) for box in boxes for place in box[:2])


@pytest.mark.parametrize("op", ["center_crop", "random_crop", "corner_crop", "window_crop"])
def test_image_smaller_than_a_crop_in_pixels_gives_its_largest_square(boxes: list[tuple[float, ...]], op: str) -> None:
    corner = {"corner": "bottom_right"} if op == "corner_crop" else {}
    for seed in range(20):
        assert run_ops(make_image(50, 30), [{"op": op, "size": 89, **corner}], 89, (seed, 0, 0, 0)).shape[0] == 89
    assert {box[1:] for box in boxes} == {(0, 30, 30)}
    assert all(0 <= box[0] <= 20 for box in boxes)


IMAGE_SIZES = [(500, 375), (375, 500), (500, 96), (256, 256), (448, 224), (33, 32), (1, 1), (3, 500)]


@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize(
    "side", [{"scale": 225 / 256}, {"scale": 0.3}, {"scale": 1.0}, {"size": 29}, {"size": 1000}, {}]
)
def test_windows_cover_every_pixel_evenly_and_none_is_in_vain(
    boxes: list[tuple[float, ...]], size: tuple[int, int], side: dict[str, Any]
) -> None:
    """They end at the edges of the image, and with one fewer in a row there would be a gap."""
    windows = list_windows(np.array([size]), **side)
    for ops in windows:
        run_ops(make_image(*size), list(ops), 8)
    found = np.array(boxes)
    assert len(np.unique(found, axis=0)) == len(windows)
    for axis in (0, 1):
        starts, extent = np.unique(found[:, axis]), found[0, 2 + axis]
        assert starts[0] == 0
        assert starts[-1] + extent == pytest.approx(size[axis])
        assert (np.diff(starts) <= extent + 1e-9).all()
        assert (len(starts) - 1) * extent < size[axis]
        assert "size" not in side or (starts == np.floor(starts)).all()


def test_image_that_needs_fewer_windows_repeats_its_last(boxes: list[tuple[float, ...]]) -> None:
    windows = list_windows(np.array([[64, 64], [200, 64]]), scale=1.0)
    assert len(windows) == 4
    for ops in windows:
        run_ops(make_image(100, 64), list(ops), 8)
    assert boxes == [(0, 0, 64, 64), (36, 0, 64, 64), (36, 0, 64, 64), (36, 0, 64, 64)]
    assert count_windows(np.array([[100, 64]]), 1.0, None).tolist() == [[2, 1]]


def measure_gradient_energy(pixels: np.ndarray) -> float:
    """Returns the mean square of the differences of neighbouring pixels."""
    levels = pixels.astype(np.float64)
    return float((np.diff(levels, axis=0) ** 2).mean() + (np.diff(levels, axis=1) ** 2).mean())


@pytest.mark.parametrize("op", ["center_crop", "random_crop"])
@pytest.mark.parametrize("photograph", [0, 1])
def test_published_crop_of_a_photograph_keeps_its_gradients(op: str, photograph: int) -> None:
    """A side of 0.927083 * 96 = 88.99997 pixels instead of 89 lost half of their energy to resampling."""
    files = sorted((SHARED_DATA / "photos").glob("*.JPEG"))
    if not files:
        pytest.skip(f"{SHARED_DATA / 'photos'} is not there")
    with Image.open(files[photograph]) as opened:
        square = opened.convert("RGB").resize((96, 96), Image.Resampling.BOX)
    kept, blurred = (
        np.mean(
            [measure_gradient_energy(run_ops(square, [{"op": op, **side}], 89, (seed, 0, 0, 0))) for seed in range(20)]
        )
        for side in ({"size": 89}, {"scale": 0.927083})
    )
    whole = measure_gradient_energy(np.asarray(square))
    assert kept == pytest.approx(whole, rel=0.15), "the crop leaves out a rim"
    assert blurred < 0.8 * kept
