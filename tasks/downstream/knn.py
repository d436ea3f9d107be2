"""Weighted k nearest neighbours (Wu et al. 2018, section 3.4; Super-AND, section 4.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512  # queries at a time: the (BLOCK, n) similarities are all that is held


def weighted_knn(queries: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float) -> Tensor:
    """(m, d) queries, (n, d) bank, (n,) labels -> (m,) predicted classes.

    Class c scores sum over the k nearest (cosine) images of that class of exp(similarity / temperature); k is at most n.
    """
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    classes = int(labels.max()) + 1
    predictions = []
    for block in queries.split(BLOCK):
        similarity, nearest = (block @ bank.T).topk(min(k, len(bank)), dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the nearest: no overflow, and never all zero
        scores = torch.zeros(len(block), classes, device=bank.device, dtype=weights.dtype)
        predictions.append(scores.scatter_add_(1, labels[nearest], weights).argmax(1))
    return torch.cat(predictions)
