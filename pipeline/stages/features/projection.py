"""Embeddings on a plane: their first two principal components, or t-SNE (van der Maaten and Hinton 2008)."""

from typing import Literal

import numpy as np

MapProjection = Literal["pca", "tsne"]
PlaneMap = tuple[np.ndarray, tuple[str, str]]  # (n, 2) places, and what the two axes are
MIN_TSNE_EMBEDDINGS = 5  # embeddings, for t-SNE


def project_to_plane(embeddings: np.ndarray, how: MapProjection) -> PlaneMap:
    """Returns (n, 2) positions of (n, C) embeddings, and the names of both axes."""
    if how == "tsne" and len(embeddings) >= MIN_TSNE_EMBEDDINGS:
        return _project_tsne(embeddings), ("t-SNE 1", "t-SNE 2")
    points, share = project_principal(embeddings)
    return points, name_principal_axes(share)


def project_principal(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (n, 2) positions of (n, C) embeddings on their first two principal components, and (2,) the percentages
    of variance.
    """
    x = np.asarray(embeddings, np.float64) - embeddings.mean(0, dtype=np.float64)
    few = len(x) < x.shape[1]
    spread, axes = np.linalg.eigh(x @ x.T if few else x.T @ x)  # of the smaller matrix: both have the same variances
    first, share = axes[:, ::-1][:, :2], 100 * spread[::-1][:2] / max(spread.sum(), 1e-12)
    points = first * np.sqrt(spread[::-1][:2].clip(0)) if few else x @ first
    largest = points[np.abs(points).argmax(0), np.arange(points.shape[1])]
    points = points * np.where(largest < 0, -1.0, 1.0)  # an eigenvector has no sign of its own
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))), np.pad(share, (0, 2 - len(share)))


def name_principal_axes(share: np.ndarray) -> tuple[str, str]:
    """Returns the names of the axes of `project_principal`. `share`: (2,) percentages of variance."""
    first, second = (
        f"principal component {k + 1} ({part:.0f} % of the variance)" for k, part in enumerate(share.tolist())
    )
    return first, second


def _project_tsne(embeddings: np.ndarray) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    return np.asarray(
        TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(np.asarray(embeddings, np.float32)),
        np.float64,
    )
