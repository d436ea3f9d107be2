import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import RandomResizedCrop

from firstlight.pipeline.data.augment import op_params
from firstlight.pipeline.data.augment import ops as augment
from firstlight.pipeline.data.augment.ops import CROP_OPS, OPS, apply_batch, sample_params
from firstlight.pipeline.data.augment.random_numbers import CounterRng, derive_view_keys
from tests.support.augmentations import CHOSEN

SIZES = [(1, 1), (1, 500), (500, 1), (37, 11), (300, 200)]
PIPELINES: dict[str, list[dict[str, Any]]] = {
    name: [{"op": name, **CHOSEN.get(name, {})}]
    if name in CROP_OPS
    else [
        {"op": "center_crop"},
        {"op": name, **({"p": 1.0} if name in ("horizontal_flip", "random_grayscale") else {})},
    ]
    for name in OPS
}
RANDOM = sorted(OPS.keys() - {"center_crop", "corner_crop", "fit", "horizontal_flip", "random_grayscale"})


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def run(
    source: Image.Image, ops: list[dict[str, Any]], size: int = 16, key: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> np.ndarray:
    seed, epoch, image_id, view = key
    drawn = sample_params(
        ops, derive_view_keys(seed, np.array([epoch]), np.array([image_id]), view), np.array([source.size]), size
    )
    return next(apply_batch([source], drawn, size))


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


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_any_image_becomes_square_rgb_and_is_not_modified(name: str, size: tuple[int, int]) -> None:
    source = image(*size)
    before = source.tobytes()
    for seed in range(5):
        for out in (7, 32):
            pixels = run(source, PIPELINES[name], out, (seed, 0, 0, 0))
            assert pixels.shape == (out, out, 3)
            assert pixels.dtype == np.uint8
    assert source.tobytes() == before


@pytest.mark.parametrize("name", OPS)
def test_equal_keys_give_equal_pixels(name: str) -> None:
    for key in ((0, 0, 0, 0), (5, 3, 1_281_167, 1)):
        assert np.array_equal(
            run(image(37, 31), PIPELINES[name], key=key), run(image(37, 31), PIPELINES[name], key=key)
        )


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("place", range(4))
def test_other_seed_pass_id_or_view_gives_other_pixels(name: str, place: int) -> None:
    """Ten draws each: a shift of two pictures may be the same by chance."""
    different = 0
    for k in range(10):
        key = [k, 2, 3, 1]
        other = [*key[:place], key[place] + 1, *key[place + 1 :]]
        different += not np.array_equal(*(run(image(37, 31), PIPELINES[name], key=tuple(its)) for its in (key, other)))  # type: ignore[arg-type]
    assert different >= 8


def test_center_crop_of_result_size_is_the_image() -> None:
    source = image(16, 16)
    assert np.array_equal(run(source, [{"op": "center_crop"}]), np.asarray(source))


def test_center_crop_is_in_the_centre(boxes: list[tuple[float, ...]]) -> None:
    run(image(300, 200), [{"op": "center_crop"}])
    run(image(100, 200), [{"op": "center_crop", "scale": 0.5}])
    assert boxes == [(50, 0, 200, 200), (25, 75, 50, 50)]


def test_random_crops_are_squares_all_over_the_image(boxes: list[tuple[float, ...]]) -> None:
    for k in range(500):
        run(image(30, 20), [{"op": "random_crop", "scale": 0.5}], 4, (k, 0, 0, 0))
    left, top, width, height = np.array(boxes).T
    assert set(width) == set(height) == {10.0}
    assert 0 <= left.min() < 0.5
    assert 19.5 < left.max() <= 20
    assert 0 <= top.min() < 0.5
    assert 9.5 < top.max() <= 10


def test_random_shift_without_padding_is_the_center_crop() -> None:
    source = image(16, 16)
    assert np.array_equal(run(source, [{"op": "random_shift", "padding": 0}]), np.asarray(source))


def test_random_shifts_are_windows_of_the_padded_image_each_equally_often() -> None:
    source, padding, size = image(6, 6), 1, 6
    padded = np.pad(np.asarray(source), ((1, 1), (1, 1), (0, 0)))
    windows = {padded[y : y + size, x : x + size].tobytes(): (x, y) for x in range(3) for y in range(3)}
    counts = dict.fromkeys(windows.values(), 0)
    for k in range(900):
        counts[windows[run(source, [{"op": "random_shift", "padding": padding}], size, (k, 0, 0, 0)).tobytes()]] += 1
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
    draws, source = 3000, image(*size)
    for k in range(draws):
        run(source, [{"op": "random_resized_crop", "scale": scale, "ratio": ratio}], 2, (0, 0, k, 0))
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
    run(image(*size), [{"op": "random_resized_crop", "scale": (1.0, 1.0), "ratio": ratio}])
    _, _, w, h = torchvisions(*size, (1.0, 1.0), ratio, 1)[0]
    assert boxes == [((size[0] - w) / 2, (size[1] - h) / 2, w, h)]


@pytest.mark.parametrize("ratio", [(3.0, 4.0), (0.2, 0.3)])
def test_single_pixel_has_a_crop_of_any_ratio(ratio: tuple[float, float]) -> None:
    for k in range(20):
        pixels = run(
            Image.new("RGB", (1, 1), (9, 8, 7)), [{"op": "random_resized_crop", "ratio": ratio}], 4, (k, 0, 0, 0)
        )
        assert (pixels == (9, 8, 7)).all()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_share_of_flips_is_p(p: float) -> None:
    source = image(4, 4)
    flipped = np.asarray(source)[:, ::-1]
    count = 0
    for k in range(2000):
        pixels = run(source, [{"op": "center_crop"}, {"op": "horizontal_flip", "p": p}], 4, (0, 0, k, 0))
        is_flipped = np.array_equal(pixels, flipped)
        assert is_flipped or np.array_equal(pixels, np.asarray(source))
        count += is_flipped
    assert abs(count / 2000 - p) <= 4 * math.sqrt(p * (1 - p) / 2000)


def affine(degrees: float, scale: float) -> list[dict[str, Any]]:
    return [{"op": "center_crop"}, {"op": "random_affine", "degrees": degrees, "scale": scale}]


@pytest.mark.parametrize("size", [15, 16])
def test_affine_without_rotation_and_scale_is_the_image(size: int) -> None:
    source = image(size, size)
    assert np.array_equal(run(source, affine(0.0, 0.0), size), np.asarray(source))


def test_affine_rotates_about_the_centre_within_its_degrees() -> None:
    """The angle of a bright half-line from the centre, over many draws."""
    yy, xx = np.mgrid[0:65, 0:65] - 32
    source = Image.fromarray(np.where(((xx > 0) & (abs(yy) <= 1))[..., None], 255, 0).astype(np.uint8).repeat(3, 2))
    angles = []
    for k in range(100):
        pixels = run(source, affine(20.0, 0.0), 65, (k, 0, 0, 0))[..., 0].astype(float)
        angles.append(math.degrees(math.atan2((pixels * yy).sum(), (pixels * xx).sum())))
    assert max(map(abs, angles)) < 20.5
    assert min(angles) < -15
    assert max(angles) > 15


def test_affine_scales_within_its_scale_and_is_black_outside() -> None:
    source = Image.new("RGB", (65, 65), (255, 255, 255))
    sides = []
    for k in range(100):
        pixels = run(source, affine(0.0, 0.5), 65, (k, 0, 0, 0))[32, :, 0]
        sides.append(int((pixels > 0).sum()))
        assert set(pixels) <= {0, 255}
    assert 31 <= min(sides) <= 38
    assert max(sides) == 65


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3000, 2)])
def test_no_intermediate_image_is_larger_than_the_result(
    monkeypatch: pytest.MonkeyPatch, name: str, size: tuple[int, int]
) -> None:
    made = []
    real = Image.Image._new

    def record(self: Image.Image, core: Any) -> Image.Image:
        made.append(core.size)
        return real(self, core)

    source = image(*size)
    monkeypatch.setattr(Image.Image, "_new", record)
    for k in range(10):
        run(source, PIPELINES[name], 8, (k, 0, 0, 0))
    assert (8, 8) in made, "Pillow makes its images elsewhere now"
    assert max(map(max, made)) == 8


def test_ops_are_applied_in_the_order_of_the_list() -> None:
    """A flip draws before the turn here, and after it there."""
    flip, turn = {"op": "horizontal_flip", "p": 1.0}, {"op": "random_affine", "degrees": 40.0}
    first, second = (run(image(16, 16), [{"op": "center_crop"}, *ops]) for ops in ([flip, turn], [turn, flip]))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation", "hue"])
def test_color_jitter_is_torchvisions(change: str) -> None:
    source = image(24, 24, seed=3)
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    found = run(source, [{"op": "center_crop"}, {"op": "color_jitter", **off, change: 0.4}], 24)
    shares = CounterRng(derive_view_keys(0, np.array([0]), np.array([0]), 0), 1).uniform(4)[0]
    factors = {name: (name != "hue") - 0.4 + 0.8 * float(share) for name, share in zip(off, shares, strict=True)}
    adjust = getattr(torchvision.transforms.functional, f"adjust_{change}")
    difference = np.abs(found.astype(int) - np.asarray(adjust(source, factors[change])).astype(int))
    assert difference.max() <= (6 if change == "hue" else 2), "hue is rounded to 1/255 of a turn"
    assert np.abs(found.astype(int) - np.asarray(source).astype(int)).mean() > 1


def test_share_of_gray_images_is_p() -> None:
    source = image(16, 16)
    gray = [
        np.ptp(
            run(source, [{"op": "center_crop"}, {"op": "random_grayscale", "p": 0.2}], 16, (0, 0, k, 0)), axis=2
        ).max()
        == 0
        for k in range(400)
    ]
    assert 0.12 < np.mean(gray) < 0.28


@pytest.mark.parametrize("op", ["center_crop", "random_crop"])
def test_crop_of_result_size_copies_pixels(op: str) -> None:
    """29 of 32 pixels (the denoising auto-encoder's crop): between pixels it would be a blur."""
    source = image(32, 32)
    pixels, seen = np.asarray(source), set()
    for seed in range(60):
        found = run(source, [{"op": op, "scale": 0.90625}], 29, (seed, 0, 0, 0))
        places = [(y, x) for y in range(4) for x in range(4) if np.array_equal(pixels[y : y + 29, x : x + 29], found)]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) == (1 if op == "center_crop" else 16)


@pytest.mark.parametrize("name", OPS)
def test_parameters_of_an_image_do_not_depend_on_its_batch(name: str) -> None:
    """Vectorised exponentials and cosines must not depend on their neighbours, to the bit. Sizes differ in a batch."""
    rng = np.random.default_rng(0)
    ids, sizes = rng.integers(0, 10**6, 70), rng.integers(1, 400, (70, 2))
    its = derive_view_keys(3, ids % 5, ids, 1)
    (whole,) = sample_params(PIPELINES[name][-1:], its, sizes, 16)
    for rows in (slice(0, 1), slice(1, 2), slice(69, 70), slice(3, 8), slice(0, 70, 3), slice(None, None, -1)):
        (part,) = sample_params(PIPELINES[name][-1:], its[rows], sizes[rows], 16)
        assert part.kind == whole.kind
        assert np.array_equal(part.rows, whole.rows[rows])


def test_op_at_another_index_draws_other_numbers() -> None:
    ids = np.arange(4000)
    (first, second) = sample_params(
        [{"op": "horizontal_flip"}] * 2, derive_view_keys(0, ids * 0, ids, 0), np.full((4000, 2), 8), 8
    )
    assert 1800 < int((first.rows == second.rows).sum()) < 2200


def test_orders_of_color_jitter_are_equally_frequent() -> None:
    ids = np.arange(24_000)
    (drawn,) = sample_params([{"op": "color_jitter"}], derive_view_keys(0, ids * 0, ids, 0), np.full((24_000, 2), 8), 8)
    counts = np.unique(drawn.rows[:, 4:], axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("side", "size"), [(32, 28), (20, 12), (16, 16)])
def test_ten_crops_are_torchvisions(side: int, size: int) -> None:
    source = image(side, side)
    found = [run(source, list(ops), size) for ops in augment.list_ten_crops(size / side)]
    expected = [np.asarray(crop) for crop in torchvision.transforms.TenCrop(size)(source)]
    assert len(found) == 10
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_corner_crops_are_in_the_corners(boxes: list[tuple[float, ...]]) -> None:
    for corner in ("top_left", "top_right", "bottom_left", "bottom_right", "center"):
        run(image(300, 200), [{"op": "corner_crop", "corner": corner, "scale": 0.5}])
    assert [box[:2] for box in boxes] == [(0, 0), (200, 0), (0, 100), (200, 100), (100, 50)]
    assert {box[2:] for box in boxes} == {(100, 100)}
