import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from firstlight.tasks.counter_rng import derive_keys, draw_normal, draw_uniform

IDS = torch.arange(2000)
COUNT = 100
M64 = 2**64 - 1


def keyed(seed: int, turn: int, ids: Tensor, stream: int) -> Tensor:
    """Keys of images in the same pass."""
    return derive_keys(seed, torch.full_like(ids, turn), ids, stream)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.flatten().double(), b.flatten().double())))[0, 1])


def splitmix64(seed: int, count: int) -> list[int]:
    """SplitMix64 (Steele, Lea and Flood 2014, figure 15) in unsigned whole numbers."""
    out = []
    for k in range(1, count + 1):
        z = (seed + k * 0x9E3779B97F4A7C15) & M64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
        out.append(z ^ (z >> 31))
    return out


def test_known_answers_of_splitmix64() -> None:
    """The first numbers of seed 0 and of seed 1234567 are those of the published implementations."""
    assert splitmix64(0, 2) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("seed", [0, 1, 1234567, 2**63 - 1, -1, -(2**63)])
def test_uniform_is_splitmix64(seed: int) -> None:
    expected = [(z >> 40) / 2**24 for z in splitmix64(seed & M64, 7)]
    assert draw_uniform(torch.tensor([seed]), 7)[0].tolist() == expected


def test_uniform_moments_and_distribution() -> None:
    draws = draw_uniform(keyed(0, 0, IDS, 0), COUNT)
    assert draws.shape == (len(IDS), COUNT)
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    assert float(draws.double().mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * draws.numel()))
    assert stats.kstest(draws.flatten().double().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("position", [0, 1, COUNT - 1])
def test_uniform_over_images_at_one_position(position: int) -> None:
    draws = draw_uniform(keyed(3, 7, torch.arange(50_000), 2), position + 1)[:, position]
    assert stats.kstest(draws.double().numpy(), "uniform").pvalue > 1e-3


def test_pairs_fill_the_square() -> None:
    draws = draw_uniform(keyed(1, 0, torch.arange(40_000), 0), 3)
    for a, b in itertools.combinations(range(3), 2):
        cells = (draws[:, a] * 8).long() * 8 + (draws[:, b] * 8).long()
        assert stats.chisquare(torch.bincount(cells, minlength=64).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("count", [COUNT, COUNT + 1])
def test_normal_moments_and_distribution(count: int) -> None:
    draws = draw_normal(keyed(0, 0, IDS, 0), count).double()
    n = draws.numel()
    assert draws.shape == (len(IDS), count)
    assert torch.isfinite(draws).all()
    assert float(draws.mean()) == pytest.approx(0, abs=4 / math.sqrt(n))
    assert float(draws.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert float((draws**3).mean()) == pytest.approx(0, abs=4 * math.sqrt(15 / n))
    assert float((draws**4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / n))
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3


def test_normal_numbers_of_an_image_are_independent() -> None:
    """The numbers of one Box-Muller pair are independent too; a shared radius would show in their squares."""
    draws = draw_normal(keyed(5, 0, torch.arange(40_000), 0), 6).double()
    bound = 5 / math.sqrt(len(draws))
    for values in (draws, draws**2):
        off = torch.corrcoef(values.T) - torch.eye(6)
        assert off.abs().max() < bound


def test_the_same_key_gives_the_same_numbers() -> None:
    assert torch.equal(draw_uniform(keyed(1, 2, IDS, 3), 5), draw_uniform(keyed(1, 2, IDS, 3), 5))


def test_numbers_do_not_depend_on_the_batch_or_its_order() -> None:
    order = torch.randperm(len(IDS))
    assert torch.equal(draw_normal(keyed(1, 2, IDS, 3), 9)[order], draw_normal(keyed(1, 2, IDS[order], 3), 9))


def test_uniform_numbers_do_not_depend_on_how_many_are_drawn() -> None:
    assert torch.equal(draw_uniform(keyed(1, 2, IDS, 3), 5), draw_uniform(keyed(1, 2, IDS, 3), 50)[:, :5])


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0), (0, 2**20, 0)], ids=str)
def test_seeds_passes_and_streams_are_uncorrelated(other: tuple[int, int, int]) -> None:
    seed, turn, stream = other
    first, second = draw_uniform(keyed(0, 0, IDS, 0), COUNT), draw_uniform(keyed(seed, turn, IDS, stream), COUNT)
    assert abs(correlation(first, second)) < 4 / math.sqrt(first.numel())
    # Nor are they the same numbers at other places.
    for shift in (1, 2):
        assert abs(correlation(first[:, shift:], second[:, :-shift])) < 4 / math.sqrt(first.numel())


def test_neighbouring_images_are_uncorrelated() -> None:
    draws = draw_uniform(keyed(0, 0, IDS, 0), COUNT)
    assert abs(correlation(draws[1:], draws[:-1])) < 4 / math.sqrt(draws.numel())
    assert abs(correlation(draws[1:, :-1], draws[:-1, 1:])) < 4 / math.sqrt(draws.numel())


def test_keys_are_distinct() -> None:
    """Keys of small numbers differ in every role: seed, pass, image and stream are not exchangeable."""
    grid = [
        keyed(seed, turn, torch.arange(100), stream) for seed in range(6) for turn in range(6) for stream in range(6)
    ]
    assert len(torch.unique(torch.cat(grid))) == 6 * 6 * 6 * 100


def test_patches_depend_on_the_pass_of_each_image() -> None:
    ids, turns = torch.tensor([5, 9, 5, 700]), torch.tensor([0, 3, 4, 3])
    together = derive_keys(2, turns, ids, 1)
    assert torch.equal(together, torch.cat([keyed(2, int(t), i[None], 1) for t, i in zip(turns, ids, strict=True)]))
    assert together[0] != together[2], "the same image, later"


def test_known_keys() -> None:
    """With other keys the same seed would give another training."""
    assert keyed(3, 7, torch.tensor([0, 1, 2**40]), 2).tolist() == [
        8938794982579687820,
        -4085126290670905546,
        -906415179061467656,
    ]
