from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from firstlight.tasks import assignment
from firstlight.tasks.collective import rank
from firstlight.tasks.pretrain import metric_plots
from firstlight.tasks.pretrain.method import TrainingInfo
from firstlight.tasks.pretrain.nat import (
    TARGET_CHUNK,
    NoiseAsTargets,
    sphere_targets,
    target_square_loss,
)
from tests.support import gradient_cache, references
from tests.support.batches import batch_of_images, image_batch, number_otherwise, unit_rows
from tests.support.gloo import Pool
from tests.support.learners import build_method
from tests.support.two_workers import assert_workers_equal_one, take_steps

batch = partial(image_batch, ids=number_otherwise)

SMALL_HEAD: dict[str, Any] = {"dim": 6, "hidden": (), "pool": "avg"}


def method(size: int = 96, dtype: torch.dtype = torch.float32, norm: str = "group", **options: Any) -> NoiseAsTargets:
    info = TrainingInfo(size=size, epochs=3, seed=7)
    settings = {**SMALL_HEAD, "norm": norm, **options}
    return build_method(NoiseAsTargets, info, {"norm": norm}, dtype=dtype, **settings)


def test_the_paper_loss_is_equation_2() -> None:
    features, targets = unit_rows(17, 5, 0), unit_rows(17, 5, 1)
    assert float(target_square_loss(features, targets, "paper")) == pytest.approx(
        references.nat_loss(features, targets), rel=1e-12
    )


def test_the_reference_loss_is_2n_times_larger() -> None:
    features, targets = unit_rows(17, 5, 0), unit_rows(17, 5, 1)
    assert float(target_square_loss(features, targets, "reference")) == pytest.approx(
        2 * 17 * references.nat_loss(features, targets), rel=1e-12
    )


@pytest.mark.parametrize("reduction", ["paper", "reference"])
def test_gradcheck(reduction: str) -> None:
    raw, targets = unit_rows(4, 3, 0).requires_grad_(), unit_rows(4, 3, 1)

    def loss(x: Tensor) -> Tensor:
        return target_square_loss(F.normalize(x, dim=1), targets, reduction)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, (raw,))


def test_targets_are_unit_vectors_and_independent_of_what_is_asked_together() -> None:
    indices = torch.tensor([0, 5, TARGET_CHUNK - 1, TARGET_CHUNK, 2 * TARGET_CHUNK + 3])
    together = sphere_targets(indices, 16, 3)
    assert torch.allclose(together.norm(dim=1), torch.ones(5), atol=1e-6)
    for row, index in zip(together, indices, strict=True):
        assert torch.equal(row, sphere_targets(index[None], 16, 3)[0])
    assert not torch.equal(together, sphere_targets(indices, 16, 4))


def test_targets_are_uniform_on_the_sphere() -> None:
    targets = sphere_targets(torch.arange(20_000), 4, 0)
    assert targets.mean(0).abs().max() < 0.02
    assert torch.allclose(targets.T @ targets / len(targets), torch.eye(4) / 4, atol=0.01)


def test_one_hot_targets_are_balanced_basis_vectors() -> None:
    learner = method(size=12, targets="one_hot")
    rows = learner._read_targets(torch.arange(12))
    assert torch.equal(rows.sum(0), torch.full((6,), 2.0))
    assert torch.equal(rows.sum(1), torch.ones(12))


@given(st.integers(1, 3), st.integers(0, 1000), st.sampled_from(["exact", "sparse"]))
def test_table_is_always_a_permutation(period: int, seed: int, solver: str) -> None:
    learner = method(size=40, permutation_period=period, dim=8, solver=solver)
    rng = torch.Generator().manual_seed(seed)
    for epoch in range(3):
        learner.begin_epoch(epoch)
        for ids in torch.randperm(40, generator=rng)[:36].split(12):
            before = learner.tables["assignment"].values.clone()
            learner(batch(ids))
            assert torch.equal(learner.tables["assignment"].values, before), (
                "a step reads the table as it was before the step"
            )
            learner.end_step()
            after = learner.tables["assignment"].values
            assert sorted(after.tolist()) == list(range(40))
            assert set(after[ids].tolist()) == set(before[ids].tolist())
            if epoch % period:
                assert torch.equal(after, before)


def test_exchange_of_targets_lowers_the_loss() -> None:
    learner = method()
    learner.begin_epoch(1)
    kept = learner(batch(torch.arange(32)))["loss"]
    learner.begin_epoch(3)
    exchanged = learner(batch(torch.arange(32)))
    assert exchanged["loss"] < kept
    assert exchanged["moved"] > 0.5


@pytest.mark.parametrize("period", [1, 2])
def test_changed_is_the_share_of_images_of_the_last_exchanging_epoch(period: int) -> None:
    learner, shares = method(size=40, permutation_period=period), []
    for epoch in range(4):
        before = learner.tables["assignment"].values.clone()
        for k, ids in enumerate(torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).split(10)):
            if k in (0, 2):  # an epoch that is resumed begins twice
                learner.begin_epoch(epoch)
            changed = float(learner(batch(ids))["changed"])
            learner.end_step()
        wanted = float((learner.tables["assignment"].values != before).float().mean())
        shares.append((changed, wanted))
        if epoch % period == 0:
            assert changed == pytest.approx(wanted)
            assert wanted > 0
        else:
            assert (wanted, changed) == (0.0, pytest.approx(shares[epoch - 1][0])), "as the period began"
    (plot,) = metric_plots("nat", 4, {"permutation_period": period})
    assert (plot.numbers, plot.every) == (("changed",), period)


def changed_on_this_rank(assign: str) -> float:
    learner = method(size=40, norm="group", assign=assign)
    learner.begin_epoch(0)
    return float(learner(batch(torch.arange(20) + 20 * rank()))["changed"])


def test_changed_is_the_share_of_all_workers(pool: Pool) -> None:
    alone = method(size=40, norm="group")
    alone.begin_epoch(0)
    assert (
        pool.run(changed_on_this_rank, "global")
        == [pytest.approx(float(alone(batch(torch.arange(40)))["changed"]))] * 2
    )
    one, other = pool.run(changed_on_this_rank, "local")
    assert one == other


def test_loss_does_not_depend_on_the_order_of_the_batch() -> None:
    learner = method(dtype=torch.float64)
    ids, order = torch.arange(32), torch.randperm(32)
    first = learner(batch(ids, dtype=torch.float64))["loss"]
    learner.tables["assignment"]._pending.clear()
    assert float(learner(batch(ids[order], dtype=torch.float64))["loss"].detach()) == pytest.approx(
        float(first.detach()), rel=1e-7
    )


@pytest.mark.fault(35, "an id twice in a batch")
def test_repeated_row_in_a_batch_raises() -> None:
    with pytest.raises(ValueError, match=r"twice .* \[3\]"):
        method()(batch(torch.tensor([1, 3, 3])))


@pytest.mark.fault(38, "zeros, equal images, huge values: Noise As Targets")
@pytest.mark.parametrize("images", ["constant", "equal"])
def test_constant_and_equal_images_have_finite_losses(images: str) -> None:
    learner = method()
    pixels = torch.zeros(16, 3, 8, 8) if images == "constant" else torch.rand(1, 3, 8, 8).expand(16, -1, -1, -1)
    losses = learner(batch_of_images(pixels))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert all(torch.isfinite(p.grad).all() for p in learner.parameters() if p.grad is not None)


def test_batch_embedded_in_parts_has_loss_and_table_of_whole() -> None:
    whole, parted, b = (
        method(dtype=torch.float64),
        method(dtype=torch.float64),
        batch(torch.arange(48), dtype=torch.float64),
    )
    gradient_cache.assert_parts_equal_whole(whole, parted, b, 16)
    whole.end_step()
    parted.end_step()
    assert torch.equal(whole.tables["assignment"].values, parted.tables["assignment"].values)


@pytest.mark.parametrize("norm", ["group", "sync"])
@pytest.mark.parametrize("reduction", ["paper", "reference"])
@pytest.mark.parametrize(("workers", "size"), [("pool", 64), ("pool3", 48)])
def test_workers_equal_one(request: pytest.FixtureRequest, workers: str, size: int, reduction: str, norm: str) -> None:
    pool: Pool = request.getfixturevalue(workers)
    build = partial(
        build_method,
        NoiseAsTargets,
        TrainingInfo(size=96, epochs=3, seed=7),
        {"norm": norm},
        dtype=torch.float64,
        **SMALL_HEAD,
        norm=norm,
        reduction=reduction,
    )
    assert_workers_equal_one(pool, build, batch(torch.arange(size), dtype=torch.float64))


@pytest.mark.parametrize(("workers", "size"), [("pool", 64), ("pool3", 48)])
def test_workers_equal_one_with_the_sparse_solver(request: pytest.FixtureRequest, workers: str, size: int) -> None:
    pool: Pool = request.getfixturevalue(workers)
    info, options = TrainingInfo(size=96, epochs=3, seed=7), {**SMALL_HEAD, "dim": 8, "norm": "sync"}
    build = partial(
        build_method, NoiseAsTargets, info, {"norm": "sync"}, dtype=torch.float64, **options, solver="sparse"
    )
    assert_workers_equal_one(pool, build, batch(torch.arange(size), dtype=torch.float64))


@pytest.mark.parametrize("bounded", [True, False])
def test_sparse_solver_exchanges_nearly_as_well_as_the_exact_one(
    monkeypatch: pytest.MonkeyPatch, bounded: bool
) -> None:
    """The solver without its bound, with one candidate for each image, is worse: it is the one that was asked for."""
    rows = torch.arange(96)
    losses = {}
    if not bounded:
        monkeypatch.setattr(assignment, "SPARSE_TOLERANCE", 1e9)
        monkeypatch.setattr(assignment, "NUM_CANDIDATES", 1)
    for solver in ("exact", "sparse"):
        learner = method(dim=8, solver=solver)
        learner.begin_epoch(0)
        losses[solver] = float(learner(batch(rows))["loss"].detach())
    learner.begin_epoch(1)
    kept = float(learner(batch(rows))["loss"].detach())
    lost = (losses["sparse"] - losses["exact"]) / (kept - losses["exact"])
    assert 0 <= lost < 0.05 if bounded else 0.1 < lost <= 1


def test_local_assignment_on_two_workers_keeps_the_permutation(pool: Pool) -> None:
    build = partial(
        build_method,
        NoiseAsTargets,
        TrainingInfo(size=96, epochs=3, seed=7),
        {"norm": "group"},
        dtype=torch.float64,
        **SMALL_HEAD,
        norm="group",
        assign="local",
    )
    for result in pool.run(take_steps, build, [batch(torch.arange(64), dtype=torch.float64)]):
        assert sorted(result.tables["assignment"].tolist()) == list(range(96))


@pytest.mark.fault(39, "an assignment of NaN")
@pytest.mark.parametrize("solver", ["exact", "sparse"])
def test_nonfinite_features_reach_the_loss(solver: str) -> None:
    """The loop checks the loss on all workers; an error of the solver on one of them would count as a crash."""
    learner = method(dim=8, solver=solver)
    with torch.no_grad():
        learner.head.layers[-1].weight.fill_(float("nan"))
    assert torch.isnan(learner(batch(torch.arange(16)))["loss"])


def test_sparse_solver_needs_some_dimensions() -> None:
    with pytest.raises(ValueError, match=r"^solver: 'sparse' is not valid with dim: 6; valid: exact, or dim: 8"):
        method(solver="sparse")
