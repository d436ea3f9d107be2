"""Naive float64 references of DINO's losses, iBOT's and KoLeo, written as the papers write them."""

import math

from torch import Tensor


def dino_loss(student: Tensor, teacher: Tensor, center: Tensor, student_t: float, teacher_t: float) -> float:
    """DINO, eqs. 1, 3 and 4: the mean over ordered pairs of different views, the first of which the teacher sees.

    (V, B, K) logits of the student for all views, (T, B, K) of the teacher for the first ones, and a (K,) centre.
    """
    terms = []
    for t in range(len(teacher)):
        for v in range(len(student)):
            if v == t:
                continue
            for i in range(student.shape[1]):
                terms.append(cross_entropy(student[v, i], teacher[t, i], center, student_t, teacher_t))
    return math.fsum(terms) / len(terms)


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    powers = [math.exp(x - largest) for x in logits]
    return [power / math.fsum(powers) for power in powers]


def cross_entropy(student: Tensor, teacher: Tensor, center: Tensor, student_t: float, teacher_t: float) -> float:
    """-sum_k P_t(k) log P_s(k) of the (K,) logits of one image."""
    p = softmax([(float(g) - float(c)) / teacher_t for g, c in zip(teacher, center, strict=True)])
    q = softmax([float(g) / student_t for g in student])
    return -math.fsum(a * math.log(b) for a, b in zip(p, q, strict=True))


def ibot_loss(
    student: Tensor, teacher: Tensor, mask: Tensor, center: Tensor, student_t: float, teacher_t: float
) -> float:
    """IBOT, eq. 2: the mean over images and views of the mean over their masked tokens; 0 where none is masked.

    (V, B, N, K) logits of student and teacher for all N tokens of a view, and a (V, B, N) mask.
    """
    total = 0.0
    for v in range(len(student)):
        for i in range(student.shape[1]):
            masked = [n for n in range(student.shape[2]) if bool(mask[v, i, n])]
            terms = [cross_entropy(student[v, i, n], teacher[v, i, n], center, student_t, teacher_t) for n in masked]
            total += math.fsum(terms) / max(len(terms), 1)
    return total / (len(student) * student.shape[1])


def koleo_loss(features: Tensor, eps: float = 1e-8) -> float:
    """Sablayrolles et al. 2019, section 3.3: -1/n sum_i log min_{j != i} |x_i - x_j|, of unit vectors."""
    rows = []
    for x in features.tolist():
        norm = math.sqrt(math.fsum(a * a for a in x))
        rows.append([a / norm for a in x])
    total = 0.0
    for i, x in enumerate(rows):
        near = min(math.dist(x, y) for j, y in enumerate(rows) if j != i)
        total += math.log(near + eps)
    return -total / len(rows)


def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> list[list[float]]:
    """SwAV, algorithm 1, as in DINOv2: (B, K) assignments, from the matrix exp(logits / temperature)."""
    q = [[math.exp(float(x) / temperature) for x in row] for row in logits]
    images, prototypes = len(q), len(q[0])
    whole = math.fsum(x for row in q for x in row)
    q = [[x / whole for x in row] for row in q]
    for _ in range(iterations):
        used = [math.fsum(row[k] for row in q) for k in range(prototypes)]
        q = [[x / used[k] / prototypes for k, x in enumerate(row)] for row in q]
        q = [[x / math.fsum(row) / images for x in row] for row in q]
    return [[x * images for x in row] for row in q]
