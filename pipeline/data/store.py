"""A store: encoded images in Parquet shards, and a manifest that is written last.

A folder with a readable `manifest.json` is a finished store. Pages carry checksums that are verified at every read:
a damaged disk ends in an error that names the file, never in another image.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from firstlight.pipeline.data import row_groups
from firstlight.pipeline.data.annotations import Annotation
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.channels.pixel_format import RGB_PIXELS, PixelFormat, parse_pixel_format
from firstlight.pipeline.data.channels.read_channels import open_channels
from firstlight.pipeline.data.images import open_rgb
from firstlight.pipeline.data.manifest import (
    DAMAGE_ERRORS,
    MANIFEST_FILE,
    STORE_FORMAT,
    SUBSETS_FILE,
    Manifest,
    advise_repair,
    file_sha256,
    is_hash_of,
    parse_manifest,
)
from firstlight.pipeline.data.mirror.places import name_location, pack_place, unpack_place
from firstlight.pipeline.data.parquet import read_parquet_table
from firstlight.pipeline.data.row_groups import (
    RowGroup,
    annotation_cache,
    check_shard_size,
    damaged_shard_error,
    describe_damage,
    image_cache,
    read_column,
    read_label_column,
)
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.records import has_wrong_sum

NO_ANNOTATION = Annotation()


@dataclass(frozen=True)
class Store(Manifest):
    """A finished store in the folder `path`. It pickles small: data are cached per process, not in the object."""

    path: Path = field(kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the manifest, and the path as it is known on every machine."""
        return {**self.__dict__, "path": pack_place(self.path)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Shards that this machine lacks are downloaded when they are read."""
        self.__dict__.update({**state, "path": unpack_place(state["path"])})

    @property
    def location(self) -> str:
        """The folder, or its URI if it is in a bucket."""
        return name_location(self.path)

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Reads and checks the manifest, and that every shard exists with its size. `verify` reads the contents.

        Raises:
            UserError: a file is missing or damaged; the message names it and the repair.
        """
        file = path / MANIFEST_FILE
        try:
            raw = json.loads(file.read_bytes())
            store = cls(**vars(parse_manifest(raw)), path=path)
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}; {advise_repair(path)}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"is not a manifest of format {STORE_FORMAT} ({describe_damage(error)})"
            raise UserError(f"{file}: {problem}; {advise_repair(path)}") from None
        if not is_hash_of(raw) or has_wrong_sum(raw):
            problem = "is damaged: its contents do not have the hash it states"
            raise UserError(f"{file}: {problem}; {advise_repair(path)}")
        for shard in store.shards:
            check_shard_size(path, shard)
        return store

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Reads every shard and compares its sha256. Calls `progress(done, total)` with numbers of images after each.

        Raises:
            UserError: a shard is missing or differs; the message names it and the repair.
        """
        total = sum(shard.count for shard in self.shards)
        for shard in self.shards:
            check_shard_size(self.path, shard)
            try:
                found = file_sha256(self.path / shard.file)
            except OSError as error:
                raise damaged_shard_error(self.path, shard, error.strerror or type(error).__name__) from None
            if found != shard.sha256:
                raise damaged_shard_error(self.path, shard, "its sha256 is not the manifest's")
            progress(shard.first_id + shard.count, total)
        self._read_subsets()

    @property
    def common_size(self) -> tuple[int, int] | None:
        """Width and height of every image in pixels. None if the images differ or the manifest has no sizes."""
        (width, widest), (height, highest) = (self.images.get(side, (0, 1)) for side in ("width", "height"))
        return (width, height) if (width, height) == (widest, highest) else None

    @property
    def levels(self) -> dict[str, tuple[float, float]]:
        """The levels that are black and white in images of more than 8 bits, by kind; {} if there are none."""
        found = self.images.get("levels", {})
        return {kind: (float(one["black"]), float(one["white"])) for kind, one in found.items()}

    @property
    def stated_pixels(self) -> PixelFormat | None:
        """The format of the pixels that the data set states; None if images become RGB of 8 bits."""
        return parse_pixel_format(self.images.get("pixels"))

    @property
    def pixels(self) -> PixelFormat:
        """The format of the pixels that a network gets."""
        return self.stated_pixels or RGB_PIXELS

    @property
    def is_gray(self) -> bool:
        """True if all images have one channel of 8 bits, of which `open_image` makes three equal ones."""
        return self.stated_pixels is None and set(self.images.get("modes", {})) == {"L"}

    def open_image(self, data: bytes, max_pixels: int) -> Image.Image | ChannelImage:
        """Decodes an image of the store: to mode RGB, or to its channels where the data set states them.

        Raises:
            BadImage: see `open_rgb` and `open_channels`.
        """
        pixels = self.stated_pixels
        return open_rgb(data, max_pixels, self.levels) if pixels is None else open_channels(data, pixels, max_pixels)

    @property
    def store_side(self) -> int | None:
        """The shorter side that larger images are stored with, in pixels; None if all are stored as they are."""
        side: int | None = self.images.get("shrunk", {}).get("side")
        return side

    def ids(self, split: str) -> np.ndarray:
        """Returns the ids of a split, (count,) int64, ascending; empty if there is no such split."""
        parts = [
            np.arange(shard.first_id, shard.first_id + shard.count) for shard in self.shards if shard.split == split
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def labels(self, split: str | None = None) -> np.ndarray:
        """Returns (count,) int64 labels of the images `ids(split)`; -1 is unknown.

        If `split` is None, the labels are those of all images, so that row i belongs to the image with id i.

        Raises:
            UserError: a shard is damaged.
        """
        parts = [read_label_column(self.path, shard) for shard in self.shards if split in (None, shard.split)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def read_paths(self, ids: np.ndarray) -> list[str | None]:
        """Returns the original paths of the images with the (n,) sorted ids; None where the source has none.

        Raises:
            UserError: a shard is damaged.
        """
        found: list[str | None] = []
        for shard in self.shards:
            here = ids[slice(*np.searchsorted(ids, [shard.first_id, shard.first_id + shard.count]))]
            if len(here):
                paths = read_column(self.path, shard, "path")
                found += paths.take(pa.array(here - shard.first_id)).to_pylist()
        return found

    def list_row_groups(self, split: str) -> np.ndarray:
        """Returns (k, 3) int64: shard index, row group index, first id of every row group of a split, in id order."""
        indices = [index for index, shard in enumerate(self.shards) if shard.split == split]
        rows = self._all_row_groups
        return rows[np.isin(rows[:, 0], indices)]

    @property
    def extension_edges(self) -> list[int]:
        """0, the number of images of each extended store, and of this one.

        The ids between two of them were added by the same extension.
        """
        return [0, *(earlier.ids for earlier in self.extends), sum(self.splits.values())]

    def read_group(self, shard_index: int, group_index: int) -> RowGroup:
        """Returns ids (r,), r encoded images and labels (r,) of a row group. The cache shares them: do not modify.

        Raises:
            UserError: the shard is damaged.
        """
        shard = self.shards[shard_index]
        key = (str(self.path), self.hash, shard.file, group_index)
        group = image_cache.get(key)
        if group is None:
            group = row_groups.read_row_group(self.path, shard, group_index)
            image_cache.put(key, group)
        return group

    def read(self, ids: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Returns the encoded images and labels (B,) of (B,) ids, in any order and with repetitions.

        Each row group is read once.

        Raises:
            IndexError: an id is not in the store; the message names the first.
            UserError: a shard is damaged.
        """
        images, labels = [b""] * len(ids), np.empty(len(ids), np.int64)
        for shard, group, rows, within in self._locate_ids(ids):
            _, encoded, known = self.read_group(shard, group)
            labels[rows] = known[within]
            for row, k in zip(rows.tolist(), within.tolist(), strict=True):
                images[row] = encoded[k]
        return images, labels

    def _locate_ids(self, ids: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Yields, for each row group with some of `ids`: its shard index, its index in the shard, the positions of
        these ids in `ids`, and their rows in the group.
        """
        ids = np.asarray(ids, np.int64)
        total = sum(self.splits.values())
        wrong = ids[(ids < 0) | (ids >= total)]
        if len(wrong):
            raise IndexError(f"id {wrong[0]} is not in the store {self.path}: its ids are 0..{total - 1}")
        index = np.searchsorted(self._all_row_groups[:, 2], ids, side="right") - 1
        order = np.argsort(index, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(index[order])) + 1) if len(ids) else ():
            shard, group, first = self._all_row_groups[index[rows[0]]].tolist()
            yield shard, group, rows, ids[rows] - first

    def read_annotations(self, ids: np.ndarray) -> list[Annotation]:
        """Returns the annotations of (B,) ids, in any order and with repetitions. Images are not read.

        The cache shares the annotations: do not modify them.

        Raises:
            UserError: the store has no annotations, or a shard is damaged.
            IndexError: an id is not in the store; the message names the first.
        """
        if not self.annotations:
            raise UserError(
                f"{self.path}: has no annotations; valid: a store of a source with annotations (dataset.annotations)"
            )
        found = [NO_ANNOTATION] * len(ids)
        for shard, group, rows, within in self._locate_ids(ids):
            known = self._read_annotation_group(shard, group)
            for row, k in zip(rows.tolist(), within.tolist(), strict=True):
                found[row] = known[k]
        return found

    def _read_annotation_group(self, shard_index: int, group_index: int) -> list[Annotation]:
        shard = self.shards[shard_index]
        key = (str(self.path), self.hash, shard.file, group_index)
        known = annotation_cache.get(key)
        if known is None:
            known = row_groups.read_annotation_group(self.path, shard, group_index, self.annotations, len(self.classes))
            annotation_cache.put(key, known)
        return known

    @property
    def subset_names(self) -> tuple[str, ...]:
        return tuple(sorted(self.subsets.get("images", {})))

    def subset(self, name: str) -> np.ndarray:
        """Returns the ids of a named part of the training split, (k,) int64, sorted.

        Raises:
            UserError: there is no subset of this name, or the file of the subsets is damaged.
        """
        if name not in self.subset_names:
            advice = suggest_valid(name, self.subset_names) if self.subset_names else "it has none"
            raise UserError(f"subset: {name!r} is not in the store {self.path}; {advice}")
        return self._read_subsets()[name]

    @cached_property
    def _all_row_groups(self) -> np.ndarray:
        """(k, 3) int64 like `list_row_groups`, over all splits."""
        rows = []
        for index, shard in enumerate(self.shards):
            starts = shard.first_id + np.cumsum((0, *shard.row_groups[:-1]))
            rows += [(index, group, int(start)) for group, start in enumerate(starts)]
        return np.array(rows, np.int64).reshape(-1, 3)

    def _read_subsets(self) -> dict[str, np.ndarray]:
        """Returns the sorted ids of every subset, by its name."""
        if not self.subsets:
            return {}
        file = self.path / SUBSETS_FILE
        try:
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.subsets["sha256"]:
                raise ValueError("its sha256 is not the manifest's")
            table = read_parquet_table(pa.BufferReader(content))
            names, ids = table.column("subset").to_numpy(), table.column("id").to_numpy()
        except DAMAGE_ERRORS as error:
            problem = f"is missing or damaged: {describe_damage(error)}"
            raise UserError(f"{file}: {problem}; {advise_repair(self.path)}") from None
        return {name: ids[names == name] for name in self.subsets["images"]}
