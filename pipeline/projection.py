"""Embeddings on a plane, for a picture: their first principal components, or t-SNE (van der Maaten and Hinton 2008)."""

from typing import Literal

import numpy as np

Projection = Literal["pca", "tsne"]
FEWEST = 5  # embeddings, for t-SNE


def project(embeddings: np.ndarray, how: Projection) -> tuple[np.ndarray, tuple[str, str]]:
    """(n, C) -> (n, 2) places, and what the two axes are."""
    if how == "tsne" and len(embeddings) >= FEWEST:
        return _tsne(embeddings), ("t-SNE 1", "t-SNE 2")
    return _principal(embeddings)


def _principal(embeddings: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    centred = np.asarray(embeddings, np.float64) - embeddings.mean(0, dtype=np.float64)
    spread, axes = np.linalg.eigh(centred.T @ centred)
    components = axes[:, ::-1][:, :2]
    points = centred @ (components * np.where(components.sum(0) < 0, -1.0, 1.0))  # an eigenvector has no sign of its own
    share = 100 * np.append(spread[::-1], 0.0)[:2] / max(spread.sum(), 1e-12)
    first, second = (f"principal component {k + 1} ({part:.0f} % of the variance)" for k, part in enumerate(share))
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))), (first, second)


def _tsne(embeddings: np.ndarray) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(np.asarray(embeddings, np.float32)), np.float64)
