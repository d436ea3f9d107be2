"""Pictures of the images that are nearest to others."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from firstlight.pipeline.data.splits import spread
from firstlight.pipeline.report import figures
from firstlight.pipeline.report.grid import shown_names
from firstlight.pipeline.train.context import Worker

SHOWN = 8  # queries in a picture, and images found for each

Shown = Sequence[
    tuple[int, Sequence[int]]
]  # ids of a query, and of the images found for it, the nearest first; -1: no more


def queries(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Places of up to SHOWN of `ids`, of as many classes as there are. `labels`: of the whole store, by id."""
    return spread(np.argsort(labels[ids], kind="stable"), SHOWN)


def among(ids: np.ndarray, features: Tensor, labels: np.ndarray) -> list[tuple[int, list[int]]]:
    """For some of (n,) `ids` their nearest others, by the cosine of their (n, d) features."""
    asked = queries(ids, labels)
    unit = F.normalize(features.double(), dim=1)
    cosines = unit[asked] @ unit.T
    cosines[range(len(asked)), asked] = -2.0  # itself
    nearest = cosines.argsort(dim=1, descending=True, stable=True)[:, : min(SHOWN, len(ids) - 1)].cpu().numpy()
    return [(int(ids[place]), ids[row].tolist()) for place, row in zip(asked, nearest, strict=True)]


def picture(worker: Worker, shown: Shown, title: str) -> Figure:
    """A row a query, those of another class framed red."""
    loader, labels = worker.loader([worker.recipe.dataset.eval_augment], 0), worker.splits.labels
    found = [[i for i in row if i >= 0] for _, row in shown]
    ids = np.unique([query for query, _ in shown] + [i for row in found for i in row])
    pixels = dict(zip(ids.tolist(), loader.once(ids)["views"][:, 0], strict=True))
    rows = []
    for (query, _), row in zip(shown, found, strict=True):
        wrong = [min(labels[i], labels[query]) >= 0 and labels[i] != labels[query] for i in row]
        rows.append((pixels[query], [pixels[i] for i in row], wrong))
    names = shown_names(worker.store.classes[labels[query]] if labels[query] >= 0 else "" for query, _ in shown)
    return figures.neighbours(rows, names, title)
