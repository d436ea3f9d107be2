"""Metrics of image retrieval: how many of the retrieved images are of the query's class."""

from collections.abc import Sequence

import torch
from torch import Tensor


def remove_query(found: Tensor, queries: Tensor) -> Tensor:
    """Removes each of the (m,) queries from its (m, k + 1) distinct retrieved ids.

    If the query is not among them it removes the last id. Returns (m, k).
    """
    own = found == queries[:, None]
    own[:, -1] |= ~own.any(1)
    return found[~own].reshape(len(found), -1)


def precision_at(right: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Returns the precision at each of `ks`: the share of the query's class among the first k, averaged over queries.

    `right`: (m, K) bool, true if the k-th retrieved image is of the query's class.
    """
    return {k: float(right[:, :k].double().mean()) for k in ks}


def mean_average_precision(right: Tensor, relevant: Tensor) -> float:
    """Returns mAP@K: the mean over queries of 1 / min(K, relevant) * sum over the right positions k of precision@k.

    A query without an image of its class in the gallery counts 0.

    Args:
        right: (m, K) bool, true if the k-th retrieved image is of the query's class.
        relevant: (m,), the number of images of the query's class in the gallery.
    """
    hits, positions = right.double(), torch.arange(1, right.shape[1] + 1, device=right.device)
    gained = (hits * hits.cumsum(1) / positions).sum(1)
    return float((gained / relevant.clamp(1, right.shape[1])).mean())
