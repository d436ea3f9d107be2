"""Figures of images with their annotations: boxes of objects and maps of classes."""

import sys

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from firstlight.pipeline.data.annotations import Annotation
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.images import decode_class_map
from firstlight.pipeline.data.images.class_maps import VOID_VALUE
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.grid import display_names
from firstlight.pipeline.report.image_figures import show_levels

OVERLAY_COLUMNS = 4
# Pixels of the longer side of an image; more are not visible.
MAX_OVERLAY_SIDE = 480
# The images of a store were within the limit when it was written.
NO_PIXEL_LIMIT = sys.maxsize
MAX_LEGEND_CLASSES = 24


def draw_annotated_images(store: Store, ids: np.ndarray, title: str) -> Figure:
    """Draws the images of `ids`, (n,), with their annotations and a legend of the classes that occur.

    Boxes of difficult objects are dashed.
    """
    files, _ = store.read(ids)
    found, colours, names = (
        store.read_annotations(ids),
        _make_class_colours(len(store.classes)),
        display_names(store.classes),
    )
    rows = -(-len(ids) // OVERLAY_COLUMNS)
    figure = Figure(figsize=(3.1 * OVERLAY_COLUMNS, 2.6 * rows + 1.0), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, OVERLAY_COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    seen: set[int] = set()
    for axis, file, known in zip(axes.flat, files, found, strict=False):
        seen |= draw_annotation(axis, _open_colours(store, file), known, colours)
        if known.present is not None and known.boxes is None:
            axis.set_title(", ".join(names[k] for k in np.flatnonzero(known.present == 1)), fontsize=7, wrap=True)
    handles = [
        Patch(color=(0, 0, 0) if k == VOID_VALUE else colours[k], label="void" if k == VOID_VALUE else names[k])
        for k in sorted(seen)
    ]
    if handles:
        figure.legend(
            handles=handles[:MAX_LEGEND_CLASSES],
            loc="outside lower center",
            ncols=min(8, len(handles)),
            frameon=False,
            fontsize=8,
        )
    figure.suptitle(title, fontsize=10)
    return figure


def _open_colours(store: Store, file: bytes) -> np.ndarray:
    """Returns an image of a store as (H, W, 3) uint8."""
    image = store.open_image(file, NO_PIXEL_LIMIT)
    if not isinstance(image, ChannelImage):
        return np.asarray(image)
    shown: np.ndarray = show_levels(image.values[None])[0]
    return shown if shown.dtype == np.uint8 else np.rint(255 * shown).astype(np.uint8)


def draw_annotation(axis: Axes, image: np.ndarray, known: Annotation, colours: np.ndarray) -> set[int]:
    """Draws an (H, W, 3) uint8 image with its boxes or mask. Returns the classes that occur."""
    height, width = image.shape[:2]
    shrunk = Image.fromarray(image)
    shrunk.thumbnail((MAX_OVERLAY_SIDE, MAX_OVERLAY_SIDE))
    axis.imshow(np.asarray(shrunk), extent=(0, width, height, 0), interpolation="nearest")
    seen: set[int] = set()
    if known.mask is not None:
        values = decode_class_map(known.mask, NO_PIXEL_LIMIT)
        table = np.zeros((256, 3))
        table[: len(colours)] = colours
        axis.imshow(table[values], extent=(0, width, height, 0), alpha=0.55, interpolation="nearest")
        seen |= set(np.unique(values).tolist())
    if known.boxes is not None and known.box_classes is not None and known.difficult is not None:
        for (left, top, right, bottom), kind, hard in zip(
            known.boxes.tolist(), known.box_classes.tolist(), known.difficult.tolist(), strict=True
        ):
            edge = {"edgecolor": colours[kind], "linewidth": 1.3, "linestyle": "--" if hard else "-"}
            axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **edge))
            seen.add(kind)
    return seen


def _make_class_colours(classes: int) -> np.ndarray:
    """Returns (classes, 3) colours in 0..1: ten or forty that differ well, repeated if there are more classes."""
    names = ("tab20", "tab20b") if classes > 10 else ("tab10",)
    wheel = [
        colour[:3]
        for name in names
        for colour in matplotlib.colormaps[name](range(matplotlib.colormaps[name].N)).tolist()
    ]
    return np.array([wheel[k % len(wheel)] for k in range(classes)])
