"""Ids -> pixels: reads, decodes and augments the images of a batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from PIL import Image

from firstlight.pipeline.data.augment import ops as augment
from firstlight.pipeline.data.augment import random_numbers
from firstlight.pipeline.data.augment.op_params import OpBatch
from firstlight.pipeline.data.augment.targets import Targets
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.manifest import ROWS_PER_GROUP
from firstlight.pipeline.data.store import Store

# id (B,) int64, label (B,) int64, pass (B,) int64, views (B, V, S, S, C) by `view_column`, and `Targets`. Pixels are of
# `Store.pixels`: three channels of uint8, where the data set states no other.
Arrays = dict[str, np.ndarray]
# An image of mode RGB, or one with its channels as they are.
OpenedImage = Image.Image | ChannelImage
# Encoded image and label by id.
Encoded = dict[int, tuple[bytes, int]]
# Pixels of decoded images that are held until their augmentations are sampled together.
MAX_OPEN_PIXELS = 2**20


def view_column(group: int) -> str:
    """Returns the name of the array of a group of views: `views`, `views_1`, `views_2` ..."""
    return f"views_{group}" if group else "views"


def list_view_columns(arrays: Mapping[str, Any]) -> list[str]:
    """Returns the names of the views in the arrays of a batch, in the order of the groups."""
    return [view_column(group) for group in range(sum(name.split("_")[0] == "views" for name in arrays))]


class PixelLoader(Protocol):
    """Ids -> arrays, in a decoding task or in this process."""

    @property
    def store(self) -> Store: ...

    @property
    def row_bytes(self) -> int:
        """Number of bytes of the pixels of one image in a batch."""
        ...

    def load(self, ids: np.ndarray, passes: np.ndarray, encoded: Encoded) -> Arrays:
        """Returns the batch of (B,) ids.

        `passes` (B,): the pass over the data set that each image is in, from 0. `encoded`: the images of `ids`.
        """
        ...


@dataclass(frozen=True)
class Loader:
    """Ids -> augmented views. Its fields, with ids and passes, determine every pixel."""

    store: Store
    # The augmentation of each view, as in a recipe.
    ops: tuple[tuple[dict[str, Any], ...], ...]
    # Side of a view in pixels.
    size: int
    seed: int
    max_pixels: int
    # Targets besides labels; unless they are whole masks, they are moved with the first view.
    targets: Targets | None = None
    # Side of each view in pixels; () if all have `size`.
    view_sizes: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        return sum(size**2 for size in self._sizes) * self.store.pixels.pixel_bytes

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.view_sizes or (self.size,) * len(self.ops)

    @property
    def groups(self) -> list[range]:
        """The views, by number, that have one size and follow each other: each group is one array of a batch."""
        edges = [k for k in range(1, len(self.ops)) if self._sizes[k] != self._sizes[k - 1]]
        return [range(start, stop) for start, stop in pairwise([0, *edges, len(self.ops)])]

    def size_of(self, view: int) -> int:
        """Returns the side of a view in pixels."""
        return self._sizes[view]

    def load(self, ids: np.ndarray, passes: np.ndarray, encoded: Encoded) -> Arrays:
        labels = np.array([encoded[i][1] for i in ids.tolist()], np.int64)
        return self._augment_opened(ids, passes, labels, self._open_in_chunks(ids, encoded))

    def load_opened(
        self, ids: np.ndarray, passes: np.ndarray, labels: np.ndarray, opened: Sequence[OpenedImage]
    ) -> Arrays:
        """Returns what `load` returns, of images that are decoded already. `labels`: (B,), -1 if unknown."""
        return self._augment_opened(ids, passes, labels, [(0, opened)])

    def _augment_opened(
        self,
        ids: np.ndarray,
        passes: np.ndarray,
        labels: np.ndarray,
        chunks: Iterable[tuple[int, Sequence[OpenedImage]]],
    ) -> Arrays:
        """Returns a batch of decoded images, which come in chunks with the row of the first image of each."""
        groups = self.groups
        channels, dtype = self.store.pixels.channels, self.store.pixels.dtype
        views = [np.empty((len(ids), len(g), *(self.size_of(g[0]),) * 2, channels), dtype) for g in groups]
        places = {view: (k, view - group[0]) for k, group in enumerate(groups) for view in group}
        parts: list[Arrays] = []
        for start, opened in chunks:
            rows = slice(start, start + len(opened))
            sizes = np.array([image.size for image in opened])
            sampled = [self.sample_params(ids[rows], passes[rows], view, sizes) for view in range(len(self.ops))]
            for view, params in enumerate(sampled):
                group, place = places[view]
                for row, pixels in enumerate(augment.apply_batch(opened, params, self.size_of(view)), start):
                    views[group][row, place] = pixels
            if self.targets is not None:
                known = self.store.read_annotations(ids[rows])
                parts.append(
                    self.targets.build_whole_masks(known, sampled)
                    if self.targets.canvas
                    else self.targets.build_arrays(known, sampled[0], self.size)
                )
        targets = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
        columns = {view_column(group): pixels for group, pixels in enumerate(views)}
        return {"id": ids, "label": labels, "pass": passes, **columns, **targets}

    def sample_params(self, ids: np.ndarray, passes: np.ndarray, view: int, sizes: np.ndarray) -> list[OpBatch]:
        """Samples the parameters of every op of a view, for each image. `sizes`: (B, 2) widths and heights."""
        keys = random_numbers.derive_view_keys(self.seed, passes, ids, view)
        return augment.sample_params(self.ops[view], keys, sizes, self.size_of(view))

    def _open_in_chunks(self, ids: np.ndarray, encoded: Encoded) -> Iterator[tuple[int, list[OpenedImage]]]:
        """Yields the decoded images in chunks of bounded memory, with the row of the first image of each chunk."""
        opened: list[OpenedImage] = []
        pixels = start = 0
        for row, image_id in enumerate(ids.tolist()):
            opened.append(self.store.open_image(encoded[image_id][0], self.max_pixels))
            pixels += opened[-1].width * opened[-1].height
            if pixels >= MAX_OPEN_PIXELS or row == len(ids) - 1:
                yield start, opened
                opened, pixels, start = [], 0, row + 1

    def iterate_images(self, ids: np.ndarray) -> Iterator[OpenedImage]:
        """Yields the decoded images of sorted `ids`, read a row group's worth at a time."""
        for start in range(0, len(ids), ROWS_PER_GROUP):
            for data in self.store.read(ids[start : start + ROWS_PER_GROUP])[0]:
                yield self.store.open_image(data, self.max_pixels)

    def read_encoded(self, ids: np.ndarray) -> Encoded:
        return read_encoded_images(self.store, ids)

    def load_once(self, ids: np.ndarray) -> Arrays:
        """Returns the batch of `ids` outside of any plan, read and decoded in this process, with pixels of pass 0."""
        return self.load(ids, np.zeros_like(ids), self.read_encoded(ids))


@dataclass(frozen=True)
class StoredImages:
    """Ids -> the images as they are stored, all of one size; the views of a batch are (B, 1, height, width, C)."""

    store: Store
    width: int
    height: int
    max_pixels: int

    @property
    def row_bytes(self) -> int:
        return self.width * self.height * self.store.pixels.pixel_bytes

    def load(self, ids: np.ndarray, passes: np.ndarray, encoded: Encoded) -> Arrays:
        pixels = self.store.pixels
        views = np.empty((len(ids), 1, self.height, self.width, pixels.channels), pixels.dtype)
        for row, image_id in enumerate(ids.tolist()):
            opened = self.store.open_image(encoded[image_id][0], self.max_pixels)
            views[row, 0] = opened.values if isinstance(opened, ChannelImage) else np.asarray(opened)
        labels = np.array([encoded[i][1] for i in ids.tolist()], np.int64)
        return {"id": ids, "label": labels, "pass": passes, view_column(0): views}


def read_encoded_images(store: Store, ids: np.ndarray) -> Encoded:
    """Reads encoded images and labels by id; each row group is read once."""
    distinct = np.unique(ids)
    data, labels = store.read(distinct)
    return {i: (d, label) for i, d, label in zip(distinct.tolist(), data, labels.tolist(), strict=True)}
