"""Finds the folder of the store that `prepare` returns, and the earlier store that it extends."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.images.shrink import SHRINKING_RULES
from firstlight.pipeline.data.manifest import MANIFEST_FILE, STORE_FORMAT, Shard, canonical_json
from firstlight.pipeline.data.prepare.extend import blame_extends, is_store, open_earlier_store
from firstlight.pipeline.data.prepare.extend_checks import check_same_kind, check_same_pixels
from firstlight.pipeline.data.prepare.store_side import choose_store_side, keep_store_side
from firstlight.pipeline.data.sources import Source, SourceOptions
from firstlight.pipeline.data.sources.files import decode_path, parse_local_path
from firstlight.pipeline.data.sources.source_splits import DEFAULT_TEST_FRACTION
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError

# Options of the data set that change the content of its store.
DECISIVE_FIELDS = (
    "source",
    "image_column",
    "path_column",
    "label_column",
    "split_column",
    "test_fraction",
    "split_seed",
    "max_pixels",
)
# Further ones, which count where they are stated, so that stores that were written before keep their folders.
STATED_FIELDS = ("depth", "mask_values", "annotated_orientation", "channels", "bits")


class PrepareOptions(SourceOptions, Protocol):
    """The options of a recipe's section `dataset` that `prepare` reads."""

    @property
    def extends(self) -> str | None: ...

    @property
    def max_bad_fraction(self) -> float: ...

    @property
    def depth(self) -> int | None: ...

    @property
    def store_size(self) -> int | str: ...

    @property
    def pixels(self) -> PixelFormat | None: ...


@dataclass(frozen=True)
class StoreTarget:
    """The folder of the store to be written, and the store that it extends, if any."""

    folder: Path
    old: Store | None = None
    # The shorter side that larger images are stored with, in pixels; None: all are stored as they are.
    side: int | None = None

    @property
    def old_shards(self) -> tuple[Shard, ...]:
        return self.old.shards if self.old else ()

    def check(self, source: Source, progress: Callable[[int, int], None]) -> None:
        """Checks everything about the earlier store that can be checked before Ray starts.

        Raises:
            UserError: the earlier store is damaged, or `source` cannot extend it.
        """
        if self.old:
            check_same_kind(self.old, source)
            with blame_extends(self.old.path):
                self.old.verify(progress)


def find_target(dataset: PrepareOptions, source: Source, stores: Path, auto_side: int | None = None) -> StoreTarget:
    """Returns the folder below `stores` of the store of `dataset`, and the store that it extends.

    If the earlier store was deleted after the extended one was finished, the extended one is found by its manifest.

    Raises:
        UserError: `dataset.extends` is not a whole store, or `dataset.store_size` is not possible.
    """
    if dataset.extends is None:
        # Images with their channels as they are are stored so.
        wanted = dataset.store_size if dataset.pixels is None else "off"
        side = choose_store_side(wanted, auto_side, source)
        return StoreTarget(_choose_folder(dataset, source, stores, **_state_side(side)), side=side)
    if not is_store(dataset.extends):
        for manifest in sorted(stores.glob(f"{dataset.name}-*/{MANIFEST_FILE}")):
            with contextlib.suppress(UserError):
                for earlier in Store.open(manifest.parent).extends[-1:]:
                    folder = _choose_folder(dataset, source, stores, extends=earlier.hash)
                    if (earlier.name, folder) == (Path(dataset.extends).name, manifest.parent):
                        return StoreTarget(folder)
    old = open_earlier_store(dataset.extends)
    check_same_pixels(old, dataset.pixels, source)
    side = keep_store_side(dataset.store_size, old)
    return StoreTarget(_choose_folder(dataset, source, stores, extends=old.hash), old, side)


def _state_side(side: int | None) -> dict[str, str]:
    return {} if side is None else {"store_side": f"{side} by rules {SHRINKING_RULES}"}


def _choose_folder(dataset: PrepareOptions, source: Source, stores: Path, **besides: str) -> Path:
    """Returns the folder of the store; that of a whole store of an earlier version, if it has the same images."""
    decides = {"fingerprint": source.fingerprint, **besides}
    if place := _find_place(dataset, source):
        decides["place"] = place
    folder = _name_folder(dataset, stores, decides)
    if source.identity == "sample" and not (folder / MANIFEST_FILE).exists():
        earlier = _name_folder(dataset, stores, {"fingerprint": source.earlier_fingerprint, **besides})
        if (earlier / MANIFEST_FILE).exists() and _has_same_images(earlier, dataset, source):
            return earlier
    return folder


def _name_folder(dataset: PrepareOptions, stores: Path, decides: dict[str, str]) -> Path:
    fields = {name: getattr(dataset, name) for name in DECISIVE_FIELDS}
    if fields["test_fraction"] is None:
        fields["test_fraction"] = DEFAULT_TEST_FRACTION
    stated = {name: getattr(dataset, name) for name in STATED_FIELDS}
    # The order of the classes counts, which JSON with sorted keys would lose.
    ordered = {name: list(value.items()) if isinstance(value, dict) else value for name, value in stated.items()}
    fields |= {name: value for name, value in ordered.items() if value}
    content = canonical_json({**fields, **decides, "format": STORE_FORMAT})
    return stores / f"{dataset.name}-{hashlib.sha256(content).hexdigest()[:12]}"


def _find_place(dataset: SourceOptions, source: Source) -> str:
    """Returns the location of the source, "" if it is of no account.

    It is no part of the manifest's hash: results on a store stay valid when its source is moved.
    """
    if source.identity != "sample":
        return ""
    return "\n".join(_resolve_location(location) for location in (dataset.root, dataset.list) if location)


def _resolve_location(location: str) -> str:
    path = parse_local_path(location)
    return location.rstrip("/") if path is None else decode_path(os.path.realpath(os.fsencode(path)))


def _has_same_images(folder: Path, dataset: PrepareOptions, source: Source) -> bool:
    """Returns True if a store, which an earlier version wrote, has the source's place, classes and images of splits."""
    try:
        store = Store.open(folder)
    except UserError:
        return False
    root = store.source["root"]
    if "identity" in store.source or (root is None) != (dataset.root is None):
        return False
    if root is not None and dataset.root is not None and _resolve_location(root) != _resolve_location(dataset.root):
        return False
    splits, total = source.splits, sum(source.splits.values())
    fits = dataset.extends is not None or all(count <= splits.get(split, 0) for split, count in store.splits.items())
    return fits and store.classes == source.classes and sum(store.splits.values()) + store.quarantined == total


def describe_other_stores(dataset: PrepareOptions, store: Store) -> list[str]:
    """Returns lines about other stores of the same source in the same folder, which this data set does not use."""
    lines = []
    used = {store.path.name, *(earlier.name for earlier in store.extends)}
    for manifest in sorted(store.path.parent.glob(f"{dataset.name}-*/{MANIFEST_FILE}")):
        if manifest.parent.name in used or dataset.root is None:
            continue
        with contextlib.suppress(UserError, ValueError):
            other = Store.open(manifest.parent)
            root = other.source["root"]
            if root is not None and _resolve_location(root) == _resolve_location(dataset.root):
                lines.append(
                    f"not used: {manifest.parent}, a store of {dataset.root} as it was before, or as it is read "
                    f"otherwise ({sum(other.splits.values()):,} images); delete it if no other recipe needs it"
                )
    return lines
