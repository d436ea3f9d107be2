"""Compares a source with the store that it extends: `dataset.extends` requires that no earlier image has changed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firstlight.pipeline.data.annotations import pack_columns
from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.images import BadImage, read_header_frame
from firstlight.pipeline.data.images.class_maps import VOID_VALUE
from firstlight.pipeline.data.images.orientation import EXIF_TRANSPOSES
from firstlight.pipeline.data.manifest import canonical_json
from firstlight.pipeline.data.parquet import open_parquet_file
from firstlight.pipeline.data.prepare.fitting import fit_annotation
from firstlight.pipeline.data.shards import short_digest
from firstlight.pipeline.data.sources import Record, Source
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError

NEW_STORE_ADVICE = "or prepare a new store without dataset.extends"
ONLY_NEW_STORE = NEW_STORE_ADVICE.removeprefix("or ")


@dataclass(frozen=True, kw_only=True)
class MatchResult:
    """The match of the n images of a source, in the order of its parts, with an earlier store."""

    # (n,) int64 indices in the source's listing.
    rows: np.ndarray
    # (n,) the name of the split that the source gives.
    splits: np.ndarray
    # (n,) int64 ids in the earlier store; -1 if the image is new.
    ids: np.ndarray
    # Ids of earlier images whose path exists with other bytes.
    changed_ids: np.ndarray
    # (n,) uint64 `hash_rank` of new images.
    ranks: np.ndarray
    # (n,) uint64 `hash_annotation`.
    annotated: np.ndarray


def hash_annotation(image: Record, columns: Sequence[str]) -> int:
    """Returns 8 bytes of the sha256 of the image's values in `columns` of a shard.

    Returns 0 if there are no such columns, or if the image cannot be stored.
    """
    if not columns or image.data is None or image.annotation is None:
        return 0
    known = image.annotation
    try:
        frame = read_header_frame(image.data)
        # A mask was compared with its image's pixels when it came into the store, and is either the same file or
        # another one; only that of an image that is turned is another file in the store.
        if known.mask is None or frame.orientation in EXIF_TRANSPOSES:
            known = fit_annotation(known, frame, VOID_VALUE, "")
    except BadImage:
        return 0
    return _hash_values(dict(zip(columns, pack_columns(known, columns), strict=True)))


def _hash_values(values: dict[str, object]) -> int:
    mask = values.get("mask")
    return short_digest(canonical_json({**values, "mask": short_digest(mask) if isinstance(mask, bytes) else None}))


def _hash_store_annotations(store: Store) -> np.ndarray:
    """Returns `hash_annotation` of every image of a store, (n,) uint64 by id."""
    hashes: list[int] = []
    columns = list(store.annotations)
    for shard in store.shards:
        with open_parquet_file(store.path / shard.file) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns, use_threads=False)
                hashes += [_hash_values(row) for row in table.to_pylist()]
    return np.array(hashes, np.uint64)


def check_same_kind(old: Store, source: Source) -> None:
    """Checks that the source has the annotations of `old` and all of its classes.

    Raises:
        UserError: it does not; or classes that are numbers in the source have other numbers there.
    """
    source_kinds, old_kinds = (", ".join(kinds) or "none" for kinds in (source.annotations, old.annotations))
    if source_kinds != old_kinds:
        raise UserError(
            f"dataset.extends: the annotations of the source ({source_kinds}) are not those of {old.path} "
            f"({old_kinds}); {ONLY_NEW_STORE}"
        )
    if "present" in old.annotations and set(source.classes) - set(old.classes):
        added = sorted(set(source.classes) - set(old.classes))[0]
        raise UserError(
            f"dataset.extends: {added!r} is a new class, which the images of {old.path} are not annotated with; "
            f"{ONLY_NEW_STORE}"
        )
    missing = sorted(set(old.classes) - set(source.classes))
    if missing:
        raise UserError(
            f"dataset.extends: {len(missing)} of the {len(old.classes)} classes of {old.path} are not in the source, "
            f"e.g. {missing[0]!r}; restore them, {NEW_STORE_ADVICE}"
        )
    # A class is a number in these annotations, also in the source.
    is_numbered = bool({"mask", "present"} & set(old.annotations))
    if is_numbered and source.classes[: len(old.classes)] != old.classes:
        number, name = next((k, name) for k, name in enumerate(old.classes) if source.classes[k] != name)
        raise UserError(
            f"dataset.extends: class {number} of {old.path} is {name!r}, and {source.classes[number]!r} in the source; "
            f"restore the order of its classes, {NEW_STORE_ADVICE}"
        )


def check_same_pixels(old: Store, pixels: PixelFormat | None, source: Source) -> None:
    """Checks that the images of `old` have the format `pixels` that the data set states.

    Raises:
        UserError: they have another; or the source has boxes, whose images are compared by their headers.
    """
    if old.stated_pixels != pixels:
        had, wanted = (str(found or "RGB of 8 bits") for found in (old.stated_pixels, pixels))
        raise UserError(
            f"dataset.extends: the images of {old.path} are {had}, and dataset.channels states {wanted}; valid: the "
            f"same, {NEW_STORE_ADVICE}"
        )
    if pixels is not None and source.annotations:
        raise UserError(
            f"dataset.extends: is not valid with dataset.channels and {' and '.join(source.annotations)}; "
            f"{ONLY_NEW_STORE}"
        )


def check_unchanged(
    old: Store, found: MatchResult, labels: np.ndarray, classes: tuple[str, ...], own_splits: tuple[str, ...]
) -> None:
    """Checks that the images of `old` are in the source as they were.

    `labels` (n,) and `classes` are those of the source, with the numbers of `old`. `own_splits`: the splits that the
    source gives itself; the test split was drawn otherwise, and is not compared.

    Raises:
        UserError: an image of `old` is missing, or has other bytes, another label, another split or other annotations.
    """
    _check_complete(old, found)
    _check_labels(old, found, labels, classes)
    _check_annotations(old, found)
    if len(own_splits) > 1 or "val" in old.splits:
        _check_splits(old, found, own_splits)


def _check_complete(old: Store, found: MatchResult) -> None:
    missing = np.ones(old.extension_edges[-1], bool)
    missing[found.ids[found.ids >= 0]] = False
    if missing.any():
        first = int(missing.argmax())
        how = "has other bytes, or cannot be read" if first in found.changed_ids else "is missing"
        raise _changed_error(old, int(missing.sum()), "are no longer in the source as they were", first, how)


def _check_labels(old: Store, found: MatchResult, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    kept = np.flatnonzero(found.ids >= 0)
    before = old.labels()[found.ids[kept]]
    wrong = kept[labels[kept] != before]
    if len(wrong):
        first = wrong[found.ids[wrong].argmin()]
        was, now = (
            repr(classes[label]) if label >= 0 else "unknown" for label in (before[kept == first][0], labels[first])
        )
        what = "have another label in the source"
        raise _changed_error(old, len(wrong), what, int(found.ids[first]), f"was {was}, is {now}")


def _check_annotations(old: Store, found: MatchResult) -> None:
    if not old.annotations:
        return
    kept = np.flatnonzero(found.ids >= 0)
    wrong = found.ids[kept][found.annotated[kept] != _hash_store_annotations(old)[found.ids[kept]]]
    if len(wrong):
        what = "have other annotations in the source"
        raise _changed_error(old, len(wrong), what, int(wrong.min()), ", ".join(old.annotations))


def _check_splits(old: Store, found: MatchResult, own_splits: tuple[str, ...]) -> None:
    before = np.full(old.extension_edges[-1], "train", found.splits.dtype)
    for split in ("val", "test"):
        before[old.ids(split)] = split if split in own_splits or split == "val" else "train"
    kept = np.flatnonzero(found.ids >= 0)
    wrong = kept[found.splits[kept] != before[found.ids[kept]]]
    if len(wrong):
        first = wrong[found.ids[wrong].argmin()]
        was, now = before[found.ids[first]], found.splits[first]
        what = "have another split in the source"
        raise _changed_error(old, len(wrong), what, int(found.ids[first]), f"was {was}, is {now}")


def _changed_error(old: Store, count: int, what: str, first: int, how: str) -> UserError:
    """Returns the error about `count` changed images of `old`, the first of which has the id `first`."""
    path = " ".join(str(old.read_paths(np.array([first]))[0]).split())
    problem = f"{count} of the {old.extension_edges[-1]} images of {old.path} {what}, e.g. {path} ({how})"
    return UserError(f"dataset.extends: {problem}; restore them as they were, {NEW_STORE_ADVICE}")
