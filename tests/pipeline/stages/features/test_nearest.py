"""Nearest images by cosine."""

import numpy as np
import torch

from firstlight.pipeline.stages.features.nearest import NUM_NEIGHBOURS, find_nearest


def test_the_nearest_others_are_found_by_cosine_and_never_the_image_itself() -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(30, 5, generator=rng) * torch.rand(30, 1, generator=rng) * 10
    ids, labels = np.arange(100, 130), np.full(200, -1)
    labels[100:130] = np.arange(30) % 3
    unit = features / features.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T - 3 * torch.eye(30)
    found = find_nearest(ids, features, labels)
    assert len(found) == NUM_NEIGHBOURS
    assert {labels[query] for query, _ in found} == {0, 1, 2}, "queries are of all classes"
    for query, row in found:
        assert len(row) == NUM_NEIGHBOURS
        assert row == [100 + int(k) for k in cosines[query - 100].argsort(descending=True)[:NUM_NEIGHBOURS]]


def test_few_images_have_few_neighbours() -> None:
    found = find_nearest(np.array([4, 7, 9]), torch.eye(3), np.full(10, -1))
    assert [query for query, _ in found] == [4, 7, 9]
    assert all(len(row) == 2 and query not in row for query, row in found)
