from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.collective import all_sum, rank, world_size
from firstlight.tasks.relation_losses import (
    SuperAndVariant,
    augmentation_loss,
    log_complement,
    neighbourhood_loss,
    paper_augmentation_loss,
    reference_augmentation_loss,
    relation_cosines,
)
from tests.support import references
from tests.support.batches import unit_rows
from tests.support.gloo import Pool

VARIANTS = pytest.mark.parametrize("variant", ["paper", "reference"])


def test_cosines_equal_those_of_the_relations_to_every_row() -> None:
    left, right, bank = unit_rows(3, 4, 0), unit_rows(5, 4, 1), unit_rows(20, 4, 2)
    wanted = F.normalize(left @ bank.T, dim=1) @ F.normalize(right @ bank.T, dim=1).T
    torch.testing.assert_close(relation_cosines(left, right, bank.T @ bank), wanted, rtol=1e-10, atol=1e-12)


def test_paper_loss_is_equations_13_and_14() -> None:
    first, second, bank = unit_rows(6, 4, 0), unit_rows(6, 4, 1), unit_rows(20, 4, 2)
    gram, own = bank.T @ bank, torch.arange(6)
    across, among = (relation_cosines(view, first, gram) for view in (second, first))
    loss = float(paper_augmentation_loss(across, among, own, 0.2))
    assert loss == pytest.approx(references.super_and_augmentation(first, second, bank, 0.2), rel=1e-10)


def test_reference_loss_is_that_of_the_authors_code() -> None:
    first, second, bank = unit_rows(6, 4, 0), unit_rows(6, 4, 1), unit_rows(20, 4, 2)
    both, own = torch.cat((first, second)), torch.arange(12)
    cosines = relation_cosines(both, both, bank.T @ bank)
    loss = float(reference_augmentation_loss(cosines, own, (own + 6) % 12, 0.2))
    assert loss == pytest.approx(references.super_and_augmentation_of_the_code(first, second, bank, 0.2), rel=1e-10)


def test_log_complement_is_finite_for_probability_1() -> None:
    assert bool(torch.isfinite(log_complement(torch.tensor([0.0, -1.0, -50.0]))).all())
    assert float(log_complement(torch.tensor(-1.0))) == pytest.approx(-0.45867515, rel=1e-6)


def test_gradcheck_of_the_augmentation_losses() -> None:
    cosines, own = unit_rows(6, 6, 0).requires_grad_(), torch.arange(6)
    assert torch.autograd.gradcheck(lambda c: reference_augmentation_loss(c, own, own.roll(3), 0.5), (cosines,))
    assert torch.autograd.gradcheck(lambda c: paper_augmentation_loss(c, c.T, own, 0.5), (cosines,))


@VARIANTS
def test_neighbourhood_loss_is_equation_10(variant: SuperAndVariant) -> None:
    views, bank = unit_rows(4, 4, 0), unit_rows(20, 4, 1)
    own, neighbour = torch.tensor([3, 0, 19, 8]), torch.tensor([-1, 5, 2, -1])
    logits = views @ bank.T / 0.2
    others = logits.masked_fill(F.one_hot(own, 20).bool(), -torch.inf).logsumexp(1)
    at = partial(torch.gather, logits, 1)
    loss = neighbourhood_loss(
        others, at(own[:, None])[:, 0], at(neighbour.clamp_min(0)[:, None])[:, 0], neighbour >= 0, variant
    )
    wanted = references.super_and_neighbourhood(
        [views], own.tolist(), neighbour.tolist(), bank, 0.2, variant == "reference"
    )
    assert float(loss) == pytest.approx(wanted, rel=1e-10)


def augmentation_on_this_worker(variant: SuperAndVariant) -> Tensor:
    """The loss of this worker's part of six images, averaged over workers."""
    part = slice(rank() * 6 // world_size(), (rank() + 1) * 6 // world_size())
    bank = unit_rows(20, 4, 2)
    loss = augmentation_loss(unit_rows(6, 4, 0)[part], unit_rows(6, 4, 1)[part], bank.T @ bank, 0.2, variant)
    return all_sum(loss) / world_size()


@VARIANTS
def test_augmentation_loss_of_a_batch_does_not_depend_on_the_number_of_workers(
    variant: SuperAndVariant, pool3: Pool
) -> None:
    formula = {
        "paper": references.super_and_augmentation,
        "reference": references.super_and_augmentation_of_the_code,
    }[variant]
    wanted = formula(unit_rows(6, 4, 0), unit_rows(6, 4, 1), unit_rows(20, 4, 2), 0.2)
    for found in (augmentation_on_this_worker(variant), *pool3.run(augmentation_on_this_worker, variant)):
        assert float(found) == pytest.approx(wanted, rel=1e-10)
