import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from firstlight.tasks.collective import (
    all_sum,
    barrier,
    broadcast_object,
    broadcast_tensor,
    compute_on_rank_zero,
    gather_objects,
    gather_over_workers,
    rank,
    select_own_rows,
    world_size,
)
from tests.support.gloo import Pool


def rows(of: int) -> Tensor:
    """The (3, 2) rows of a rank."""
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(of), dtype=torch.float64)


def loss_weights(of: int, shape: tuple[int, ...]) -> Tensor:
    """The weights of a rank's loss. They differ between ranks, so a gradient from the wrong rank shows."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + of), dtype=torch.float64)


def gather_on_this_rank(transposed: bool) -> tuple[Tensor, Tensor]:
    x = rows(rank()).T.contiguous().T if transposed else rows(rank())
    everyone = gather_over_workers(x.requires_grad_())
    (everyone * loss_weights(rank(), (6, 2))).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return everyone.detach(), x.grad


@pytest.mark.parametrize("transposed", [False, True])
def test_gather_over_workers_concatenates_with_gradient(pool: Pool, transposed: bool) -> None:
    total = loss_weights(0, (6, 2)) + loss_weights(1, (6, 2))
    for r, (everyone, gradient) in enumerate(pool.run(gather_on_this_rank, transposed)):
        assert torch.equal(everyone, torch.cat((rows(0), rows(1))))
        torch.testing.assert_close(gradient, total[3 * r : 3 * r + 3], rtol=1e-12, atol=0)


def all_sum_on_this_rank() -> tuple[Tensor, Tensor, bool]:
    x = rows(rank()).requires_grad_()
    total = all_sum(x.square())
    (total * loss_weights(rank(), (3, 2))).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return total.detach(), x.grad, torch.equal(x.detach(), rows(rank()))


def test_all_sum_adds_over_workers_with_gradient(pool: Pool) -> None:
    weights = loss_weights(0, (3, 2)) + loss_weights(1, (3, 2))
    for r, (total, gradient, untouched) in enumerate(pool.run(all_sum_on_this_rank)):
        torch.testing.assert_close(total, rows(0).square() + rows(1).square(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, 2 * rows(r) * weights, rtol=1e-12, atol=0)
        assert untouched, "the argument was overwritten"


def the_rest_on_this_rank() -> dict[str, object]:
    calls = []

    def reverse(order: Tensor, unused: Tensor) -> Tensor:
        calls.append(rank())
        return order.flip(0)

    barrier()
    return {
        "place": (rank(), world_size()),
        "mine": select_own_rows(torch.arange(8).view(4, 2)).tolist(),
        "from zero": compute_on_rank_zero(reverse, torch.arange(4) + 10 * rank(), torch.zeros(1)).tolist(),
        "calls": calls,
        "broadcast 0": broadcast_object({"rank": rank()}),
        "broadcast 1": broadcast_object({"rank": rank()}, source=1),
        "gathered": gather_objects(("from", rank(), "x" * rank() * 100)),
    }


def test_remaining_collectives_on_two_workers(pool: Pool) -> None:
    for r, found in enumerate(pool.run(the_rest_on_this_rank)):
        assert found == {
            "place": (r, 2),
            "mine": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]][r],
            "from zero": [3, 2, 1, 0],
            "calls": [0] if r == 0 else [],
            "broadcast 0": {"rank": 0},
            "broadcast 1": {"rank": 1},
            "gathered": [("from", 0, ""), ("from", 1, "x" * 100)],
        }


def test_collectives_are_the_identity_on_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_gather", "all_reduce", "broadcast", "broadcast_object_list", "all_gather_object", "barrier"):
        monkeypatch.setattr(dist, name, lambda *a, **k: pytest.fail("a collective was called"))
    x, value = rows(0), {"a": 1}
    barrier()
    assert (rank(), world_size()) == (0, 1)
    assert gather_over_workers(x) is x
    assert all_sum(x) is x
    assert torch.equal(select_own_rows(x), x)
    assert compute_on_rank_zero(lambda a: a, x) is x
    assert broadcast_object(value) is value
    assert gather_objects(value) == [value]


def broadcast_from_rank_zero() -> Tensor:
    value = rows(0).T if rank() == 0 else None
    return broadcast_tensor(value, torch.device("cpu"))


def test_tensor_of_rank_zero_is_on_every_rank(pool: Pool) -> None:
    for found in pool.run(broadcast_from_rank_zero):
        assert found.dtype == torch.float64
        assert torch.equal(found, rows(0).T)
    assert torch.equal(broadcast_tensor(rows(1), torch.device("cpu")), rows(1))
