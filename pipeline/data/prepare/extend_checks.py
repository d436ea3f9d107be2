"""What the source says of the images of an earlier store, held against what that store says: `dataset.extends` refuses what has changed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firstlight.pipeline.data.annotations import KINDS, Annotation, fitted, packed
from firstlight.pipeline.data.images import BadImage, size_in_header
from firstlight.pipeline.data.parquet import parquet_file
from firstlight.pipeline.data.shards import digest
from firstlight.pipeline.data.sources import Record, Source
from firstlight.pipeline.data.store import Store, canonical
from firstlight.pipeline.errors import UserError

ANEW = "or prepare a new store without dataset.extends"
BOXES = KINDS["boxes"]


@dataclass(frozen=True)
class Found:
    """Of all images of a source, in the order of its parts."""

    places: np.ndarray  # (n,) int64 in the listing
    test: np.ndarray  # (n,) bool
    ids: np.ndarray  # (n,) int64 in the earlier store, -1 = new
    differ: np.ndarray  # ids of which the path was found, with other bytes
    ranks: np.ndarray  # (n,) uint64 of the new ones
    annotated: np.ndarray  # (n,) uint64, as `annotation_key`


def annotation_key(image: Record, columns: Sequence[str]) -> int:
    """8 bytes of the sha256 of what the image's row has in `columns`; 0 where there are none, or where it can have no row."""
    if not columns or image.data is None or image.annotation is None:
        return 0
    try:
        # A mask was checked with the pixels of its image when it came into the store, and is the same file or another one
        boxes = fitted(
            Annotation(None, *(getattr(image.annotation, name) for name in BOXES)), size_in_header(image.data), 0, ""
        )
    except BadImage:
        return 0
    known = Annotation(image.annotation.present, boxes.boxes, boxes.box_classes, boxes.difficult, image.annotation.mask)
    return _key(dict(zip(columns, packed(known, columns), strict=True)))


def _key(values: dict[str, object]) -> int:
    mask = values.get("mask")
    return digest(canonical({**values, "mask": digest(mask) if isinstance(mask, bytes) else None}))


def _keys_of(store: Store) -> np.ndarray:
    """(n,) uint64 by id, as `annotation_key`."""
    keys: list[int] = []
    for shard in store.shards:
        with parquet_file(store.path / shard.file) as file:
            for group in range(file.num_row_groups):
                keys += [
                    _key(row)
                    for row in file.read_row_group(
                        group, columns=list(store.annotations), use_threads=False
                    ).to_pylist()
                ]
    return np.array(keys, np.uint64)


def check_same_kind(old: Store, source: Source) -> None:
    """Raises UserError where the source has other annotations than `old`, or its classes do not hold those of `old`."""
    theirs, ours = (", ".join(which) or "none" for which in (source.annotations, old.annotations))
    if theirs != ours:
        raise UserError(
            f"dataset.extends: the annotations of the source ({theirs}) are not those of {old.path} ({ours}); {ANEW.removeprefix('or ')}"
        )
    if "present" in old.annotations and set(source.classes) - set(old.classes):
        more = sorted(set(source.classes) - set(old.classes))[0]
        raise UserError(
            f"dataset.extends: {more!r} is a new class, and of the images of {old.path} it is not known; {ANEW.removeprefix('or ')}"
        )
    gone = sorted(set(old.classes) - set(source.classes))
    if gone:
        raise UserError(
            f"dataset.extends: {len(gone)} of the {len(old.classes)} classes of {old.path} are not in the source, e.g. {gone[0]!r}; "
            f"bring them back, {ANEW}"
        )
    numbered = {"mask", "present"} & set(old.annotations)  # of these a class is a number, in the source too
    if numbered and source.classes[: len(old.classes)] != old.classes:
        place, name = next((k, name) for k, name in enumerate(old.classes) if source.classes[k] != name)
        raise UserError(
            f"dataset.extends: class {place} of {old.path} is {name!r}, and {source.classes[place]!r} in the source; "
            f"bring its classes into the order in which they were, {ANEW}"
        )


def check_unchanged(old: Store, found: Found, labels: np.ndarray, classes: tuple[str, ...], stated: bool) -> None:
    """`labels` (n,) and `classes`, numbered as those of `old`, and whether the source has a test split of its own.

    Raises:
        UserError: an image of `old` is missing, or has other bytes, another label, another split or other annotations.
    """
    _check_complete(old, found)
    _check_labels(old, found, labels, classes)
    _check_annotations(old, found)
    if stated:
        _check_splits(old, found)


def _check_complete(old: Store, found: Found) -> None:
    gone = np.ones(old.edges[-1], bool)
    gone[found.ids[found.ids >= 0]] = False
    if gone.any():
        first = int(gone.argmax())
        how = "has other bytes, or cannot be read" if first in found.differ else "is missing"
        raise _complaint(old, int(gone.sum()), "are no longer in the source as they were", first, how)


def _check_labels(old: Store, found: Found, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    kept = np.flatnonzero(found.ids >= 0)
    before = old.labels()[found.ids[kept]]
    wrong = kept[labels[kept] != before]
    if len(wrong):
        first = wrong[found.ids[wrong].argmin()]
        names = [
            repr(classes[label]) if label >= 0 else "unknown" for label in (before[kept == first][0], labels[first])
        ]
        raise _complaint(
            old, len(wrong), "have another label in the source", int(found.ids[first]), f"was {names[0]}, is {names[1]}"
        )


def _check_annotations(old: Store, found: Found) -> None:
    if not old.annotations:
        return
    kept = np.flatnonzero(found.ids >= 0)
    wrong = found.ids[kept][found.annotated[kept] != _keys_of(old)[found.ids[kept]]]
    if len(wrong):
        raise _complaint(
            old, len(wrong), "have other annotations in the source", int(wrong.min()), ", ".join(old.annotations)
        )


def _check_splits(old: Store, found: Found) -> None:
    tests = np.zeros(old.edges[-1], bool)
    tests[old.ids("test")] = True
    kept = np.flatnonzero(found.ids >= 0)
    wrong = kept[found.test[kept] != tests[found.ids[kept]]]
    if len(wrong):
        first = int(found.ids[wrong].min())
        names = ("test", "train") if tests[first] else ("train", "test")
        raise _complaint(old, len(wrong), "have another split in the source", first, f"was {names[0]}, is {names[1]}")


def _complaint(old: Store, count: int, what: str, first: int, how: str) -> UserError:
    shard = next(shard for shard in old.shards if shard.first_id <= first < shard.first_id + shard.count)
    with parquet_file(old.path / shard.file) as opened:
        path = opened.read(columns=["path"], use_threads=False)["path"][first - shard.first_id].as_py()
    told = f"{count} of the {old.edges[-1]} images of {old.path} {what}, e.g. {' '.join(path.split())} ({how})"
    return UserError(f"dataset.extends: {told}; give them back as they were, {ANEW}")
