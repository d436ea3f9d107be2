"""Naive float64 references of SimCLR's loss, BYOL's and VICReg's, written as the papers write them."""

import math
from collections.abc import Sequence

from torch import Tensor


def nt_xent(first: Tensor, second: Tensor, temperature: float, decoupled: bool) -> float:
    """SimCLR, eq. 1, as the mean over all 2N views of (N, d) projections of any length.

    With `decoupled` the sum over negatives is that of decoupled contrastive learning (eq. 6), without the positive.
    """
    z = [row.tolist() for pair in zip(first, second, strict=True) for row in pair]
    terms = []
    for i in range(len(z)):
        # Algorithm 1: neighbouring views 2k - 1 and 2k are of one image.
        j = i + 1 if i % 2 == 0 else i - 1
        negatives = [k for k in range(len(z)) if k != i and not (decoupled and k == j)]
        total = sum(math.exp(cosine(z[i], z[k]) / temperature) for k in negatives)
        terms.append(-math.log(math.exp(cosine(z[i], z[j]) / temperature) / total))
    return math.fsum(terms) / len(terms)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def byol_loss(predictions: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> float:
    """BYOL, eq. 2 and its symmetric twin, as the mean over (N, d) images: squared distances of unit vectors."""
    terms = []
    for view in (0, 1):
        for q, z in zip(predictions[view].tolist(), targets[1 - view].tolist(), strict=True):
            terms.append(math.fsum((a - b) ** 2 for a, b in zip(normalise(q), normalise(z), strict=True)))
    return math.fsum(terms) / len(predictions[0])


def normalise(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(x * x for x in vector))
    return [x / length for x in vector]


def cosine_momentum(start: float, end: float, step: int, steps: int) -> float:
    """BYOL, section 3.3: tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2, which ends at `end` instead of 1."""
    return end - (end - start) * (math.cos(math.pi * step / steps) + 1.0) / 2.0


def vicreg_terms(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """VICReg, eqs. 1 to 5, of (n, d) embeddings: s(Z, Z'), v(Z) + v(Z'), c(Z) + c(Z')."""
    n, d = first.shape
    z, other = first.tolist(), second.tolist()
    invariance = math.fsum((z[b][j] - other[b][j]) ** 2 for b in range(n) for j in range(d)) / n
    variance = covariance = 0.0
    for rows in (z, other):
        means = [math.fsum(row[j] for row in rows) / n for j in range(d)]
        for i in range(d):
            for j in range(d):
                c = math.fsum((row[i] - means[i]) * (row[j] - means[j]) for row in rows) / (n - 1)
                if i == j:
                    variance += max(0.0, 1.0 - math.sqrt(c + 1e-4)) / d
                else:
                    covariance += c**2 / d
    return invariance, variance, covariance
