import math
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.stats import chisquare

from firstlight.pipeline.data.augment import ops as module
from firstlight.pipeline.data.augment.ops import CROP_OPS, OPS, apply_batch, apply_params, sample_params
from firstlight.pipeline.data.augment.random_numbers import CounterRng, derive_view_keys
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from tests.support.augmentations import CHOSEN, make_image, run_ops
from tests.support.compiled_views import use_compiled_ops

SIZES = [(1, 1), (1, 500), (500, 1), (37, 11), (300, 200)]
PIPELINES: dict[str, list[dict[str, Any]]] = {
    name: [
        *([] if name in CROP_OPS else [{"op": "center_crop"}]),
        {"op": name, **CHOSEN.get(name, {}), **({"p": 1.0} if "p" in signature(OPS[name]).parameters else {})},
    ]
    for name in OPS
}
FIXED = {
    *("center_crop", "corner_crop", "fit", "window_crop", "horizontal_flip", "vertical_flip", "random_grayscale"),
    *("solarize", "posterize", "equalize", "autocontrast", "sharpness"),
}
RANDOM = sorted(OPS.keys() - FIXED)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_any_image_becomes_square_rgb_and_is_not_modified(name: str, size: tuple[int, int]) -> None:
    source = make_image(*size)
    before = source.tobytes()
    for seed in range(5):
        for out in (7, 32):
            pixels = run_ops(source, PIPELINES[name], out, (seed, 0, 0, 0))
            assert pixels.shape == (out, out, 3)
            assert pixels.dtype == np.uint8
    assert source.tobytes() == before


@pytest.mark.parametrize("name", OPS)
def test_equal_keys_give_equal_pixels(name: str) -> None:
    for key in ((0, 0, 0, 0), (5, 3, 1_281_167, 1)):
        assert np.array_equal(
            run_ops(make_image(37, 31), PIPELINES[name], key=key), run_ops(make_image(37, 31), PIPELINES[name], key=key)
        )


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("place", range(4))
def test_other_seed_pass_id_or_view_gives_other_pixels(name: str, place: int) -> None:
    """Ten draws each: a shift of two pictures may be the same by chance."""
    different = 0
    for k in range(10):
        key = [k, 2, 3, 1]
        other = [*key[:place], key[place] + 1, *key[place + 1 :]]
        different += not np.array_equal(
            *(run_ops(make_image(37, 31), PIPELINES[name], key=tuple(its)) for its in (key, other))
        )  # type: ignore[arg-type]
    assert different >= 8


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("op", "axis"), [("horizontal_flip", 1), ("vertical_flip", 0)])
def test_share_of_flips_is_p(op: str, axis: int, p: float) -> None:
    source = make_image(4, 4)
    flipped = np.flip(np.asarray(source), axis)
    count = 0
    for k in range(2000):
        pixels = run_ops(source, [{"op": "center_crop"}, {"op": op, "p": p}], 4, (0, 0, k, 0))
        is_flipped = np.array_equal(pixels, flipped)
        assert is_flipped or np.array_equal(pixels, np.asarray(source))
        count += is_flipped
    assert abs(count / 2000 - p) <= 4 * math.sqrt(p * (1 - p) / 2000)


def affine(degrees: float, scale: float) -> list[dict[str, Any]]:
    return [{"op": "center_crop"}, {"op": "random_affine", "degrees": degrees, "scale": scale}]


@pytest.mark.parametrize("size", [15, 16])
def test_affine_without_rotation_and_scale_is_the_image(size: int) -> None:
    source = make_image(size, size)
    assert np.array_equal(run_ops(source, affine(0.0, 0.0), size), np.asarray(source))


def test_affine_rotates_about_the_centre_within_its_degrees() -> None:
    """The angle of a bright half-line from the centre, over many draws."""
    yy, xx = np.mgrid[0:65, 0:65] - 32
    source = Image.fromarray(np.where(((xx > 0) & (abs(yy) <= 1))[..., None], 255, 0).astype(np.uint8).repeat(3, 2))
    angles = []
    for k in range(100):
        pixels = run_ops(source, affine(20.0, 0.0), 65, (k, 0, 0, 0))[..., 0].astype(float)
        angles.append(math.degrees(math.atan2((pixels * yy).sum(), (pixels * xx).sum())))
    assert max(map(abs, angles)) < 20.5
    assert min(angles) < -15
    assert max(angles) > 15


def test_affine_scales_within_its_scale_and_is_black_outside() -> None:
    source = Image.new("RGB", (65, 65), (255, 255, 255))
    sides = []
    for k in range(100):
        pixels = run_ops(source, affine(0.0, 0.5), 65, (k, 0, 0, 0))[32, :, 0]
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

    source = make_image(*size)
    monkeypatch.setattr(Image.Image, "_new", record)
    for k in range(10):
        run_ops(source, PIPELINES[name], 8, (k, 0, 0, 0))
    assert (8, 8) in made, "Pillow makes its images elsewhere now"
    assert max(map(max, made)) == 8


def test_ops_are_applied_in_the_order_of_the_list() -> None:
    """A flip draws before the turn here, and after it there."""
    flip, turn = {"op": "horizontal_flip", "p": 1.0}, {"op": "random_affine", "degrees": 40.0}
    first, second = (run_ops(make_image(16, 16), [{"op": "center_crop"}, *ops]) for ops in ([flip, turn], [turn, flip]))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation", "hue"])
def test_color_jitter_is_torchvisions(change: str) -> None:
    source = make_image(24, 24, seed=3)
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    found = run_ops(source, [{"op": "center_crop"}, {"op": "color_jitter", **off, change: 0.4}], 24)
    shares = CounterRng(derive_view_keys(0, np.array([0]), np.array([0]), 0), 1).uniform(4)[0]
    factors = {name: (name != "hue") - 0.4 + 0.8 * float(share) for name, share in zip(off, shares, strict=True)}
    adjust = getattr(torchvision.transforms.functional, f"adjust_{change}")
    difference = np.abs(found.astype(int) - np.asarray(adjust(source, factors[change])).astype(int))
    assert difference.max() <= (6 if change == "hue" else 2), "hue is rounded to 1/255 of a turn"
    assert np.abs(found.astype(int) - np.asarray(source).astype(int)).mean() > 1


def test_probability_of_jitter_leaves_the_changes_as_they_are() -> None:
    """Images are the same or changed as without it; the numbers of a jitter without it are the first five."""
    ids, sizes = np.arange(2000), np.full((2000, 2), 8)
    keys = derive_view_keys(0, ids * 0, ids, 0)
    (always,), (often,) = (
        sample_params([{"op": "color_jitter", **chosen}], keys, sizes, 8) for chosen in ({}, {"p": 0.8})
    )
    shares = CounterRng(keys, 0).uniform(5)
    assert np.allclose(always.rows[:, :4], np.array((1, 1, 1, 0)) + (2 * shares[:, :4] - 1) * (0.4, 0.4, 0.4, 0.1))
    assert np.array_equal(often.rows[:, 4:], always.rows[:, 4:])
    changed = (often.rows == always.rows).all(1)
    assert np.array_equal(often.rows[~changed, :4], np.tile((1.0, 1.0, 1.0, 0.0), (int((~changed).sum()), 1)))
    assert 0.76 < changed.mean() < 0.84
    for source, row in zip((make_image(9, 9, seed=k) for k in range(5)), often.rows[~changed], strict=False):
        assert np.array_equal(np.asarray(often.kind(*row).apply_to(source, 9)), np.asarray(source))


def test_share_of_gray_images_is_p() -> None:
    source = make_image(16, 16)
    gray = [
        np.ptp(
            run_ops(source, [{"op": "center_crop"}, {"op": "random_grayscale", "p": 0.2}], 16, (0, 0, k, 0)), axis=2
        ).max()
        == 0
        for k in range(400)
    ]
    assert 0.12 < np.mean(gray) < 0.28


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


@pytest.mark.parametrize("is_compiled", [False, True])
def test_views_come_in_the_order_of_their_images_whatever_makes_them(
    monkeypatch: pytest.MonkeyPatch, is_compiled: bool
) -> None:
    """The third image is larger than those that compiled ops copy, the fourth has its channels as they are."""
    monkeypatch.setattr(module, "MAX_COMPILED_PIXELS", 2500)
    levels = np.random.default_rng(0).integers(0, 65536, (40, 30, 2)).astype(np.uint16)
    images = [make_image(40, 30), make_image(50, 50), make_image(51, 50), ChannelImage(levels), make_image(9, 70)]
    ids, sizes = np.arange(5), np.array([image.size for image in images])
    ops = sample_params(
        [{"op": "random_resized_crop"}, {"op": "horizontal_flip"}], derive_view_keys(0, ids, ids, 0), sizes, 16
    )
    expected = [apply_params(image, [op.params_per_image()[k] for op in ops], 16) for k, image in enumerate(images)]
    made = 0

    def count(image: Image.Image | ChannelImage, *others: Any) -> np.ndarray:
        nonlocal made
        made += 1
        return apply_params(image, *others)

    monkeypatch.setattr(module, "apply_params", count)
    with use_compiled_ops(is_compiled):
        found = list(apply_batch(images, ops, 16))
    assert made == (2 if is_compiled else 5)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
