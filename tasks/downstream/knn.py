"""Weighted k nearest neighbours (Wu et al. 2018, section 3.4; Super-AND, section 4.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, BANK = 512, 65_536  # queries, and images of the bank, at a time: their similarities are all that is held


def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(m, d) queries, (n, d) bank -> (m, k) cosine similarities, falling, and (m, k) int64 places in the bank; k is at most n.

    Of equal similarities the lowest places come first. Computed where the tensors are.
    """
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    found = [_nearest(block, bank, min(k, len(bank))) for block in queries.split(BLOCK)]
    return torch.cat([similarity for similarity, _ in found]), torch.cat([place for _, place in found])


def _nearest(block: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(b, d) and (n, d) unit vectors -> as `neighbours`; the bank in parts, of which the best so far are kept."""
    best = block.new_empty(len(block), 0)
    places = torch.empty(len(block), 0, dtype=torch.int64, device=block.device)
    for start in range(0, len(bank), BANK):
        similarity = block @ bank[start : start + BANK].T
        part, within = _largest(similarity, min(k, similarity.shape[1]))
        best, order = torch.cat((best, part), 1).sort(
            dim=1, descending=True, stable=True
        )  # those of lower places stand first
        places = torch.cat((places, within + start), 1).gather(1, order)[:, :k]
        best = best[:, :k]
    return best, places


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(b, n) -> the k largest of every row, falling, and their columns; of equal ones the lowest columns, which topk does not promise."""
    top, columns = values.topk(k, dim=1)
    cut = (values >= top[:, -1:]).sum(1) > k  # equal values on both sides of the end
    columns = columns.sort(1).values
    if bool(cut.any()):
        columns[cut] = values[cut].sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    top, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return top, columns.gather(1, order)


def class_scores(queries: Tensor, bank: Tensor, labels: Tensor, *, k: int, temperature: float, classes: int) -> Tensor:
    """(m, d) queries, (n, d) bank, (n,) labels -> (m, classes).

    Class c scores the sum over the k nearest (cosine) images of that class of exp(similarity / temperature), relative to the nearest one's; minus
    infinity where none of them is of that class. k is at most n.
    """
    similarity, nearest = neighbours(queries, bank, k)
    weights = (
        (similarity - similarity[:, :1]) / temperature
    ).exp()  # relative to the nearest: no overflow, and never all zero
    scores = torch.zeros(len(queries), classes, device=bank.device, dtype=weights.dtype)
    scores.scatter_add_(1, labels[nearest], weights)
    return scores.masked_fill(scores == 0, -torch.inf)


def weighted_knn(queries: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float) -> Tensor:
    """The (m,) classes of the highest scores; of equal ones the lowest."""
    return class_scores(queries, bank, labels, k=k, temperature=temperature, classes=int(labels.max()) + 1).argmax(1)


def hits(scores: Tensor, labels: Tensor, top: int) -> Tensor:
    """(m, classes) scores and (m,) labels -> (m,) bool: is the label among the `top` classes? Of equal scores the lower class is before."""
    own = scores.gather(1, labels[:, None])
    before = (scores > own) | (
        (scores == own) & (torch.arange(scores.shape[1], device=scores.device) < labels[:, None])
    )
    return ((before.sum(1) < top) & (own > -torch.inf)[:, 0]).bool()
