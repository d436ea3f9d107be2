"""Naive float64 references of the losses, written as the papers write them."""

import itertools
import math

from torch import Tensor


def nat_loss(features: Tensor, targets: Tensor) -> float:
    """NAT, eq. 2: 1/(2n) || f - P C ||_F^2, with explicit sums. The rows of `targets` are those of P C."""
    n, d = features.shape
    total = 0.0
    for i in range(n):
        for k in range(d):
            total += (float(features[i, k]) - float(targets[i, k])) ** 2
    return total / (2 * n)


def nat_best_cost(features: Tensor, targets: Tensor) -> float:
    """NAT, eq. 5: the smallest sum of squared distances over all permutations of eq. 6."""
    n = len(features)
    cost = [
        [sum((float(features[i, k]) - float(targets[j, k])) ** 2 for k in range(features.shape[1])) for j in range(n)]
        for i in range(n)
    ]
    return min(sum(cost[i][p[i]] for i in range(n)) for p in itertools.permutations(range(n)))


def weighted_knn(
    query: list[float], bank: list[list[float]], labels: list[int], k: int, temperature: float, cosine: bool = True
) -> int:
    """Super-AND, section 4.1: argmax over c of the sum, over the k nearest m of class c, of exp(v.m / temperature).

    With `cosine`, v and m are unit vectors first.
    """

    def similarity(a: list[float], b: list[float]) -> float:
        product = sum(x * y for x, y in zip(a, b, strict=True))
        return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)) if cosine else product

    nearest = sorted(range(len(bank)), key=lambda i: -similarity(query, bank[i]))[:k]
    scores: dict[int, float] = {}
    for i in nearest:
        scores[labels[i]] = scores.get(labels[i], 0.0) + math.exp(similarity(query, bank[i]) / temperature)
    return max(scores, key=lambda c: scores[c])


def spatial_contrast(first: Tensor, second: Tensor, contrast: str) -> float:
    """Spatial Contrasting, eq. 2, with explicit sums, for (N, d) features of two patches of each image.

    With `eq1` the contrasting patches are those of eq. 1.
    """

    def closeness(a: Tensor, b: Tensor) -> float:
        return math.exp(-math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))))

    n, total = len(first), 0.0
    for i in range(n):
        positive = closeness(first[i], second[i])
        if contrast == "eq2":
            below = sum(closeness(first[i], second[j]) for j in range(n))
        else:
            below = positive + sum(closeness(first[i], first[j]) for j in range(n) if j != i)
        total -= math.log(positive / below)
    return total / n


def entropy(p: list[float]) -> float:
    """Clustering and Locality, section 2: H(p) = -sum_i p_i log p_i."""
    return -sum(x * math.log(x) for x in p if x > 0)


def clustering_entropies(q: Tensor) -> tuple[float, float]:
    """Clustering and Locality, eqs. 1 and 2: the mean entropy of (T, C) probabilities, and that of their mean."""
    rows: list[list[float]] = q.tolist()
    mean = [sum(row[c] for row in rows) / len(rows) for c in range(len(rows[0]))]
    return sum(entropy(row) for row in rows) / len(rows), entropy(mean)


def locality_families(activation: Tensor) -> list[float]:
    """Clustering and Locality, eqs. 6 and 7, for one (h, w) map: l_1..l_4.

    They are left-right, right-left, top-bottom and bottom-top.
    """
    h, w = activation.shape

    def norm(group: list[tuple[int, int]]) -> float:
        return math.sqrt(sum(float(activation[y, x]) ** 2 for y, x in group))

    left_right = sum(norm([(y, x) for y in range(h) for x in range(k)]) for k in range(1, w + 1))
    right_left = sum(norm([(y, x) for y in range(h) for x in range(w - k, w)]) for k in range(1, w + 1))
    top_bottom = sum(norm([(y, x) for y in range(k) for x in range(w)]) for k in range(1, h + 1))
    bottom_top = sum(norm([(y, x) for y in range(h - k, h) for x in range(w)]) for k in range(1, h + 1))
    return [left_right, right_left, top_bottom, bottom_top]


def labelled_cross_entropy(q: Tensor, labels: list[int]) -> float:
    """Clustering and Locality, J_C of eq. 4: the mean of -log q_y over the R labelled images."""
    known = [-math.log(float(row[label])) for row, label in zip(q, labels, strict=True) if label >= 0]
    return sum(known) / len(known)


def multilabel_loss(logits: Tensor, present: Tensor, smoothing: float, reduction: str) -> float:
    """The binary cross-entropies of the known labels: their mean, or their sum over the classes an image.

    The sum is that of voc-classification: SigmoidCrossEntropyLoss of python_layers.py divides by the number of images.
    """
    total, known = 0.0, 0
    for i in range(len(logits)):
        for c in range(logits.shape[1]):
            if (y := int(present[i, c])) >= 0:
                p = 1 / (1 + math.exp(-float(logits[i, c])))
                wanted = (1 - smoothing) * y + smoothing / 2
                total -= wanted * math.log(p) + (1 - wanted) * math.log(1 - p)
                known += 1
    return total / (known if reduction == "mean" else len(logits))


def _dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def super_and_probabilities(v: Tensor, bank: Tensor, temperature: float) -> list[float]:
    """Super-AND, eq. 1: the softmax of m_j.v / tau over all rows of the bank."""
    weights = [math.exp(_dot(m, v) / temperature) for m in bank]
    return [w / sum(weights) for w in weights]


def super_and_neighbourhood(
    views: list[Tensor], own: list[int], neighbour: list[int], bank: Tensor, temperature: float, with_own: bool
) -> float:
    """Super-AND, eq. 10, the mean over the images of all views.

    `neighbour` is -1 if none is selected. `with_own` adds p_i^i to the sum, as in the authors' code.
    """
    terms = []
    for view in views:
        for v, i, j in zip(view, own, neighbour, strict=True):
            p = super_and_probabilities(v, bank, temperature)
            terms.append(-math.log(p[i] if j < 0 else p[j] + p[i] * with_own))
    return sum(terms) / len(terms)


def super_and_entropy(
    views: list[Tensor], own: list[int], bank: Tensor, temperature: float, own_class: float | str | None
) -> float:
    """Super-AND, eq. 11, the mean over the images of all views.

    With `own_class` None the own class is left out; a number is its logit, as in the authors' code; with "all" it is a
    class like the others, as in their first commit.
    """
    entropies = []
    for view in views:
        for v, i in zip(view, own, strict=True):
            logits = {j: _dot(m, v) / temperature for j, m in enumerate(bank) if j != i or own_class == "all"}
            if isinstance(own_class, float):
                logits[i] = own_class
            total = sum(math.exp(x) for x in logits.values())
            entropies.append(-sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in logits.values()))
    return sum(entropies) / len(entropies)


def _relations(view: Tensor, bank: Tensor) -> list[list[float]]:
    """Super-AND, eq. 2: the n-dimensional vectors of relations."""
    relations = [[_dot(m, v) for m in bank] for v in view]
    return [[x / math.sqrt(sum(y * y for y in r)) for x in r] for r in relations]


def super_and_augmentation(first: Tensor, second: Tensor, bank: Tensor, temperature: float) -> float:
    """Super-AND, eqs. 13 and 14, the mean over images."""
    r, hat, n = _relations(first, bank), _relations(second, bank), len(first)

    def weight(a: list[float], b: list[float]) -> float:
        return math.exp(sum(x * y for x, y in zip(a, b, strict=True)) / temperature)

    loss = 0.0
    for i in range(n):
        loss -= math.log(weight(r[i], hat[i]) / sum(weight(r[k], hat[i]) for k in range(n)))
        for j in range(n):
            if j != i:
                loss -= math.log(1.0 - weight(r[j], r[i]) / sum(weight(r[k], r[i]) for k in range(n)))
    return loss / n


def super_and_augmentation_of_the_code(first: Tensor, second: Tensor, bank: Tensor, temperature: float) -> float:
    """Super-AND, the authors' code instead of eqs. 13 and 14: all 2n relations of both views, no i = k in the sums."""
    x, n = [*_relations(first, bank), *_relations(second, bank)], len(first)
    loss = 0.0
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        weights = {
            k: math.exp(sum(a * b for a, b in zip(x[i], x[k], strict=True)) / temperature)
            for k in range(2 * n)
            if k != i
        }
        total = sum(weights.values())
        loss -= math.log(weights[positive] / total)
        loss -= sum(math.log(1.0 - w / total) for k, w in weights.items() if k != positive)
    return loss / (2 * n)


def super_and_neighbours(
    bank: Tensor, temperature: float, features: Tensor | None = None
) -> tuple[list[int], list[float]]:
    """Super-AND, eqs. 7 and 9 for every image, whose f(x) is its row of `features`, or of the bank.

    They are the nearest other image (of equal ones the lowest), and the entropy of its softmax over all rows of the
    bank.
    """
    nearest, entropies = [], []
    embeddings = bank if features is None else features
    for i, row in enumerate(embeddings):
        nearest.append(max((j for j in range(len(bank)) if j != i), key=lambda j: (_dot(row, embeddings[j]), -j)))
        p = super_and_probabilities(row, bank, temperature)
        entropies.append(-sum(x * math.log(x) for x in p))
    return nearest, entropies


def dae_loss(clean: Tensor, reconstructed: Tensor) -> float:
    """Denoising auto-encoder, section 3.2: the Euclidean loss 1/(2N) sum_i || x_i - f(x~_i) ||^2, pixel by pixel."""
    total = 0.0
    for x, y in zip(clean, reconstructed, strict=True):
        for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
            total += (a - b) ** 2
    return total / (2 * len(clean))


def dae_psnr(clean: Tensor, reconstructed: Tensor) -> float:
    """Denoising auto-encoder, table 6: the mean over images of 10 log10(1 / MSE), pixels in 0..1."""
    decibels = []
    for x, y in zip(clean, reconstructed, strict=True):
        errors = [(a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)]
        decibels.append(10 * math.log10(len(errors) / sum(errors)))
    return sum(decibels) / len(decibels)


def dae_blocked(image: Tensor, squares: list[tuple[int, int, int]], mean: list[float]) -> Tensor:
    """Denoising auto-encoder, section 3.3: sets (side, top, left) squares of one (3, S, S) image to the mean."""
    out = image.clone()
    for side, top, left in squares:
        for y in range(top, top + side):
            for x in range(left, left + side):
                for channel in range(3):
                    out[channel, y, x] = mean[channel]
    return out
