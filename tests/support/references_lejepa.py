"""Naive float64 references of LeJEPA: its loss, and the test of Epps and Pulley in closed form."""

import cmath
import math
from collections.abc import Sequence

from torch import Tensor


def epps_pulley(x: Sequence[float], points: int, bound: float) -> float:
    """Algorithm 1: the statistic by the trapezoidal rule over `points` points from -bound to bound."""
    t = [-bound + 2 * bound * k / (points - 1) for k in range(points)]
    values = []
    for at in t:
        empirical = sum(cmath.exp(1j * at * number) for number in x) / len(x)
        normal = math.exp(-(at**2) / 2)
        values.append(abs(empirical - normal) ** 2 * normal)
    pieces = [(values[k] + values[k + 1]) / 2 * (t[k + 1] - t[k]) for k in range(points - 1)]
    return len(x) * math.fsum(pieces)


def exact_epps_pulley(x: Sequence[float]) -> float:
    """The statistic with its integral over all t: a squared kernel distance of x from N(0, 1)."""
    n, root = len(x), math.sqrt(2 * math.pi)
    among = math.fsum(root * math.exp(-((a - b) ** 2) / 2) for a in x for b in x) / n**2
    across = math.fsum(math.sqrt(math.pi) * math.exp(-(a**2) / 4) for a in x) / n
    return n * (among - 2 * across + math.sqrt(2 * math.pi / 3))


def lejepa_terms(
    embeddings: Tensor, num_global: int, directions: Tensor, points: int, bound: float, distance: str
) -> tuple[float, float]:
    """Algorithm 2: the invariance and SIGReg of (B, V, d) embeddings along (d, M) directions."""
    images, squares = embeddings.tolist(), []
    for views in images:
        centre = [math.fsum(view[k] for view in views[:num_global]) / num_global for k in range(len(views[0]))]
        squares += [math.fsum((a - b) ** 2 for a, b in zip(view, centre, strict=True)) for view in views]
    invariance = math.fsum(squares) / len(squares)
    if distance == "mean":
        invariance /= len(images[0][0])
    statistics = []
    for view in range(len(images[0])):
        for direction in directions.T.tolist():
            along = [math.fsum(a * b for a, b in zip(views[view], direction, strict=True)) for views in images]
            statistics.append(epps_pulley(along, points, bound))
    return invariance, math.fsum(statistics) / len(statistics)
