"""Figures of images in rows and columns: samples, methods' image grids, filters and nearest images."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from firstlight.pipeline.report.figures import RED
from firstlight.pipeline.report.grid import GridFigure, display_names
from firstlight.pipeline.stages.features.nearest import Neighbours
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.visuals import ImageGrid, ImageRow


def draw_captioned_images(
    pictures: Sequence[np.ndarray], captions: Sequence[str], title: str, columns: int = 8
) -> Figure:
    """Draws (H, W, 3) uint8 images, each with a caption."""
    board = GridFigure(max(1, -(-len(pictures) // columns)), columns, 1.1, title)
    for k, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        board.draw_image(k // columns, k % columns, picture)
        board.draw_caption(k // columns, k % columns, caption, size=7, centred=True)
    return board.figure


def draw_image_grid(shown: ImageGrid) -> Figure:
    """Draws rows of images with a caption over each row. Maps are drawn as heat over the images, gray and dimmed."""
    board = GridFigure(len(shown.rows), max(len(row.images) for row in shown.rows), 1.1, shown.title)
    for number, row in enumerate(shown.rows):
        board.draw_caption(number, 0, row.caption)
        for k, image in enumerate(row.images.float().clamp(0, 1).permute(0, 2, 3, 1).numpy()):
            if row.maps is None:
                board.draw_image(number, k, image)
                continue
            board.draw_image(number, k, 0.75 * image.mean(2), cmap="gray", vmin=0, vmax=1)
            heat = np.asarray(
                Image.fromarray(row.maps[k].float().numpy()).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
            )
            board.draw_image(number, k, heat, cmap="inferno", vmin=0, vmax=1, alpha=0.6)
    return board.figure


def draw_image_rows(shown: Mapping[str, Tensor], title: str) -> Figure:
    """Draws (B, 3, H, W) images in 0..1 by caption: a row for each caption, a column for each image."""
    return draw_image_grid(
        ImageGrid("", title, tuple(ImageRow(caption, images_) for caption, images_ in sorted(shown.items())))
    )  # tensors in a file have no order


def draw_filters(towers: Sequence[np.ndarray], composed: bool) -> Figure:
    """Draws the (n, c, k, k) weights of a network's first convolution, for each of its towers.

    Three channels are drawn as colours, other numbers of channels by their mean. `composed` says that the weights are
    combined with the fixed filter before them, so that they act on the image.
    """
    lines = [-(-min(len(weights), 64) // 16) for weights in towers]
    board = GridFigure(
        sum(lines),
        16,
        0.5,
        "filters of the first convolution" + (", as they act on the image" if composed else ""),
        above=0.0,
    )
    for k, weights in enumerate(towers):
        shown = weights.transpose(0, 2, 3, 1) if weights.shape[1] == 3 else weights.mean(1)
        for number, one in enumerate(shown[:64]):
            low, high = one.min(), one.max()
            board.draw_image(
                sum(lines[:k]) + number // 16,
                number % 16,
                (one - low) / max(high - low, 1e-9),
                cmap=None if one.ndim == 3 else "gray",
            )
    return board.figure


def draw_neighbour_rows(
    rows_: Sequence[tuple[np.ndarray, Sequence[np.ndarray], Sequence[bool]]], captions: Sequence[str], title: str
) -> Figure:
    """Draws a row for each query.

    A row has the (H, W, 3) uint8 image of the query, the images found for it in their order, and a bool for each of
    them: True for those of another class, which are framed red.
    """
    columns = max((len(found) for _, found, _ in rows_), default=0)
    left = 0.1 + 0.065 * max(map(len, captions), default=0)
    board = GridFigure(len(rows_), columns + 1, 0.9, title, above=0.0, left=left, apart=0.12)
    for number, ((query, found, wrong), caption) in enumerate(zip(rows_, captions, strict=True)):
        board.draw_row_label(number, caption)
        for k, (picture_, bad) in enumerate(zip((query, *found), (False, *wrong), strict=True)):
            board.draw_image(number, k, picture_)
            if bad:
                board.draw_frame(number, k, RED)
    return board.figure


def draw_neighbours(worker: StageContext, shown: Neighbours, title: str) -> Figure:
    """Draws the images nearest to each query, those of another class framed red. `shown`: ids of queries and images."""
    loader, labels = worker.build_loader([worker.recipe.dataset.eval_augment], 0), worker.splits.labels
    found = [[i for i in row if i >= 0] for _, row in shown]
    ids = np.unique([query for query, _ in shown] + [i for row in found for i in row])
    pixels = dict(zip(ids.tolist(), loader.load_once(ids)["views"][:, 0], strict=True))
    rows = []
    for (query, _), row in zip(shown, found, strict=True):
        wrong = [min(labels[i], labels[query]) >= 0 and labels[i] != labels[query] for i in row]
        rows.append((pixels[query], [pixels[i] for i in row], wrong))
    names = display_names(worker.store.classes[labels[query]] if labels[query] >= 0 else "" for query, _ in shown)
    return draw_neighbour_rows(rows, names, title)
