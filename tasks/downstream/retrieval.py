"""How many of the images found are of the query's class."""

from collections.abc import Sequence

import torch
from torch import Tensor


def without_own(found: Tensor, queries: Tensor) -> Tensor:
    """(m, k + 1) distinct ids found for each of the (m,) queries -> (m, k): without the query itself, or without the last where it is not there."""
    own = found == queries[:, None]
    own[:, -1] |= ~own.any(1)
    return found[~own].reshape(len(found), -1)


def precision(right: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """(m, K) bool, is the k-th image found of the query's class -> for each of `ks` the share of right ones among the first k, mean over queries."""
    return {k: float(right[:, :k].double().mean()) for k in ks}


def mean_average_precision(right: Tensor, relevant: Tensor) -> float:
    """mAP@K of (m, K) right ones, where (m,) `relevant` images of the gallery are of the query's class.

    The mean over queries of 1 / min(K, relevant) * sum over the right places k of precision@k; 0 for a query that nothing in the gallery answers.
    """
    hits, places = right.double(), torch.arange(1, right.shape[1] + 1, device=right.device)
    gained = (hits * hits.cumsum(1) / places).sum(1)
    return float((gained / relevant.clamp(1, right.shape[1])).mean())
