"""Weighted k nearest neighbours (Wu et al. 2018, section 3.4; Super-AND, section 4.1)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# The numbers of queries and of images of the bank whose similarities are in memory at a time.
KNN_QUERY_BLOCK, KNN_BANK_BLOCK = 512, 65_536
# The similarity of two images: their cosine, or their product, which a memory bank's rows of other lengths need.
KnnSimilarity = Literal["cosine", "product"]


def nearest_neighbours(
    queries: Tensor, bank: Tensor, k: int, similarity: KnnSimilarity = "cosine"
) -> tuple[Tensor, Tensor]:
    """Finds the k images of an (n, d) bank that are nearest to each of (m, d) queries, on the tensors' device.

    Returns:
        (m, k) similarities, falling, and (m, k) int64 positions in the bank; of equal similarities the lowest positions
        come first. k is reduced to n if it is larger.
    """
    if similarity == "cosine":
        queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    found = [_search_bank(block, bank, min(k, len(bank))) for block in queries.split(KNN_QUERY_BLOCK)]
    return torch.cat([values for values, _ in found]), torch.cat([positions for _, positions in found])


def _search_bank(block: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Does the search of `nearest_neighbours` for (b, d) and (n, d) vectors, by their products.

    It takes the bank in parts and keeps the best so far.
    """
    best = block.new_empty(len(block), 0)
    positions = torch.empty(len(block), 0, dtype=torch.int64, device=block.device)
    for start in range(0, len(bank), KNN_BANK_BLOCK):
        similarity = block @ bank[start : start + KNN_BANK_BLOCK].T
        part, within = _largest_values(similarity, min(k, similarity.shape[1]))
        # The sort is stable, and lower positions come first before it.
        best, order = torch.cat((best, part), 1).sort(dim=1, descending=True, stable=True)
        positions = torch.cat((positions, within + start), 1).gather(1, order)[:, :k]
        best = best[:, :k]
    return best, positions


def _largest_values(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest of every row of (b, n) values, falling, and their columns.

    It takes the lowest columns of equal values, which topk does not promise.
    """
    top, columns = values.topk(k, dim=1)
    # True if there are equal values on both sides of the end.
    cut = (values >= top[:, -1:]).sum(1) > k
    columns = columns.sort(1).values
    if bool(cut.any()):
        columns[cut] = values[cut].sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    top, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return top, columns.gather(1, order)


def class_scores(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    k: int,
    temperature: float,
    classes: int,
    similarity: KnnSimilarity = "cosine",
) -> Tensor:
    """Returns (m, classes) scores of (m, d) queries from an (n, d) bank with (n,) labels.

    The score of class c is the sum of exp(similarity / temperature) over those of the k nearest images that are of that
    class, relative to the nearest image. It is minus infinity if none of them is of that class.
    """
    values, nearest = nearest_neighbours(queries, bank, k, similarity)
    # Weights relative to the nearest image do not overflow, and are never all zero.
    weights = ((values - values[:, :1]) / temperature).exp()
    scores = torch.zeros(len(queries), classes, device=bank.device, dtype=weights.dtype)
    scores.scatter_add_(1, labels[nearest], weights)
    return scores.masked_fill(scores == 0, -torch.inf)


def weighted_knn(queries: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float) -> Tensor:
    """Returns the (m,) classes of the highest scores; of equal scores the lowest class."""
    return class_scores(queries, bank, labels, k=k, temperature=temperature, classes=int(labels.max()) + 1).argmax(1)


def is_label_in_top(scores: Tensor, labels: Tensor, top: int) -> Tensor:
    """Returns (m,) bool, true if the label is among the `top` classes. The lower class of equal scores comes first.

    Args:
        scores: (m, classes).
        labels: (m,).
    """
    own = scores.gather(1, labels[:, None])
    before = (scores > own) | (
        (scores == own) & (torch.arange(scores.shape[1], device=scores.device) < labels[:, None])
    )
    return ((before.sum(1) < top) & (own > -torch.inf)[:, 0]).bool()
