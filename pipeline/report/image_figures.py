"""Figures of images in rows and columns: samples, methods' image grids, filters and nearest images."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from firstlight.pipeline.report.figures import RED
from firstlight.pipeline.report.grid import GridFigure, display_names
from firstlight.pipeline.stages.features.nearest import Neighbours
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.device.pixel_levels import scale_pixels, send_pixels
from firstlight.tasks.visuals import SHOWN_CHANNELS, ImageGrid, ImageRow, show_channels

# The filters that are drawn of a convolution: all of AlexNet's.
MAX_FILTERS = 96


def draw_captioned_images(
    pictures: Sequence[np.ndarray], captions: Sequence[str], title: str, columns: int = 8
) -> Figure:
    """Draws (H, W, 3) uint8 images, each with a caption."""
    drawing = GridFigure(max(1, -(-len(pictures) // columns)), columns, 1.1, title)
    for k, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        drawing.draw_image(k // columns, k % columns, picture)
        drawing.draw_caption(k // columns, k % columns, caption, size=7, centred=True)
    return drawing.figure


def show_levels(levels: np.ndarray) -> np.ndarray:
    """Returns (B, H, W, C) uint8 or uint16 levels as colours that can be drawn, as `show_channels` shows them."""
    if levels.dtype == np.uint8 and levels.shape[3] == SHOWN_CHANNELS:
        return levels
    shown: np.ndarray = (
        show_channels(scale_pixels(send_pixels(levels, torch.device("cpu")))).permute(0, 2, 3, 1).numpy()
    )
    return shown


def draw_image_grid(grid: ImageGrid) -> Figure:
    """Draws rows of images with a caption over each row. Maps are drawn as heat over the images, gray and dimmed."""
    drawing = GridFigure(len(grid.rows), max(len(row.images) for row in grid.rows), 1.1, grid.title)
    for number, row in enumerate(grid.rows):
        drawing.draw_caption(number, 0, row.caption)
        for k, image in enumerate(show_channels(row.images).float().clamp(0, 1).permute(0, 2, 3, 1).numpy()):
            if row.maps is None:
                drawing.draw_image(number, k, image)
                continue
            drawing.draw_image(number, k, 0.75 * image.mean(2), cmap="gray", vmin=0, vmax=1)
            heat = np.asarray(
                Image.fromarray(row.maps[k].float().numpy()).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
            )
            drawing.draw_image(number, k, heat, cmap="inferno", vmin=0, vmax=1, alpha=0.6)
    return drawing.figure


def draw_image_rows(images: Mapping[str, Tensor], title: str) -> Figure:
    """Draws (B, 3, H, W) images in 0..1 by caption: a row for each caption, a column for each image."""
    # The tensors of a file have no order.
    rows = tuple(ImageRow(caption, batch) for caption, batch in sorted(images.items()))
    return draw_image_grid(ImageGrid("", title, rows))


def draw_filters(networks: Mapping[str, Sequence[np.ndarray]], composed: bool) -> Figure:
    """Draws the (n, c, k, k) weights of the first convolutions of networks by name, for each of their towers.

    Three channels are drawn as colours, other numbers of channels by their mean. `composed` says that the weights are
    combined with the fixed filter before them, so that they act on the image. A network without a name has no label.
    """
    towers = [(name if k == 0 else "", tower) for name, found in networks.items() for k, tower in enumerate(found)]
    lines = [-(-min(len(weights), MAX_FILTERS) // 16) for _, weights in towers]
    left = 0.065 * max(map(len, networks)) + (0.1 if any(networks) else 0.0)
    title = "filters of the first convolution" + (", as they act on the image" if composed else "")
    drawing = GridFigure(sum(lines), 16, 0.5, title, above=0.0, left=left)
    for k, (name, weights) in enumerate(towers):
        first = sum(lines[:k])
        drawing.draw_row_label(first, name)
        drawn = weights.transpose(0, 2, 3, 1) if weights.shape[1] == 3 else weights.mean(1)
        for number, filter_ in enumerate(drawn[:MAX_FILTERS]):
            low, high = filter_.min(), filter_.max()
            drawing.draw_image(
                first + number // 16,
                number % 16,
                (filter_ - low) / max(high - low, 1e-9),
                cmap=None if filter_.ndim == 3 else "gray",
            )
    return drawing.figure


def draw_neighbour_rows(
    queries: Sequence[tuple[np.ndarray, Sequence[np.ndarray], Sequence[bool]]], captions: Sequence[str], title: str
) -> Figure:
    """Draws a row for each query.

    A row has the (H, W, 3) uint8 image of the query, the images found for it in their order, and a bool for each of
    them: True for those of another class, which are framed red.
    """
    columns = max((len(found) for _, found, _ in queries), default=0)
    left = 0.1 + 0.065 * max(map(len, captions), default=0)
    drawing = GridFigure(len(queries), columns + 1, 0.9, title, above=0.0, left=left, apart=0.12)
    for number, ((query, found, wrong), caption) in enumerate(zip(queries, captions, strict=True)):
        drawing.draw_row_label(number, caption)
        for k, (image, bad) in enumerate(zip((query, *found), (False, *wrong), strict=True)):
            drawing.draw_image(number, k, image)
            if bad:
                drawing.draw_frame(number, k, RED)
    return drawing.figure


def draw_neighbours(context: StageContext, neighbours: Neighbours, title: str) -> Figure:
    """Draws the images nearest to each query, with a red frame around those of another class."""
    loader, labels = context.build_loader([context.recipe.dataset.eval_augment], 0), context.splits.labels
    found = [[i for i in row if i >= 0] for _, row in neighbours]
    ids = np.unique([query for query, _ in neighbours] + [i for row in found for i in row])
    pixels = dict(zip(ids.tolist(), show_levels(loader.load_once(ids)["views"][:, 0]), strict=True))
    rows = []
    for (query, _), row in zip(neighbours, found, strict=True):
        wrong = [min(labels[i], labels[query]) >= 0 and labels[i] != labels[query] for i in row]
        rows.append((pixels[query], [pixels[i] for i in row], wrong))
    names = display_names(context.store.classes[labels[query]] if labels[query] >= 0 else "" for query, _ in neighbours)
    return draw_neighbour_rows(rows, names, title)
