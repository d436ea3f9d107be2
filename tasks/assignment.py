"""Assignments of images to targets: which permutation makes the features lie nearest to their targets.

Both solvers minimise sum_i ||f_i - t_p(i)||^2 over all permutations p of a batch (Noise As Targets, eq. 6). On the unit
sphere this is the linear assignment problem with the costs c_ij = -<f_i, t_j>. `best_assignment` solves it exactly on
the host, in up to O(n^3). `sparse_assignment` is an approximation for batches of thousands, with a proven bound.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from firstlight.tasks.device.copies import send_array
from firstlight.tasks.device.timer import time_part

# The pairs that the first solution may use: for each image its nearest targets, for each target its nearest images.
# Every further solution may use as many more for each image.
NUM_CANDIDATES = 16
# The bound of `sparse_assignment`: the mean cost of a pair above that of the optimum, as a share of the root mean
# square of the centred costs of all pairs.
SPARSE_TOLERANCE = 0.01
# Solutions that are tried before the exact solver takes over, and sweeps for the dual prices of each.
MAX_SPARSE_SOLUTIONS, MAX_DUAL_SWEEPS = 3, 1000
# Rows of the costs that are compared with the prices at a time, so that they stay in a processor's cache.
ROW_BLOCK = 256


def best_assignment(features: Tensor, targets: Tensor) -> Tensor:
    """Returns the permutation p (G,) that minimises sum_i ||f_i - t_p(i)||^2 (eq. 6).

    On the unit sphere this maximises sum_i <f_i, t_p(i)>. The subtraction of row and column means does not change the
    optimum, and removes the common part of collapsed features, on which scipy's solver is otherwise 7-15 times slower.

    Args:
        features: (G, d) unit features f.
        targets: (G, d) targets t that the images hold.
    """
    # Half a second to import, which only a training of this method should wait for.
    from scipy.optimize import linear_sum_assignment

    cost = -(features.double() @ targets.double().T)
    cost = cost - cost.mean(1, keepdim=True) - cost.mean(0, keepdim=True)
    # The features of a diverged network are not numbers. Any assignment is fine then: the loop stops at the loss, on
    # all workers, and gives the reason.
    with time_part("assignment"):
        _, columns = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
        return send_array(columns, features.device)


@time_part("assignment")
def sparse_assignment(features: Tensor, targets: Tensor) -> Tensor:
    """Returns a permutation p (G,) whose mean cost is at most `SPARSE_TOLERANCE` above the optimum, in units of the
    root mean square of the centred costs.

    An image may take one of its nearest targets, a target that it is among the nearest images of, or the target that it
    holds. The best permutation within these candidate pairs is computed exactly, by shortest augmenting paths on the
    sparse graph (Jonker and Volgenant 1987). The pairs (i, i) make a permutation, so there always is one, and none is
    found that is worse. Prices from linear programming duality then bound the distance to the optimum of all pairs.
    While the bound is above the tolerance, the pairs that the prices find most wanting join the candidates. If
    `MAX_SPARSE_SOLUTIONS` solutions do not meet it, `best_assignment` solves the problem.

    Costs are computed on the device of `features`. For each solution the host waits for the device twice: for the
    candidates alone, and for the bound.

    Args:
        features: (G, d) unit features f.
        targets: (G, d) targets t that the images hold.
    """
    costs, is_usable = _centred_costs(features, targets)
    pairs = _nearest_pairs(costs)
    for _ in range(MAX_SPARSE_SOLUTIONS):
        graph = _CandidateGraph.from_pairs(costs, pairs, is_usable)
        if graph is None:
            return torch.arange(len(features), device=features.device)
        order = _solve_graph(graph)
        prices = send_array(_dual_prices(graph, order), costs.device).to(costs.dtype)
        chosen = send_array(order, costs.device)
        # The sums of both are equal for the optimum of all pairs, and never differ by less than the distance to it.
        paid = costs.gather(1, chosen[:, None])[:, 0] - prices[chosen]
        lowest = torch.cat([(block - prices).amin(1) for block in costs.split(ROW_BLOCK)])
        if float((paid - lowest).mean()) <= SPARSE_TOLERANCE:
            return chosen
        k = min(NUM_CANDIDATES, len(costs))
        wanting = [(block - prices).topk(k, 1, largest=False).indices for block in costs.split(ROW_BLOCK)]
        pairs = torch.cat([pairs, _pair_keys(torch.cat(wanting), len(costs))])
    return best_assignment(features, targets)


def _centred_costs(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the (G, G) costs without their row and column means, with a root mean square of 1; and () bool.

    It is false if they are all equal up to rounding, or one is not a number: any permutation is as good then, and a
    loss that is not a number stops the training.
    """
    dtype = torch.promote_types(features.dtype, targets.dtype)
    # Features that are nearly alike differ in digits that their products would lose.
    f, t = ((x.double() - x.double().mean(0)).to(dtype) for x in (features, targets))
    costs: Tensor = (f @ t.T).neg_()
    scale = torch.linalg.vector_norm(torch.linalg.vector_norm(costs, dim=1).double()) / len(costs)
    is_usable = torch.isfinite(scale) & (scale > torch.finfo(dtype).eps)
    return costs.div_(scale.to(dtype)), is_usable


def _pair_keys(columns: Tensor, n: int) -> Tensor:
    """Returns the keys row * n + column, flat, of the pairs of each row with its (n, k) columns."""
    return (torch.arange(n, device=columns.device)[:, None] * n + columns).flatten()


def _nearest_pairs(costs: Tensor) -> Tensor:
    """Returns the keys row * n + column of the first candidates, the pairs (i, i) among them. Some occur twice."""
    n = len(costs)
    k = min(NUM_CANDIDATES, n)
    targets = costs.topk(k, 1, largest=False).indices
    images = costs.T.contiguous().topk(k, 1, largest=False).indices
    columns = torch.arange(n, device=costs.device)[:, None]
    parts = _pair_keys(targets, n), (images * n + columns).flatten(), (columns * (n + 1))[:, 0]
    return torch.cat(parts)


class _CandidateGraph(NamedTuple):
    """Candidate pairs on the host, sorted by row and column, in float64 costs."""

    size: int
    rows: np.ndarray
    columns: np.ndarray
    costs: np.ndarray

    @classmethod
    def from_pairs(cls, costs: Tensor, pairs: Tensor, is_usable: Tensor) -> "_CandidateGraph | None":
        """Reads the pairs and their costs. Returns None unless `is_usable`, () bool."""
        # All in one array, which is copied once. Keys are exact in float64 for up to 90 million images.
        sent = torch.cat((is_usable.double()[None], pairs.double(), costs.flatten()[pairs].double())).cpu().numpy()
        if not sent[0]:
            return None
        keys, places = np.unique(sent[1 : len(pairs) + 1].astype(np.int64), return_index=True)
        return cls(len(costs), keys // len(costs), keys % len(costs), sent[len(pairs) + 1 :][places])


def _solve_graph(graph: _CandidateGraph) -> np.ndarray:
    """Returns the column (n,) int64 of each row in the cheapest permutation of candidate pairs."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    # An entry of 0 would count as no pair.
    weights = graph.costs - graph.costs.min() + 1.0
    matrix = csr_matrix((weights, (graph.rows, graph.columns)), shape=(graph.size, graph.size))
    return np.asarray(min_weight_full_bipartite_matching(matrix)[1], np.int64)


def _dual_prices(graph: _CandidateGraph, order: np.ndarray) -> np.ndarray:
    """Returns the price (n,) of each column, for which each row's column in `order` is its cheapest candidate.

    Column j may cost at most c_ij - c_im more than the column m of row i. The largest such prices below 0 are lengths
    of shortest paths between columns, here by sweeps over all pairs (Bellman and Ford). They exist because `order` is
    optimal within the candidates. Prices of a search that was cut off bound the optimum too, less tightly.
    """
    own = np.empty(graph.size)
    held = graph.columns == order[graph.rows]
    own[graph.rows[held]] = graph.costs[held]
    by_column = np.argsort(graph.columns, kind="stable")
    extra, source = (graph.costs - own[graph.rows])[by_column], order[graph.rows][by_column]
    starts = np.searchsorted(graph.columns[by_column], np.arange(graph.size))
    prices = np.zeros(graph.size)
    for _ in range(MAX_DUAL_SWEEPS):
        lower = np.minimum.reduceat(prices[source] + extra, starts)
        if np.all(prices - lower <= 1e-9):
            break
        prices = np.minimum(prices, lower)
    return prices
