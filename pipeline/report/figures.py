"""Charts that the stages log in MLflow. They have a white background, so they are readable on light and dark pages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from firstlight.pipeline.data.image_statistics import BINS_PER_OCTAVE
from firstlight.pipeline.report.grid import display_names
from firstlight.pipeline.report.scores.arm_scores import ArmScores
from firstlight.pipeline.stages.features.projection import PlaneMap

# The most classes whose counts are drawn as bars; those of more are drawn as sorted lines.
MAX_CLASS_BARS = 40
BLUE, GRAY, RED = "#2458a6", "#9aa5b1", "#b3372e"
# The colours of the bars of arms; fresh weights are gray.
BAR_COLOURS = {"pretrained": BLUE, "pretrained_decoder": "#7a5aa6", "given": "#d08c1c"}


def style_axes(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)


def draw_class_counts(
    by_class: Mapping[str, Sequence[int]], splits: Sequence[str], title: str = "images per class"
) -> Figure:
    """Draws counts by class, one for each split.

    They are bars, or sorted lines without names if there are more than MAX_CLASS_BARS classes. `title` says what is
    counted.
    """
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
        np.arange(len(by_class)) + 0.4 - width / 2, display_names(by_class), rotation=45 if crowded else 0, fontsize=8
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
    """Draws the statistics of a store's manifest: a map of image sizes, and bars of modes and formats.

    The title counts copies and the `quarantined` images, which cannot be decoded.
    """
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
    """Returns the eight largest counts; if there are more, the seven largest and the sum of the rest as `others`."""
    found = sorted(counts.items(), key=lambda pair: -pair[1])
    return found if len(found) <= 8 else [*found[:7], ("others", sum(count for _, count in found[7:]))]


def _draw_size_map(axis: Axes, images: Mapping[str, Any]) -> None:
    """Draws the number of images per width and height, both in quarters of an octave."""
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
        octaves = np.arange(
            np.ceil(np.log2(side[0])), np.log2(side[-1]) + 1e-9, max(1, len(side) // (8 * BINS_PER_OCTAVE) + 1)
        )
        set_ticks(2**octaves, [f"{2**k:g}" for k in octaves], fontsize=8)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_minor_formatter(NullFormatter())
    axis.axline((1, 1), (2, 2), color=GRAY, linewidth=0.8, linestyle=":")
    axis.set_xlim(edges[0][0], edges[0][-1])
    axis.set_ylim(edges[1][0], edges[1][-1])
    axis.set_xlabel("width (pixels)", fontsize=8)
    axis.set_ylabel("height (pixels)", fontsize=8)
    bar = axis.figure.colorbar(mesh, ax=axis, fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda count, position: f"{count:,.0f}")
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(labelsize=7)
    bar.ax.set_title("images", fontsize=7)
    count = int(grid.sum())
    (width, wide), (height, high_) = images["width"], images["height"]
    one = f"{width} x {height}" if (width, height) == (wide, high_) else f"{width}-{wide} x {height}-{high_}"
    axis.set_title(f"{count:,} images: {one} pixels", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def draw_confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Figure:
    """Draws a (classes, classes) matrix of counts, rows labels and columns predictions, as shares of each row."""
    table = np.asarray(matrix, dtype=float)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(9.0, 0.45 * len(classes) + 2)
    figure = Figure(figsize=(side, side), layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:
        names = display_names(classes)
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
    """Draws the scores of rows with a baseline: bars are means, dots are seeds.

    A row has `stage`, `measure`, `against` (the name of the baseline), and the scores `pretrained` and `baseline`, each
    in 0..1 by seed.
    """
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
    caption = "test scores (%): pretrained (blue), the same network without (gray); dots are seeds"
    figure.suptitle(caption, fontsize=10, x=0.01, ha="left")
    return figure


def draw_arm_comparison(measures: Sequence[ArmScores]) -> Figure:
    """Draws the scores of measures with a bar for each arm: bars are means, dots are seeds."""
    bars = [(k, arm, scores) for k, measure in enumerate(measures) for arm, scores in measure.arms.items()]
    # The bars of a measure touch each other, and half a bar is free between measures.
    places = [bar + 0.5 * k for bar, (k, _, _) in enumerate(bars)]
    figure = Figure(figsize=(8.0, 0.31 * (len(bars) + 0.5 * len(measures)) + 1.1), layout="constrained")
    figure.set_facecolor("white")
    axis = figure.subplots()
    for place, (k, arm, scores) in zip(places, bars, strict=True):
        values = measures[k].scale * np.asarray(scores)
        axis.barh(place, values.mean(), 0.95, color=BAR_COLOURS.get(arm, GRAY), alpha=0.85)
        axis.plot(values, np.full(len(values), place), "o", color="black", markersize=3)
        axis.text(values.max() + 1.2, place, f"{values.mean():.1f}  {arm.replace('_', ' ')}", va="center", fontsize=8)
    middles = [
        np.mean([place for place, (k, _, _) in zip(places, bars, strict=True) if k == number])
        for number in range(len(measures))
    ]
    axis.set_yticks(middles, [f"{measure.label}\n{measure.stage}" for measure in measures], fontsize=8)
    axis.set(xlim=(0, 125), ylim=(places[-1] + 0.8, -0.8), xticks=range(0, 101, 20))
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    figure.suptitle("test scores (%) by the weights; dots are seeds", fontsize=10, x=0.01, ha="left")
    return figure


def draw_embedding_map(maps: Mapping[str, PlaneMap], labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draws maps of the embeddings of the same n images, side by side by title.

    Points are coloured by their (n,) labels if at most 20 classes occur; -1, which is no label, is gray.
    """
    present = sorted(set(labels[labels >= 0].tolist()))
    alone = len(maps) == 1
    figure = Figure(
        figsize=(6.6, 4.6) if alone else (4.2 * len(maps) + 1.2, 3.9), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    names, named = display_names(classes), 0 < len(present) <= 20
    colours = colormaps["tab20" if len(present) > 10 else "tab10"]
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
