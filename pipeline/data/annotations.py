"""What is known of an image beyond one label: which classes occur, boxes of objects, a map of classes. Checked against the image, and as columns.

Coordinates are pixels of the stored image from its upper left corner: a box covers left <= x < right and top <= y < bottom.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.images import BadImage, decode_map

VOID = 255  # value of a mask: the pixel belongs to no class, or to one that is not known
KINDS = {
    "boxes": ("boxes", "box_classes", "difficult"),
    "mask": ("mask",),
    "present": ("present",),
}  # column -> fields of `Annotation`
BOX = pa.struct(
    [
        *((side, pa.float32()) for side in ("left", "top", "right", "bottom")),
        ("class", pa.int32()),
        ("difficult", pa.bool_()),
    ]
)
COLUMNS = {"boxes": pa.list_(BOX), "mask": pa.binary(), "present": pa.list_(pa.int8())}
LARGE = 1_000_000  # pixels of a mask that may be read where its image is smaller: to tell the size that it has
Value = list[dict[str, Any]] | list[int] | bytes | None  # of a column, as pyarrow takes and gives it


@dataclass(frozen=True, eq=False)
class Annotation:
    """Of one image, with k objects and C classes; None: not of this set."""

    present: np.ndarray | None = (
        None  # (C,) int8: 1 occurs, 0 does not, -1 is not known, or only in objects that are difficult
    )
    boxes: np.ndarray | None = None  # (k, 4) float32: left, top, right, bottom
    box_classes: np.ndarray | None = None  # (k,) int64
    difficult: np.ndarray | None = None  # (k,) bool
    mask: bytes | None = None  # a PNG file whose values are classes, or VOID


def columns_in(names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that are columns of annotations, sorted."""
    return tuple(sorted(COLUMNS.keys() & set(names)))


def occurring(box_classes: np.ndarray, difficult: np.ndarray, classes: int) -> np.ndarray:
    """(k,), (k,) bool -> (classes,) int8, as `Annotation.present`."""
    present = np.zeros(classes, np.int8)
    present[box_classes[difficult]] = -1
    present[box_classes[~difficult]] = 1
    return present


def fitted(found: Annotation, size: tuple[int, int], classes: int, where: str) -> Annotation:
    """`found` with its boxes cut at the edges of an image of `size` (width, height), its mask checked; `where` it was read, for the reasons.

    Raises:
        BadImage: a box without a pixel inside the image, a mask that cannot be read, of another size, or with values that are no class.
    """
    if found.mask is not None:
        _check_mask(found.mask, size, classes, where)
    if found.boxes is None:
        return found
    cut = np.clip(found.boxes, 0, np.array([*size, *size], np.float32))
    empty = np.flatnonzero((cut[:, 0] >= cut[:, 2]) | (cut[:, 1] >= cut[:, 3]))
    if len(empty):
        left, top, right, bottom = found.boxes[empty[0]].tolist()
        box = f"{left:g} to {right:g} across and {top:g} to {bottom:g} down"
        raise BadImage(
            f"{where}: object {empty[0] + 1}: its box, {box}, has no pixel of the image of {size[0]} x {size[1]}"
        )
    return replace(found, boxes=cut)


def _check_mask(mask: bytes, size: tuple[int, int], classes: int, where: str) -> None:
    try:
        values = decode_map(mask, max(size[0] * size[1], LARGE))
    except BadImage as error:
        raise BadImage(f"{where}: {error}") from None
    if values.shape[::-1] != size:
        raise BadImage(f"{where}: has {values.shape[1]} x {values.shape[0]} pixels, its image {size[0]} x {size[1]}")
    wrong = values[(values >= classes) & (values != VOID)]
    if len(wrong):
        raise BadImage(f"{where}: the value {wrong[0]} is no class; valid: 0 to {classes - 1}, and {VOID} (void)")


def tally(found: Annotation, size: tuple[int, int]) -> Counter[tuple[str, int]]:
    """(kind, class) -> how many, of an annotation that is `fitted` to `size`.

    Kinds: `present` (0 or 1), `boxes`, the `difficult` ones of them, `pixels` of the mask, where VOID counts as a class.
    """
    counts: Counter[tuple[str, int]] = Counter()
    if found.present is not None:
        counts.update(("present", c) for c in np.flatnonzero(found.present == 1).tolist())
    if found.box_classes is not None and found.difficult is not None:
        counts.update(("boxes", c) for c in found.box_classes.tolist())
        counts.update(("difficult", c) for c in found.box_classes[found.difficult].tolist())
    if found.mask is not None:
        pixels = np.bincount(decode_map(found.mask, size[0] * size[1]).reshape(-1))
        counts.update({("pixels", c): int(pixels[c]) for c in np.flatnonzero(pixels).tolist()})
    return counts


def packed(found: Annotation | None, columns: Sequence[str]) -> tuple[Value, ...]:
    """The values of `columns`."""
    values: dict[str, Value] = dict.fromkeys(columns)
    if found is not None and found.boxes is not None and found.box_classes is not None and found.difficult is not None:
        names = [field.name for field in BOX]
        rows = zip(*found.boxes.T.tolist(), found.box_classes.tolist(), found.difficult.tolist(), strict=True)
        values["boxes"] = [dict(zip(names, row, strict=True)) for row in rows]
    if found is not None:
        values["mask"] = found.mask
        values["present"] = None if found.present is None else found.present.tolist()
    return tuple(values[name] for name in columns)


def unpacked(table: pa.Table, classes: int) -> list[Annotation]:
    """Annotations of the rows of a table with some of `COLUMNS`.

    Raises:
        ValueError, TypeError, pyarrow.ArrowException: the columns hold something else.
    """
    fields: dict[str, Any] = {}
    for name in columns_in(table.column_names):
        column = table.column(name).combine_chunks().cast(COLUMNS[name], safe=True)
        if column.null_count:
            raise ValueError(f"{name} of row {column.is_null().index(True).as_py()} is missing")
        fields |= dict(zip(KINDS[name], zip(*_rows(name, column, classes), strict=True), strict=True))
    return [Annotation(**dict(zip(fields, row, strict=True))) for row in zip(*fields.values(), strict=True)]


def _rows(name: str, column: pa.Array, classes: int) -> Iterator[tuple[Any, ...]]:
    """The values of the fields of `KINDS[name]`, row by row."""
    if name == "mask":
        yield from ((mask,) for mask in column.to_pylist())
    elif name == "present":
        yield from ((row,) for row in present_rows(column, classes))
    else:
        flat = column.flatten()
        if flat.null_count or any(flat.field(k).null_count for k in range(len(BOX))):
            raise ValueError("a number of a box is missing")
        sides = np.stack([flat.field(k).to_numpy(zero_copy_only=False) for k in range(4)], 1).astype(np.float32)
        kinds = flat.field("class").to_numpy(zero_copy_only=False).astype(np.int64)
        difficult = flat.field("difficult").to_numpy(zero_copy_only=False).astype(bool)
        if len(kinds) and not 0 <= kinds.min() <= kinds.max() < classes:
            raise ValueError(f"a box is of a class that is not among {classes}")
        ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
        for start, end in zip([0, *ends.tolist()], ends.tolist(), strict=False):
            yield sides[start:end], kinds[start:end], difficult[start:end]


def present_rows(column: pa.Array, classes: int) -> np.ndarray:
    """(n, classes) int8 of a column `present`.

    Raises:
        ValueError: a row is of another length.
    """
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    if values.dtype != np.int8 or (column.value_lengths().to_numpy(zero_copy_only=False) != classes).any():
        raise ValueError(f"present does not have {classes} numbers in every row")
    return values.reshape(len(column), classes)
