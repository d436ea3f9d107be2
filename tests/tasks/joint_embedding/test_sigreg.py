"""The directions of SIGReg, and its test of normality."""

from functools import partial

import pytest
import torch
from torch import Tensor

from firstlight.tasks.collective import rank, select_own_rows
from firstlight.tasks.joint_embedding.sigreg import draw_directions, measure_normality
from tests.support import references_lejepa as references
from tests.support.gloo import Pool


def draw_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that are not standard normal: their mean, spread and tails differ from column to column."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=rng, dtype=torch.float64)
    return x * torch.linspace(0.2, 2.0, shape[-1]).double() + torch.linspace(-1.0, 1.0, shape[-1]).double()


@pytest.mark.parametrize(("knots", "t_max"), [(17, 3.0), (9, 5.0), (2, 1.0)])
@pytest.mark.parametrize("count", [1, 2, 13])
def test_statistic_is_the_integral_over_both_halves(count: int, knots: int, t_max: float) -> None:
    """9 points to 5 are those of algorithm 1, which has 17 from -5 to 5."""
    x = draw_numbers(count, 3)
    expected = [references.epps_pulley(column.tolist(), 2 * knots - 1, t_max) for column in x.T]
    torch.testing.assert_close(measure_normality(x, knots, t_max).tolist(), expected, rtol=1e-12, atol=1e-12)


def test_many_points_give_the_exact_integral() -> None:
    x = draw_numbers(11, 4, seed=1)
    exact = [references.exact_epps_pulley(column.tolist()) for column in x.T]
    assert measure_normality(x, 400, 12.0).tolist() == pytest.approx(exact, rel=1e-9)


def test_columns_may_have_any_shape() -> None:
    x = draw_numbers(5, 2, 3)
    found = measure_normality(x, 5, 2.0)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[1], measure_normality(x[:, 1], 5, 2.0))


def test_normal_numbers_have_a_smaller_statistic_than_others() -> None:
    rng = torch.Generator().manual_seed(0)
    others = (torch.full((500,), 0.3), torch.rand(500, generator=rng), torch.randn(500, generator=rng) * 2)
    least = float(measure_normality(torch.randn(500, generator=rng), 17, 3.0))
    assert all(float(measure_normality(x, 17, 3.0)) > 10 * least for x in others)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda x: measure_normality(x, 7, 3.0), draw_numbers(4, 3).requires_grad_())


def weigh_own_rows() -> tuple[Tensor, Tensor, int]:
    x = draw_numbers(12, 3).requires_grad_()
    found = measure_normality(select_own_rows(x), 7, 3.0)
    (found * torch.arange(1.0, 4.0)).sum().backward()
    assert x.grad is not None
    return found.detach(), x.grad, rank()


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_have_the_statistic_of_all_and_the_mean_of_their_gradients_is_its(
    pool: Pool, pool3: Pool, workers: int
) -> None:
    answers = {2: pool, 3: pool3}[workers].run(partial(weigh_own_rows))
    x = draw_numbers(12, 3).requires_grad_()
    whole = measure_normality(x, 7, 3.0)
    (whole * torch.arange(1.0, 4.0)).sum().backward()
    for found, _, _ in answers:
        torch.testing.assert_close(found, whole.detach(), rtol=1e-12, atol=1e-12)
    mean = torch.stack([gradient for _, gradient, _ in answers]).mean(0)
    torch.testing.assert_close(mean, x.grad, rtol=1e-10, atol=1e-12)


def test_directions_are_unit_vectors_of_seed_and_step_alone() -> None:
    like = torch.zeros(2, 5, dtype=torch.float64)
    first = draw_directions(3, 7, 40, like)
    assert first.shape == (5, 40)
    assert first.dtype == torch.float64
    torch.testing.assert_close(first.norm(dim=0), torch.ones(40, dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.equal(first, draw_directions(3, 7, 40, torch.zeros(9, 5, dtype=torch.float64)))
    assert torch.equal(first[:, :8], draw_directions(3, 7, 8, like)), "more directions keep the first ones"
    for other in (draw_directions(4, 7, 40, like), draw_directions(3, 8, 40, like)):
        assert ((first - other).abs().amax(0) > 1e-3).all()


def test_directions_are_uniform_on_the_sphere() -> None:
    """Checks that unit vectors in d dimensions have the mean 0 and the second moment I / d."""
    found = draw_directions(0, 0, 20_000, torch.zeros(1, 4))
    assert found.mean(1).abs().max() < 0.02
    torch.testing.assert_close(found @ found.T / 20_000, torch.eye(4) / 4, rtol=0, atol=0.01)
