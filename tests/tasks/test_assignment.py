"""The exact exchange of targets is optimal; the approximation is a permutation within its bound, whatever the costs."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from firstlight.tasks import assignment
from firstlight.tasks.assignment import SPARSE_TOLERANCE, best_assignment, sparse_assignment
from tests.support import references
from tests.support.batches import unit_rows

# (G, d) features and the (G, d) targets that they hold -> the (G,) permutation of the targets.
Solver = Callable[[Tensor, Tensor], Tensor]


def clustered(n: int, d: int, seed: int) -> Tensor:
    """Features as a network gives them: around few directions, in single precision."""
    return F.normalize(unit_rows(n, d, seed) + 2 * unit_rows(5, d, seed + 1)[torch.arange(n) % 5], dim=1).float()


def mean_cosine(features: Tensor, targets: Tensor, order: Tensor) -> float:
    return float((features.double() * targets.double()[order]).sum(1).mean())


def measure_gap(features: Tensor, targets: Tensor) -> float:
    """The mean cost of the approximation above the optimum, in units of its tolerance. Checks that it is valid."""
    order = sparse_assignment(features, targets)
    assert sorted(order.tolist()) == list(range(len(features)))
    cosines = features.double() @ targets.double().T
    centred = cosines - cosines.mean(0) - cosines.mean(1, keepdim=True) + cosines.mean()
    lost = mean_cosine(features, targets, best_assignment(features, targets)) - mean_cosine(features, targets, order)
    assert lost > -1e-6, "the other one is the optimum"
    return lost / (SPARSE_TOLERANCE * float(centred.square().mean().sqrt()))


@given(st.integers(1, 7), st.integers(2, 5), st.integers(0, 10_000))
def test_assignment_is_optimal(n: int, d: int, seed: int) -> None:
    features, targets = unit_rows(n, d, seed), unit_rows(n, d, seed + 1)
    order = best_assignment(features, targets)
    assert sorted(order.tolist()) == list(range(n))
    found = float((features - targets[order]).square().sum())
    assert found == pytest.approx(references.nat_best_cost(features, targets), abs=1e-9)


@pytest.mark.parametrize("solve", [best_assignment, sparse_assignment])
def test_assignment_of_collapsed_features_is_a_permutation(solve: Solver) -> None:
    features = unit_rows(1, 8, 0).expand(64, 8) + 1e-9 * unit_rows(64, 8, 1)
    assert sorted(solve(features, unit_rows(64, 8, 2)).tolist()) == list(range(64))


@given(st.integers(2, 80), st.sampled_from([8, 16, 64]), st.integers(0, 10_000), st.booleans())
def test_sparse_assignment_is_a_permutation_within_its_bound(n: int, d: int, seed: int, grouped: bool) -> None:
    features = clustered(n, d, seed) if grouped else unit_rows(n, d, seed).float()
    assert measure_gap(features, unit_rows(n, d, seed + 2).float()) <= 1.0


@pytest.mark.parametrize("n", [256, 1024])
def test_sparse_assignment_of_a_large_batch_is_within_its_bound_and_no_worse_than_what_images_hold(n: int) -> None:
    features, targets = clustered(n, 128, 0), unit_rows(n, 128, 5).float()
    assert measure_gap(features, targets) <= 1.0
    held = targets[best_assignment(features, targets)]
    assert mean_cosine(features, held, sparse_assignment(features, held)) >= mean_cosine(
        features, held, torch.arange(n)
    )


# Functions that make features and targets of two sets of random directions whose costs are hard: equal or nearly so.
HOSTILE_COSTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "equal images": lambda f, t: (f[:1].expand_as(f), t),
    "one image differs": lambda f, t: (torch.cat((f[:1].expand_as(f)[1:], f[-1:])), t),
    "two directions": lambda f, t: (f[torch.arange(len(f)) % 2 * (len(f) > 1)], t),
    "collapsed": lambda f, t: (F.normalize(f[:1] + 1e-4 * f, dim=1), t),
    "collapsed to rounding": lambda f, t: (F.normalize(f[:1] + 1e-7 * f, dim=1), t),
    "equal targets": lambda f, t: (f, t[:1].expand_as(t)),
    "targets in pairs": lambda f, t: (f, t[torch.arange(len(t)) // 2]),
    "targets in forties": lambda f, t: (f, t[torch.arange(len(t)) // 40]),
    "images on their targets": lambda f, t: (t.flip(0), t),
    "images opposite to their targets": lambda f, t: (-t, t),
    "one target near to all": lambda f, t: (f + f.mean(0), torch.cat((f.mean(0)[None], t[1:] - f.mean(0)))),
    "zeros": lambda f, t: (0 * f, t),
    "half precision": lambda f, t: (f.half(), t.half()),
}


@pytest.mark.parametrize("kind", HOSTILE_COSTS)
@given(n=st.integers(1, 120), d=st.sampled_from([8, 32]), seed=st.integers(0, 10_000))
def test_sparse_assignment_of_hostile_costs_is_a_permutation_within_its_bound(
    kind: str, n: int, d: int, seed: int
) -> None:
    features, targets = HOSTILE_COSTS[kind](unit_rows(n, d, seed).float(), unit_rows(n, d, seed + 1).float())
    order = sparse_assignment(features, targets)
    assert sorted(order.tolist()) == list(range(n))
    costs = -(features.double() @ targets.double().T)
    centred = costs - costs.mean(0) - costs.mean(1, keepdim=True) + costs.mean()
    deviation, size = float(centred.square().mean().sqrt()), float(costs.abs().max())
    paid, least = (
        float(centred.gather(1, p[:, None]).mean()) for p in (order, best_assignment(features.double(), targets))
    )
    # Costs that differ by rounding alone are equal.
    assert paid - least <= SPARSE_TOLERANCE * deviation + 4 * torch.finfo(features.dtype).eps * size


@pytest.mark.parametrize("copies", [2, 8, 100])
def test_ties_are_broken_in_one_way_within_the_bound(copies: int) -> None:
    """Equal targets are those of `targets: one_hot`; 100 of them are more than there are candidates."""
    features = clustered(200, 100, 0)
    targets = F.one_hot(torch.arange(200) // copies, 100).float()
    assert measure_gap(features, targets) <= 1.0
    assert measure_gap(features[torch.arange(200) // copies], unit_rows(200, 100, 1).float()) <= 1.0
    first, second = (sparse_assignment(features, targets) for _ in range(2))
    assert torch.equal(first, second)


def test_images_that_are_all_equal_keep_their_targets() -> None:
    assert sparse_assignment(unit_rows(1, 8, 0).expand(20, 8), unit_rows(20, 8, 1)).tolist() == list(range(20))
    assert sparse_assignment(unit_rows(20, 8, 0), unit_rows(1, 8, 1).expand(20, 8)).tolist() == list(range(20))
    assert sparse_assignment(unit_rows(1, 8, 0), unit_rows(1, 8, 1)).tolist() == [0]


@pytest.mark.fault(39, "an assignment of NaN")
@pytest.mark.parametrize("solve", [best_assignment, sparse_assignment])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_assignment_of_features_that_are_not_finite_is_a_permutation(solve: Solver, value: float) -> None:
    """The loop checks the loss on all workers; an error of the solver on one of them would count as a crash."""
    features = unit_rows(40, 8, 0)
    features[3, 2] = value
    assert sorted(solve(features, unit_rows(40, 8, 1)).tolist()) == list(range(40))


def test_bound_that_cannot_be_met_is_met_by_the_exact_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = clustered(300, 16, 0), unit_rows(300, 16, 3).float()
    monkeypatch.setattr(assignment, "SPARSE_TOLERANCE", -1.0)
    assert torch.equal(sparse_assignment(features, targets), best_assignment(features, targets))


def test_first_candidates_alone_do_not_meet_the_bound_where_images_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    """One candidate for each image and target, and what the images hold: the prices show what is missing."""
    features, targets = clustered(300, 16, 0), unit_rows(300, 16, 3).float()
    sizes: list[int] = []
    solve = assignment._solve_graph

    def count(graph: assignment._CandidateGraph) -> np.ndarray:
        sizes.append(len(graph.rows))
        return solve(graph)

    monkeypatch.setattr(assignment, "NUM_CANDIDATES", 1)
    monkeypatch.setattr(assignment, "MAX_SPARSE_SOLUTIONS", 100)
    monkeypatch.setattr(assignment, "_solve_graph", count)
    assert measure_gap(features, targets) <= 1.0
    assert len(sizes) > 2
    assert sizes == sorted(set(sizes))
    assert sizes[0] <= 3 * 300
    assert sizes[-1] < 300 * 300 / 2


@given(st.integers(2, 40), st.integers(0, 10_000))
def test_prices_prove_that_an_assignment_is_the_best_of_its_candidates(n: int, seed: int) -> None:
    """Linear programming duality: no candidate costs less than its row's and its column's price, the chosen ones not
    more."""
    costs, is_usable = assignment._centred_costs(unit_rows(n, 8, seed), unit_rows(n, 8, seed + 1))
    assert costs is not None
    graph = assignment._CandidateGraph.from_pairs(costs, assignment._nearest_pairs(costs), is_usable)
    order = assignment._solve_graph(graph)
    prices = assignment._dual_prices(graph, order)
    chosen = costs.double().numpy()[np.arange(n), order] - prices[order]
    assert np.all(graph.costs - prices[graph.columns] >= chosen[graph.rows] - 1e-8)
    assert np.all(prices <= 0)


def test_import_of_the_methods_leaves_scipy_alone() -> None:
    """It takes half a second, which every command would wait for."""
    code = "import sys, firstlight.tasks.pretrain; sys.exit('scipy.optimize' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600, check=False).returncode == 0
