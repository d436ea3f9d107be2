"""Pictures of the images that are nearest to others."""

import numpy as np
from matplotlib.figure import Figure

from firstlight.pipeline.report import figures
from firstlight.pipeline.report.grid import shown_names
from firstlight.pipeline.stages.nearest import Neighbours
from firstlight.pipeline.train.context import StageContext


def picture(worker: StageContext, shown: Neighbours, title: str) -> Figure:
    """A row a query, those of another class framed red."""
    loader, labels = worker.build_loader([worker.recipe.dataset.eval_augment], 0), worker.splits.labels
    found = [[i for i in row if i >= 0] for _, row in shown]
    ids = np.unique([query for query, _ in shown] + [i for row in found for i in row])
    pixels = dict(zip(ids.tolist(), loader.load_once(ids)["views"][:, 0], strict=True))
    rows = []
    for (query, _), row in zip(shown, found, strict=True):
        wrong = [min(labels[i], labels[query]) >= 0 and labels[i] != labels[query] for i in row]
        rows.append((pixels[query], [pixels[i] for i in row], wrong))
    names = shown_names(worker.store.classes[labels[query]] if labels[query] >= 0 else "" for query, _ in shown)
    return figures.draw_neighbour_rows(rows, names, title)
