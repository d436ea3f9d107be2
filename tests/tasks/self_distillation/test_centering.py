"""Centres and balanced assignments: against naive versions, and the same for any number of workers."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.tasks.collective import rank, world_size
from firstlight.tasks.self_distillation.centering import Center, balance_assignments, sharpen_centred
from tests.support import references_dino
from tests.support.gloo import Pool

WORKERS = pytest.mark.parametrize("workers", ["pool", "pool3"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own_part(x: Tensor) -> Tensor:
    size = len(x) // world_size()
    return x[rank() * size : (rank() + 1) * size]


def test_centre_is_a_running_mean_that_takes_a_batch_in_at_the_end_of_the_step() -> None:
    center, first, second = Center(4, 0.9).double(), draw(6, 2, 4), draw(6, 2, 4, seed=1)
    center.observe(first)
    assert not center.value.any()
    center.commit()
    center.observe(second)
    center.commit()
    center.commit()
    torch.testing.assert_close(center.value, 0.9 * 0.1 * first.mean((0, 1)) + 0.1 * second.mean((0, 1)))


def test_centre_is_lightlys() -> None:
    theirs = pytest.importorskip("lightly.models.modules.center").Center(size=(1, 4), momentum=0.9)
    theirs.center = theirs.center.double()
    ours = Center(4, 0.9).double()
    for seed in range(3):
        batch = draw(6, 4, seed=seed)
        ours.observe(batch)
        ours.commit()
        theirs.update(batch)
    torch.testing.assert_close(ours.value[None], theirs.value)


def test_centre_counts_only_rows_with_a_weight() -> None:
    center, logits = Center(3, 0.5).double(), draw(4, 5, 3)
    counted = draw(4, 5, seed=2) > 0
    center.observe(logits, counted)
    center.commit()
    torch.testing.assert_close(center.value, 0.5 * logits[counted].mean(0))
    before = center.value.clone()
    center.observe(logits, torch.zeros(4, 5, dtype=torch.bool))
    center.commit()
    torch.testing.assert_close(center.value, before)


def test_centre_is_in_the_state_of_its_module() -> None:
    center = Center(3, 0.5)
    center.observe(torch.rand(4, 3))
    center.commit()
    other = Center(3, 0.5)
    other.load_state_dict(center.state_dict())
    assert torch.equal(other.value, center.value)
    assert center.value.any()


def test_targets_are_the_softmax_of_centred_logits() -> None:
    logits, center = draw(2, 3), draw(3, seed=1)
    found = sharpen_centred(logits, center, 0.5)
    for row, wanted in zip(found, logits, strict=True):
        naive = references_dino.softmax([float(x - c) / 0.5 for x, c in zip(wanted, center, strict=True)])
        assert row.tolist() == pytest.approx(naive)


@pytest.mark.parametrize(("images", "prototypes"), [(2, 2), (6, 3), (5, 11)])
def test_balanced_assignments_are_those_of_the_paper(images: int, prototypes: int) -> None:
    logits = draw(images, prototypes)
    found = balance_assignments(logits, 0.3)
    wanted = torch.tensor(references_dino.sinkhorn_knopp(logits, 0.3), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_balanced_assignments_use_all_prototypes_alike() -> None:
    """A softmax gives all images the prototype that all prefer; the balanced assignments do not."""
    logits = draw(12, 4)
    logits[:, 2] += 3.0
    found = balance_assignments(logits, 0.5, iterations=50)
    torch.testing.assert_close(found.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(found.sum(0), torch.full((4,), 3.0, dtype=torch.float64))
    assert float((logits / 0.5).softmax(1).sum(0)[2]) > 10.0


def test_images_that_do_not_count_change_no_assignment() -> None:
    logits, counted = draw(9, 4), torch.tensor([True, False, True] * 3)
    found = balance_assignments(logits, 0.3, counted)
    torch.testing.assert_close(found[counted], balance_assignments(logits[counted], 0.3))
    none = balance_assignments(logits, 0.3, torch.zeros(9, dtype=torch.bool))
    assert torch.isfinite(none).all()


def test_huge_logits_are_finite() -> None:
    found = balance_assignments(1e4 * torch.randn(6, 3), 0.04)
    assert torch.isfinite(found).all()


def balance_own_part(logits: Tensor, counted: Tensor | None) -> Tensor:
    return balance_assignments(own_part(logits), 0.3, None if counted is None else own_part(counted))


def center_own_part(batches: list[Tensor], counted: Tensor) -> Tensor:
    center = Center(4, 0.9).double()
    for batch in batches:
        center.observe(own_part(batch), own_part(counted))
        center.commit()
    return center.value


@WORKERS
@pytest.mark.parametrize("part", ["all", "some", "none on one worker"])
def test_workers_balance_the_global_batch(workers: str, part: str, request: pytest.FixtureRequest) -> None:
    pool: Pool = request.getfixturevalue(workers)
    logits, counted = draw(12, 4), torch.arange(12) % 3 > 0
    counted = counted & (torch.arange(12) >= 6) if part == "none on one worker" else counted
    mask = None if part == "all" else counted
    found: list[Any] = pool.run(partial(balance_own_part, logits, mask))
    rows = slice(None) if mask is None else mask
    torch.testing.assert_close(torch.cat(found)[rows], balance_assignments(logits, 0.3, mask)[rows])


@WORKERS
def test_workers_have_the_centre_of_the_global_batch(workers: str, request: pytest.FixtureRequest) -> None:
    pool: Pool = request.getfixturevalue(workers)
    batches, counted = [draw(12, 4, seed=seed) for seed in range(3)], torch.arange(12) > 4
    one = center_own_part(batches, counted)
    answers: list[Tensor] = pool.run(center_own_part, batches, counted)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    torch.testing.assert_close(answers[0], one)
