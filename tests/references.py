"""Each loss as its paper writes it, naively, in float64: the yardstick of the tests."""

import itertools
import math

from torch import Tensor


def nat_loss(features: Tensor, targets: Tensor) -> float:
    """NAT, eq. 2: 1/(2n) || f - P C ||_F^2, sum by sum. The rows of `targets` are those of P C."""
    n, d = features.shape
    total = 0.0
    for i in range(n):
        for k in range(d):
            total += (float(features[i, k]) - float(targets[i, k])) ** 2
    return total / (2 * n)


def nat_best_cost(features: Tensor, targets: Tensor) -> float:
    """NAT, eq. 5 over the permutations of eq. 6: the least sum of squared distances, by trying them all."""
    n = len(features)
    cost = [[sum((float(features[i, k]) - float(targets[j, k])) ** 2 for k in range(features.shape[1])) for j in range(n)] for i in range(n)]
    return min(sum(cost[i][p[i]] for i in range(n)) for p in itertools.permutations(range(n)))


def weighted_knn(query: list[float], bank: list[list[float]], labels: list[int], k: int, temperature: float) -> int:
    """Super-AND, section 4.1: argmax over c of the sum, over the k nearest of class c, of exp(cos / temperature)."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    nearest = sorted(range(len(bank)), key=lambda i: -cosine(query, bank[i]))[:k]
    scores: dict[int, float] = {}
    for i in nearest:
        scores[labels[i]] = scores.get(labels[i], 0.0) + math.exp(cosine(query, bank[i]) / temperature)
    return max(scores, key=lambda c: scores[c])
