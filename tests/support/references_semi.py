"""Naive float64 references of semi-supervised losses, written as the papers write them."""

import math
from collections.abc import Sequence

from torch import Tensor


def cross_entropy(label: int, probabilities: Sequence[float]) -> float:
    """H of a one-hot label and a prediction."""
    return -math.log(probabilities[label])


def fixmatch_losses(
    weak: Tensor, strong: Tensor, labels: Sequence[int], thresholds: Sequence[float]
) -> tuple[float, float, float]:
    """FixMatch, eqs. 3 and 4: L_s, L_u, and the share of unlabelled images whose pseudo-label is taken.

    `weak` and `strong` are (B, C) probabilities; a label of -1 is unknown. `thresholds` has one of each class.
    """
    supervised, consistency, num_labelled, num_taken = 0.0, 0.0, 0, 0
    for b, label in enumerate(labels):
        q, p = weak[b].tolist(), strong[b].tolist()
        if label >= 0:
            supervised += cross_entropy(label, q)
            num_labelled += 1
            continue
        guess = q.index(max(q))
        if max(q) >= thresholds[guess]:
            consistency += cross_entropy(guess, p)
            num_taken += 1
    rest = max(len(labels) - num_labelled, 1)
    return supervised / max(num_labelled, 1), consistency / rest, num_taken / rest


def flexmatch_thresholds(states: Sequence[int], classes: int, cutoff: float, warmup: bool, mapping: str) -> list[float]:
    """FlexMatch, eqs. 5, 6, 11 and 12: the thresholds of the classes.

    `states` has of each unlabelled image the class of its last confident prediction, or -1.
    """
    sigma = [sum(1 for state in states if state == c) for c in range(classes)]
    unused = len(states) - sum(sigma)
    largest = max(max(sigma), unused) if warmup else max(sigma)
    out = []
    for c in range(classes):
        beta = sigma[c] / largest if largest else 0.0
        shares = {"convex": beta / (2 - beta), "linear": beta, "concave": math.log(beta + 1) / math.log(2)}
        out.append(shares[mapping] * cutoff)
    return out


def freematch_averages(
    weak: Tensor, labels: Sequence[int], momentum: float, level: float, expected: list[float], histogram: list[float]
) -> tuple[float, list[float], list[float]]:
    """FreeMatch, eqs. 5, 6 and 9: tau, p and h after the predictions of a batch."""
    rows = [weak[b].tolist() for b, label in enumerate(labels) if label < 0]
    mean_confidence = sum(max(q) for q in rows) / len(rows)
    level = momentum * level + (1 - momentum) * mean_confidence
    for c in range(len(expected)):
        expected[c] = momentum * expected[c] + (1 - momentum) * sum(q[c] for q in rows) / len(rows)
        share = sum(1 for q in rows if q.index(max(q)) == c) / len(rows)
        histogram[c] = momentum * histogram[c] + (1 - momentum) * share
    return level, expected, histogram


def freematch_thresholds(level: float, expected: Sequence[float]) -> list[float]:
    """FreeMatch, eq. 8."""
    return [level * p / max(expected) for p in expected]


def freematch_fairness(
    strong: Tensor, taken: Sequence[bool], expected: Sequence[float], histogram: Sequence[float]
) -> float:
    """FreeMatch, eqs. 10 and 11, and the code where a class has no prediction."""
    rows = [strong[b].tolist() for b, one in enumerate(taken) if one]
    if not rows:
        return 0.0
    classes = len(expected)
    shares = [sum(1 for q in rows if q.index(max(q)) == c) / len(rows) for c in range(classes)]
    means = [sum(q[c] for q in rows) / len(rows) for c in range(classes)]
    first = [p / h for p, h in zip(expected, histogram, strict=True)]
    second = [m / s if s else 0.0 for m, s in zip(means, shares, strict=True)]
    total = 0.0
    for a, b in zip(first, second, strict=True):
        total += a / sum(first) * math.log(b / sum(second) + 1e-12)
    return total


def cosine_distance(first: Sequence[float], second: Sequence[float]) -> float:
    """1 - cos of two vectors."""
    product = sum(a * b for a, b in zip(first, second, strict=True))
    return 1.0 - product / math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))
