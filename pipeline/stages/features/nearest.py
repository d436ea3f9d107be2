"""Finds the nearest images of some images, by the cosine of their features."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from firstlight.pipeline.data.splits import select_evenly_spaced

# Queries in a picture, and images found for each of them.
NUM_NEIGHBOURS = 8

# The id of each query with the ids of the images found for it, the nearest first; -1 where there are no more.
Neighbours = Sequence[tuple[int, Sequence[int]]]


def choose_queries(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the positions of up to NUM_NEIGHBOURS of `ids`, of as many classes as there are. `labels` (n,) is indexed
    by id.
    """
    return select_evenly_spaced(np.argsort(labels[ids], kind="stable"), NUM_NEIGHBOURS)


def find_nearest(ids: np.ndarray, features: Tensor, labels: np.ndarray) -> list[tuple[int, list[int]]]:
    """Returns, for some of the (n,) `ids`, the nearest others by the cosine of their (n, d) features."""
    asked = choose_queries(ids, labels)
    unit = F.normalize(features.double(), dim=1)
    cosines = unit[asked] @ unit.T
    # An image does not find itself.
    cosines[range(len(asked)), asked] = -2.0
    count = min(NUM_NEIGHBOURS, len(ids) - 1)
    nearest = cosines.argsort(dim=1, descending=True, stable=True)[:, :count].cpu().numpy()
    return [(int(ids[place]), ids[row].tolist()) for place, row in zip(asked, nearest, strict=True)]
