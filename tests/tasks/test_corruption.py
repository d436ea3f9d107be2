import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from firstlight.tasks.corruption import (
    LEVEL_STREAM,
    NOISE_STREAM,
    Corruption,
    add_patch_noise,
    add_pixel_noise,
    big_block_sides,
    draw_noise_levels,
    draw_squares,
    mask_squares,
    small_block_count,
    small_block_side,
    split_patches,
)
from firstlight.tasks.counter_rng import derive_keys
from tests.support import references


def some_keys(count: int, turn: int = 0) -> torch.Tensor:
    return derive_keys(0, torch.full((count,), turn), torch.arange(count), 1)


def images(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_noise_levels_are_uniform_between_their_bounds() -> None:
    levels = draw_noise_levels(some_keys(50_000), 10 / 255, 50 / 255)
    assert levels.shape == (50_000,)
    assert stats.kstest(levels.numpy(), stats.uniform(10 / 255, 40 / 255).cdf).pvalue > 1e-3
    assert torch.equal(draw_noise_levels(some_keys(5), 0.1, 0.1), torch.full((5,), 0.1))


def test_pixel_noise_has_the_level_of_its_image_in_every_channel() -> None:
    clean, levels = images(4, 64), torch.tensor([0.0, 0.05, 0.1, 0.2])
    noise = add_pixel_noise(clean, levels, some_keys(4)) - clean
    assert noise[0].abs().max() == 0
    for image, level in zip(noise[1:], levels[1:], strict=True):
        for channel in image:
            assert float(channel.std()) == pytest.approx(float(level), rel=0.05)
        assert stats.kstest(image.flatten().numpy(), stats.norm(0, float(level)).cdf).pvalue > 1e-3
        assert torch.corrcoef(image.flatten(1))[0, 1].abs() < 5 / 64, "channels have noise of their own"
        neighbours = torch.stack((image[:, :, 1:].flatten(), image[:, :, :-1].flatten()))
        assert torch.corrcoef(neighbours)[0, 1].abs() < 5 / (64 * math.sqrt(3)), "so have neighbouring pixels"


def test_noise_is_not_clipped() -> None:
    noisy = add_pixel_noise(torch.zeros(8, 3, 16, 16), torch.full((8,), 0.2), some_keys(8))
    assert float(noisy.mean()) == pytest.approx(0, abs=0.01)
    assert float(noisy.min()) < -0.4


@pytest.mark.parametrize(("size", "patch"), [(8, 4), (29, 4), (5, 7), (9, 1), (6, 3)])
def test_pixels_of_a_patch_share_their_noise(size: int, patch: int) -> None:
    clean, levels = images(3, size).double(), torch.tensor([0.1, 0.2, 0.3])
    noise = add_patch_noise(clean, levels, some_keys(3), patch) - clean
    assert noise.shape == clean.shape
    for image in noise:
        for channel in image:
            cells = [
                channel[y : y + patch, x : x + patch] for y in range(0, size, patch) for x in range(0, size, patch)
            ]
            assert all(float(cell.max() - cell.min()) < 1e-7 for cell in cells)
            values = [round(float(cell[0, 0]), 7) for cell in cells]
            assert len(set(values)) == len(values), "regions have noise of their own"


def test_patch_noise_has_the_level_of_its_image() -> None:
    clean, levels = torch.zeros(2, 3, 128, 128), torch.tensor([0.1, 0.2])
    noise = add_patch_noise(clean, levels, some_keys(2), 4)
    assert noise.flatten(1).std(1).tolist() == pytest.approx([0.1, 0.2], rel=0.05)


@given(st.integers(1, 40), st.integers(1, 6), st.data())
def test_squares_are_inside_the_image_and_their_sides_between_the_bounds(
    size: int, count: int, data: st.DataObject
) -> None:
    low = data.draw(st.integers(1, size))
    high = data.draw(st.integers(low, size))
    side, top, left = draw_squares(some_keys(50), count, (low, high), size)
    assert side.shape == top.shape == left.shape == (50, count)
    assert side.min() >= low
    assert side.max() <= high
    for start in (top, left):
        assert start.min() >= 0
        assert (start + side).max() <= size


def test_sides_and_places_are_uniform() -> None:
    side, top, left = draw_squares(some_keys(20_000), 1, (8, 14), 29)
    assert stats.chisquare(torch.bincount(side.flatten() - 8, minlength=7).numpy()).pvalue > 1e-3
    for start in (top, left):
        assert stats.chisquare(torch.bincount(start[side == 8], minlength=22).numpy()).pvalue > 1e-3
    together = torch.corrcoef(torch.stack((side, top / (30.0 - side), left / (30.0 - side))).flatten(1).double())
    assert (together - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize("count", [1, 21, 35])
@pytest.mark.parametrize(("size", "sides"), [(29, (8, 14)), (32, (4, 4)), (7, (1, 7))])
def test_mask_of_squares_equals_a_loop(size: int, sides: tuple[int, int], count: int) -> None:
    clean = images(6, size)
    squares = draw_squares(some_keys(6), count, sides, size)
    mean = torch.tensor([0.5, 0.4, 0.3])
    blocked = torch.where(mask_squares(*squares, size), mean.view(1, 3, 1, 1), clean)
    for k in range(6):
        own = list(zip(*(part[k].tolist() for part in squares), strict=True))
        assert torch.equal(blocked[k], references.dae_blocked(clean[k], own, mean.tolist()))


def test_block_sides_of_the_papers_images() -> None:
    """The sides of supplement A for the crops of section 3.4."""
    assert [big_block_sides(size) for size in (29, 89, 225, 32)] == [(8, 14), (23, 44), (57, 112), (8, 16)]
    assert [small_block_side(size) for size in (29, 89, 225, 32)] == [4, 11, 28, 4]


@given(st.integers(1, 2048))
def test_block_sides_fit_any_image(size: int) -> None:
    low, high = big_block_sides(size)
    assert 1 <= low <= high <= size
    assert 1 <= small_block_side(size) <= size
    assert size < 4 or size / 4 <= low <= high <= size / 2
    assert size < 8 or abs(small_block_side(size) - size / 8) <= 0.5


def test_number_of_small_blocks() -> None:
    assert [small_block_count(n) for n in (1, 50_000, 99_999, 100_000, 1_300_000)] == [21, 21, 21, 35, 35]


def test_other_epoch_draws_other_numbers() -> None:
    first, second = (draw_squares(some_keys(200, turn), 1, (8, 14), 29) for turn in (0, 1))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert float((first[1] == second[1]).float().mean()) < 0.2


def test_corruption_is_the_function_of_its_kind_on_streams_of_their_own() -> None:
    clean, ids, passes, mean = images(4, 16), torch.arange(4) + 9, torch.full((4,), 3), torch.full((1, 3, 1, 1), 0.25)
    levels, noise = (derive_keys(5, passes, ids, stream) for stream in (LEVEL_STREAM, NOISE_STREAM))
    sigma = draw_noise_levels(levels, 10 / 255, 50 / 255)
    squares = {
        "big_block": draw_squares(noise, 1, big_block_sides(16), 16),
        "small_blocks": draw_squares(noise, 6, (small_block_side(16),) * 2, 16),
    }
    expected = {
        "pixel_gaussian": add_pixel_noise(clean, sigma, noise),
        "patch_gaussian": add_patch_noise(clean, sigma, noise, 3),
        **{kind: torch.where(mask_squares(*its, 16), mean, clean) for kind, its in squares.items()},
    }
    for kind, wanted in expected.items():
        found = Corruption(kind, (10.0, 50.0), 3, 6, 5).apply_to(clean, ids, passes, mean)  # type: ignore[arg-type]
        assert torch.equal(found, wanted), kind


@pytest.mark.parametrize(("count", "share", "kept"), [(64, 0.75, 16), (196, 0.75, 49), (11, 0.75, 2), (9, 0.5, 4)])
def test_each_patch_is_visible_or_masked(count: int, share: float, kept: int) -> None:
    visible, masked = split_patches(some_keys(30), count, share)
    assert visible.shape == (30, kept)
    assert torch.equal(torch.cat((visible, masked), 1).sort().values, torch.arange(count).expand(30, -1))


def test_patches_are_masked_equally_often_and_independently_of_each_other() -> None:
    visible, _ = split_patches(some_keys(20_000), 12, 0.75)
    shown = torch.zeros(20_000, 12).scatter(1, visible, 1.0)
    torch.testing.assert_close(shown.mean(0), torch.full((12,), 0.25), rtol=0, atol=0.015)
    # Two given patches of 12, of which 3 are visible, are visible together with 3/12 * 2/11.
    together = shown.T @ shown / 20_000
    off_diagonal = together[~torch.eye(12, dtype=torch.bool)]
    torch.testing.assert_close(off_diagonal, torch.full_like(off_diagonal, 6 / 132), rtol=0, atol=0.01)


def test_split_of_an_image_does_not_depend_on_its_batch() -> None:
    together, alone = split_patches(some_keys(9), 16, 0.5), split_patches(some_keys(9)[4:5], 16, 0.5)
    assert all(torch.equal(a[4:5], b) for a, b in zip(together, alone, strict=True))
