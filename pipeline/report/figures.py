"""Pictures that the stages leave in MLflow, drawn with matplotlib: readable on a light and on a dark page (they bring their own white)."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from firstlight.pipeline.data.image_statistics import BINS_PER_OCTAVE
from firstlight.pipeline.report.grid import Board, shown_names
from firstlight.pipeline.stages.projection import PlaneMap
from firstlight.tasks.visuals import ImageGrid, ImageRow

MAX_CLASS_BARS = 40  # classes that have a bar of their own, at most
BLUE, GRAY, RED = "#2458a6", "#9aa5b1", "#b3372e"


def style_axes(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)


def draw_captioned_images(pictures: Sequence[np.ndarray], captions: Sequence[str], title: str, columns: int = 8) -> Figure:
    """(H, W, 3) uint8 images with a caption each."""
    board = Board(max(1, -(-len(pictures) // columns)), columns, 1.1, title)
    for k, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        board.image(k // columns, k % columns, picture)
        board.caption(k // columns, k % columns, caption, size=7, centred=True)
    return board.figure


def draw_image_grid(shown: ImageGrid) -> Figure:
    """Rows of images, a caption over each, and maps as heat over the images, gray and dimmed."""
    board = Board(len(shown.rows), max(len(row.images) for row in shown.rows), 1.1, shown.title)
    for number, row in enumerate(shown.rows):
        board.caption(number, 0, row.caption)
        for k, image in enumerate(row.images.float().clamp(0, 1).permute(0, 2, 3, 1).numpy()):
            if row.maps is None:
                board.image(number, k, image)
                continue
            board.image(number, k, 0.75 * image.mean(2), cmap="gray", vmin=0, vmax=1)
            heat = np.asarray(
                Image.fromarray(row.maps[k].float().numpy()).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
            )
            board.image(number, k, heat, cmap="inferno", vmin=0, vmax=1, alpha=0.6)
    return board.figure


def draw_image_rows(shown: Mapping[str, Tensor], title: str) -> Figure:
    """(B, 3, H, W) images in 0..1 by caption: a row each, the same image in a column."""
    return draw_image_grid(
        ImageGrid("", title, tuple(ImageRow(caption, images_) for caption, images_ in sorted(shown.items())))
    )  # tensors in a file have no order


def draw_class_counts(by_class: Mapping[str, Sequence[int]], splits: Sequence[str], title: str = "images per class") -> Figure:
    """Images per class, or what `title` says, a bar a split; of more than BARS classes the counts alone, from the most to the least."""
    if len(by_class) > MAX_CLASS_BARS:
        return _draw_sorted_counts(by_class, splits, title)
    figure = Figure(figsize=(max(5.0, 0.45 * len(by_class) + 2), 3.2), layout="constrained", facecolor="white")
    axis = figure.subplots()
    width = 0.8 / max(len(splits), 1)
    for k, split in enumerate(splits):
        axis.bar(
            np.arange(len(by_class)) + k * width,
            [v[k] for v in by_class.values()],
            width,
            label=split,
            color=(BLUE, RED, GRAY)[k % 3],
        )
    crowded = len(by_class) > 10 or sum(map(len, by_class)) > 45
    axis.set_xticks(
        np.arange(len(by_class)) + 0.4 - width / 2, shown_names(by_class), rotation=45 if crowded else 0, fontsize=8
    )
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    style_axes(axis, title)
    return figure


def _draw_sorted_counts(by_class: Mapping[str, Sequence[int]], splits: Sequence[str], title: str) -> Figure:
    figure = Figure(figsize=(7.0, 3.2), layout="constrained", facecolor="white")
    axis = figure.subplots()
    for k, split in enumerate(splits):
        axis.plot(
            sorted((v[k] for v in by_class.values()), reverse=True),
            label=split,
            color=(BLUE, RED, GRAY)[k % 3],
            linewidth=1.8,
        )
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"the {len(by_class):,} classes, from the most to the least", fontsize=8)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    style_axes(axis, title)
    return figure


def draw_store_statistics(images: Mapping[str, Any], quarantined: int) -> Figure:
    """What a store's manifest says of its images: a map of their sizes, bars of modes and formats, and how many are copies or cannot be decoded."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained", facecolor="white")
    sizes, *bars = figure.subplots(1, 3, width_ratios=[2.2, 1, 1])
    _draw_size_map(sizes, images)
    for axis, title in zip(bars, ("modes", "formats"), strict=True):
        found = _group_small_counts(images[title])
        axis.bar([name for name, _ in found], [count for _, count in found], 0.6, color=BLUE)
        axis.set_xlim(-0.7, max(len(found), 3) - 0.3)
        axis.set_ylim(0, 1.15 * found[0][1])
        for k, (_, count) in enumerate(found):
            axis.text(k, count, f"{count:,}", ha="center", va="bottom", fontsize=7)
        axis.set_yticks([])
        axis.tick_params(axis="x", labelsize=8, rotation=45 if len(found) > 4 else 0)
        style_axes(axis, title)
        axis.spines["left"].set_visible(False)
    copies = images.get("duplicates", {}).get("copies", 0)
    figure.suptitle(
        f"{copies:,} are copies of others; {quarantined:,} more cannot be decoded", fontsize=8, x=0.01, ha="left"
    )
    return figure


def _group_small_counts(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The eight largest, the last of which stands for all others where there are more."""
    found = sorted(counts.items(), key=lambda pair: -pair[1])
    return found if len(found) <= 8 else [*found[:7], ("others", sum(count for _, count in found[7:]))]


def _draw_size_map(axis: Axes, images: Mapping[str, Any]) -> None:
    """Images per width and height, both in quarters of an octave."""
    bins = np.array([[width, height] for width, height, _ in images["sizes"]])
    low, high = bins.min(0) - BINS_PER_OCTAVE, bins.max(0) + BINS_PER_OCTAVE + 1
    grid = np.zeros(tuple((high - low)[::-1]))
    for width, height, count in images["sizes"]:
        grid[height - low[1], width - low[0]] = count
    edges = [2.0 ** (np.arange(a, b + 1) / BINS_PER_OCTAVE) for a, b in zip(low, high, strict=True)]
    mesh = axis.pcolormesh(*edges, np.ma.masked_equal(grid, 0), cmap="Blues", norm=LogNorm(0.5, grid.max()))
    for set_scale, set_ticks, side in (
        (axis.set_xscale, axis.set_xticks, edges[0]),
        (axis.set_yscale, axis.set_yticks, edges[1]),
    ):
        set_scale("log", base=2)
        octaves = np.arange(np.ceil(np.log2(side[0])), np.log2(side[-1]) + 1e-9, max(1, len(side) // (8 * BINS_PER_OCTAVE) + 1))
        set_ticks(2**octaves, [f"{2**k:g}" for k in octaves], fontsize=8)
    axis.axline((1, 1), (2, 2), color=GRAY, linewidth=0.8, linestyle=":")
    axis.set_xlim(edges[0][0], edges[0][-1])
    axis.set_ylim(edges[1][0], edges[1][-1])
    axis.set_xlabel("width (pixels)", fontsize=8)
    axis.set_ylabel("height (pixels)", fontsize=8)
    bar = axis.figure.colorbar(mesh, ax=axis, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.ax.set_title("images", fontsize=7)
    count = int(grid.sum())
    (width, wide), (height, high_) = images["width"], images["height"]
    one = f"{width} x {height}" if (width, height) == (wide, high_) else f"{width}-{wide} x {height}-{high_}"
    axis.set_title(f"{count:,} images: {one} pixels", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def draw_filters(towers: Sequence[np.ndarray], composed: bool) -> Figure:
    """(n, c, k, k) weights of a network's first convolution, for each of its towers; three channels are shown as colours, others by their mean.
    `composed`: with the fixed filter before it, as it acts on the image."""
    lines = [-(-min(len(weights), 64) // 16) for weights in towers]
    board = Board(
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
            board.image(
                sum(lines[:k]) + number // 16,
                number % 16,
                (one - low) / max(high - low, 1e-9),
                cmap=None if one.ndim == 3 else "gray",
            )
    return board.figure


def draw_confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Figure:
    """(classes, classes) counts: rows are labels, columns predictions; shown as shares of the row."""
    table = np.asarray(matrix, dtype=float)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(9.0, 0.45 * len(classes) + 2)
    figure = Figure(figsize=(side, side), layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:
        names = shown_names(classes)
        axis.set_xticks(range(len(classes)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(classes)), names, fontsize=8)
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.005:
                axis.text(
                    column,
                    row,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value > 0.5 else "black",
                )
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    axis.set_title(title, loc="left", fontsize=10)
    return figure


def draw_comparison(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Rows with `stage`, `measure`, `pretrained` and `baseline` (accuracies by seed, 0..1), `against`: bars of the means, dots for the seeds."""
    figure = Figure(figsize=(8.0, 0.62 * len(rows) + 1.1), layout="constrained", facecolor="white")
    axis = figure.subplots()
    for k, row in enumerate(rows):
        for shift, key, colour in ((-0.2, "pretrained", BLUE), (0.2, "baseline", GRAY)):
            values = 100 * np.asarray(row[key])
            axis.barh(k + shift, values.mean(), 0.38, color=colour, alpha=0.85)
            axis.plot(values, np.full(len(values), k + shift), "o", color="black", markersize=3)
            axis.text(values.max() + 1.2, k + shift, f"{values.mean():.1f}", va="center", fontsize=8)
    axis.set_yticks(
        range(len(rows)), [f"{r['measure']}\n{r['stage']}, against {r['against']}" for r in rows], fontsize=8
    )
    axis.set(xlim=(0, 108), ylim=(len(rows) - 0.5, -0.6))
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    told = "test scores (%): pretrained (blue), the same network without (gray); dots are seeds"
    figure.suptitle(told, fontsize=10, x=0.01, ha="left")
    return figure


def draw_neighbour_rows(
    rows_: Sequence[tuple[np.ndarray, Sequence[np.ndarray], Sequence[bool]]], captions: Sequence[str], title: str
) -> Figure:
    """A row a query: its (H, W, 3) uint8 image, the images found for it in their order, and which of them are wrong: they are framed red."""
    columns = max((len(found) for _, found, _ in rows_), default=0)
    left = 0.1 + 0.065 * max(map(len, captions), default=0)
    board = Board(len(rows_), columns + 1, 0.9, title, above=0.0, left=left, apart=0.12)
    for number, ((query, found, wrong), caption) in enumerate(zip(rows_, captions, strict=True)):
        board.beside(number, caption)
        for k, (picture_, bad) in enumerate(zip((query, *found), (False, *wrong), strict=True)):
            board.image(number, k, picture_)
            if bad:
                board.frame(number, k, RED)
    return board.figure


def draw_embedding_map(maps: Mapping[str, PlaneMap], labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """Embeddings of the same images by title, as `project` places them, coloured by (n,) labels (-1: gray) where at most 20 classes occur."""
    present = sorted(set(labels[labels >= 0].tolist()))
    alone = len(maps) == 1
    figure = Figure(
        figsize=(6.6, 4.6) if alone else (4.2 * len(maps) + 1.2, 3.9), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    names, named = shown_names(classes), 0 < len(present) <= 20
    colours = matplotlib.colormaps["tab20" if len(present) > 10 else "tab10"]
    size = 3 if len(labels) > 500 else 5
    for axis, (title, (points, captions)) in zip(axes, maps.items(), strict=True):
        for colour, k in enumerate(present if named else ()):
            axis.plot(
                *points[labels == k].T,
                "o",
                color=colours(colour),
                markersize=size,
                alpha=0.7,
                markeredgewidth=0,
                label=names[k],
            )
        rest = points[labels < 0] if named else points
        axis.plot(*rest.T, "o", color=GRAY if named else BLUE, markersize=size, alpha=0.6, markeredgewidth=0, zorder=0)
        axis.set_xlabel(captions[0], fontsize=8)
        axis.set_ylabel(captions[1], fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    if named:
        axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=6 / size)
    return figure
