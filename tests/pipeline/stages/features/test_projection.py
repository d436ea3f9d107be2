from typing import get_args

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from firstlight.pipeline.report import figures
from firstlight.pipeline.stages.features.projection import MapProjection, project_principal, project_to_plane


def clusters(n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    return (np.eye(8)[labels] * 20 + rng.normal(size=(n, 8))).astype(np.float32), labels


@pytest.mark.parametrize(("images", "dimensions"), [(60, 8), (20, 300), (5, 1), (40, 40)])
def test_principal_components_are_those_of_scikit_learn_up_to_their_sign(images: int, dimensions: int) -> None:
    x = np.random.default_rng(0).normal(size=(images, dimensions)) * np.linspace(3, 0.1, dimensions) + 7
    points, share = project_principal(x.astype(np.float32))
    assert points.shape == (images, 2)
    count = min(2, dimensions)
    wanted = PCA(count).fit(x)
    np.testing.assert_allclose(np.abs(points[:, :count]), np.abs(wanted.transform(x)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(share[:count], 100 * wanted.explained_variance_ratio_, rtol=1e-3)
    again, _ = project_principal(-x)
    assert (np.abs(points).max(0) == points.max(0)).all(), "the point that is farthest out is at the positive side"
    assert (np.abs(again).max(0) == again.max(0)).all()


def test_equal_embeddings_can_be_projected() -> None:
    points, share = project_principal(np.ones((6, 3), np.float32))
    assert np.isfinite(points).all()
    assert np.isfinite(share).all()


def test_tsne_keeps_neighbours_and_is_the_same_each_time() -> None:
    x, labels = clusters()
    points, axes = project_to_plane(x, "tsne")
    assert axes == ("t-SNE 1", "t-SNE 2")
    assert np.array_equal(points, project_to_plane(x, "tsne")[0])
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.eye(len(x)) * 1e9
    assert np.array_equal(labels[distances.argmin(1)], labels)


@pytest.mark.parametrize("how", get_args(MapProjection))
@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_embeddings_can_be_projected(how: MapProjection, n: int) -> None:
    points, _ = project_to_plane(clusters(n)[0], how)
    assert points.shape == (n, 2)
    assert np.isfinite(points).all()


def test_one_dimension_is_projected_to_a_line() -> None:
    points, axes = project_to_plane(np.arange(4.0)[:, None], "pca")
    assert points.shape == (4, 2)
    assert not points[:, 1].any()
    assert axes[1].endswith("(0 % of the variance)")


def test_legend_lists_only_present_classes() -> None:
    points, axes = project_to_plane(clusters()[0], "pca")
    figure = figures.draw_embedding_map(
        {"three": (points, axes)}, np.where(clusters()[1] == 2, -1, clusters()[1]), ("a", "b", "c")
    )
    assert isinstance(figure, Figure)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
