"""Neighbourhoods of a round of Super-AND: the images that learn together with their nearest neighbours."""

import torch
from torch import Tensor


def select_neighbours(nearest: Tensor, entropy: Tensor, count: int) -> Tensor:
    """Selects the `count` images of the lowest entropy, of equal ones those of the lowest row (eq. 9).

    Args:
        nearest: (n,) int64, the nearest other image of every image.
        entropy: (n,) entropies.

    Returns:
        (n,) int64, the nearest other image of the selected images, and -1 for all others.
    """
    chosen = entropy.argsort(stable=True)[:count]
    neighbour = torch.full_like(nearest, -1)
    neighbour[chosen] = nearest[chosen]
    return neighbour


def measure_consistency(neighbour: Tensor, labels: Tensor) -> float:
    """Returns the share of the selected images whose neighbour is of their class (figure 4).

    Images count whose label and whose neighbour's label are known; 0 if there are none.

    Args:
        neighbour: (n,) int64, as `select_neighbours` returns them.
        labels: (n,) int64, -1 = unknown.
    """
    chosen = (neighbour >= 0).nonzero()[:, 0]
    own, found = labels[chosen], labels[neighbour[chosen]]
    known = (own >= 0) & (found >= 0)
    return float(((own == found) & known).sum()) / max(int(known.sum()), 1)
