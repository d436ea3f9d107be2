"""Annotations of images besides one label: the classes that occur, boxes of objects, a map of classes.

They are checked against their image, and stored as columns. Coordinates are pixels of the stored image from its upper
left corner: a box covers left <= x < right and top <= y < bottom.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.images import BadImage, decode_class_map
from firstlight.pipeline.data.images.class_maps import VOID_VALUE, advise_mask_values
from firstlight.pipeline.data.images.orientation import AnnotatedFrame

# The kind of target that a task learns from. Equal to `tasks.downstream.task.TargetKind`, which this package may not
# import.
Target = Literal["label", "present", "mask", "boxes"]
# Column -> fields of `Annotation`.
ANNOTATION_FIELDS = {
    "boxes": ("boxes", "box_classes", "difficult"),
    "mask": ("mask",),
    "present": ("present",),
}
BOX_TYPE = pa.struct(
    [
        *((side, pa.float32()) for side in ("left", "top", "right", "bottom")),
        ("class", pa.int32()),
        ("difficult", pa.bool_()),
    ]
)
ANNOTATION_COLUMNS = {"boxes": pa.list_(BOX_TYPE), "mask": pa.binary(), "present": pa.list_(pa.int8())}
# A mask of up to this many pixels is read even if its image is smaller, so that the error can state its size.
MIN_MASK_PIXEL_LIMIT = 1_000_000
# VOC counts pixels from 1, many others from 0: a box that begins one pixel outside of its image is not counted as cut.
UNCOUNTED_CUT = 1.0
# A value of a column, as pyarrow takes and returns it.
ColumnValue = list[dict[str, Any]] | list[int] | bytes | None


@dataclass(frozen=True, eq=False)
class Annotation:
    """The annotations of one image with k objects and C classes. A field is None if the data set does not have it."""

    # (C,) int8: 1 occurs, 0 does not, -1 is unknown or occurs only in difficult objects.
    present: np.ndarray | None = None
    # (k, 4) float32: left, top, right, bottom.
    boxes: np.ndarray | None = None
    # (k,) int64
    box_classes: np.ndarray | None = None
    # (k,) bool
    difficult: np.ndarray | None = None
    # A PNG file whose values are classes, or VOID_VALUE.
    mask: bytes | None = None
    # Width and height of the image that the annotation states, and the image that its positions count in, as far as
    # its file or the data set say so. Neither is stored.
    stated_size: tuple[int, int] | None = None
    frame: AnnotatedFrame | None = None
    # The conventions that were assumed (`readings.READING_SENTENCES`), with the number of objects or files. Not stored.
    readings: Counter[str] = field(default_factory=Counter)

    def count_reading(self, name: str, count: int = 1) -> "Annotation":
        """Returns the annotation with `count` more readings of a name."""
        return replace(self, readings=self.readings + Counter({name: count}))


def select_annotation_columns(names: Sequence[str]) -> tuple[str, ...]:
    """Returns those of `names` that are columns of annotations, sorted."""
    return tuple(sorted(ANNOTATION_COLUMNS.keys() & set(names)))


def find_present_classes(box_classes: np.ndarray, difficult: np.ndarray, num_classes: int) -> np.ndarray:
    """Maps the (k,) classes and (k,) bool difficulty of boxes to `Annotation.present`, (num_classes,) int8."""
    present = np.zeros(num_classes, np.int8)
    present[box_classes[difficult]] = -1
    present[box_classes[~difficult]] = 1
    return present


def fit_to_image(found: Annotation, size: tuple[int, int], num_classes: int, where: str) -> Annotation:
    """Returns `found` with its boxes cut at the edges of an image of `size` (width, height), and checks its mask.

    A box without a pixel inside the image is left out. The cut boxes and those left out are counted in the readings,
    and so is a mask that is void everywhere. `where` is the file of the annotation, for the reasons.

    Raises:
        BadImage: the mask cannot be read, has another size, or has values that are not a class.
    """
    if found.mask is not None and _is_void_mask(found.mask, size, num_classes, where):
        found = found.count_reading("mask_void")
    if found.boxes is None or found.box_classes is None or found.difficult is None:
        return found
    cut = np.clip(found.boxes, 0, np.array([*size, *size], np.float32))
    inside = (cut[:, 0] < cut[:, 2]) & (cut[:, 1] < cut[:, 3])
    is_cut = inside & (np.abs(cut - found.boxes) > UNCOUNTED_CUT).any(1)
    kept = replace(found, boxes=cut[inside], box_classes=found.box_classes[inside], difficult=found.difficult[inside])
    return kept.count_reading("box_cut", int(is_cut.sum())).count_reading("box_outside", int((~inside).sum()))


def _is_void_mask(mask: bytes, size: tuple[int, int], num_classes: int, where: str) -> bool:
    """Returns True if every pixel of a mask is void.

    Raises:
        BadImage: see `fit_to_image`.
    """
    try:
        values = decode_class_map(mask, max(size[0] * size[1], MIN_MASK_PIXEL_LIMIT))
    except BadImage as error:
        raise BadImage(f"{where}: {error}", "annotation") from None
    if values.shape[::-1] != size:
        found = f"has {values.shape[1]} x {values.shape[0]} pixels, its image {size[0]} x {size[1]}"
        raise BadImage(f"{where}: {found}", "annotation")
    wrong = values[(values >= num_classes) & (values != VOID_VALUE)]
    if len(wrong):
        valid = f"valid: 0 to {num_classes - 1}, and {VOID_VALUE} (void)"
        advice = advise_mask_values(int(wrong[0])).removeprefix("valid: ")
        raise BadImage(f"{where}: the value {wrong[0]} is not a class; {valid}, or {advice}", "annotation")
    return bool((values == VOID_VALUE).all())


def count_annotations(found: Annotation, size: tuple[int, int]) -> Counter[tuple[str, int]]:
    """Counts (kind, class) pairs of an annotation that `fit_to_image` returned for `size`.

    Kinds: `present` (0 or 1 per image), `boxes`, `difficult` (those boxes that are difficult), `pixels` of the mask,
    where VOID_VALUE counts as a class.
    """
    counts: Counter[tuple[str, int]] = Counter()
    if found.present is not None:
        counts.update(("present", c) for c in np.flatnonzero(found.present == 1).tolist())
    if found.box_classes is not None and found.difficult is not None:
        counts.update(("boxes", c) for c in found.box_classes.tolist())
        counts.update(("difficult", c) for c in found.box_classes[found.difficult].tolist())
    if found.mask is not None:
        pixels = np.bincount(decode_class_map(found.mask, size[0] * size[1]).reshape(-1))
        counts.update({("pixels", c): int(pixels[c]) for c in np.flatnonzero(pixels).tolist()})
    return counts


def pack_columns(found: Annotation | None, columns: Sequence[str]) -> tuple[ColumnValue, ...]:
    """Returns the values of `columns` of an annotation; None for each column if there is no annotation."""
    values: dict[str, ColumnValue] = dict.fromkeys(columns)
    if found is not None and found.boxes is not None and found.box_classes is not None and found.difficult is not None:
        names = [field.name for field in BOX_TYPE]
        rows = zip(*found.boxes.T.tolist(), found.box_classes.tolist(), found.difficult.tolist(), strict=True)
        values["boxes"] = [dict(zip(names, row, strict=True)) for row in rows]
    if found is not None:
        values["mask"] = found.mask
        values["present"] = None if found.present is None else found.present.tolist()
    return tuple(values[name] for name in columns)


def unpack_columns(table: pa.Table, num_classes: int) -> list[Annotation]:
    """Returns the annotations of the rows of a table with some of `ANNOTATION_COLUMNS`.

    Raises:
        ValueError, TypeError, pyarrow.ArrowException: the columns hold something else.
    """
    fields: dict[str, Any] = {}
    for name in select_annotation_columns(table.column_names):
        column = table.column(name).combine_chunks().cast(ANNOTATION_COLUMNS[name], safe=True)
        if column.null_count:
            raise ValueError(f"{name} of row {column.is_null().index(True).as_py()} is missing")
        values = zip(*_unpack_rows(name, column, num_classes), strict=True)
        fields |= dict(zip(ANNOTATION_FIELDS[name], values, strict=True))
    return [Annotation(**dict(zip(fields, row, strict=True))) for row in zip(*fields.values(), strict=True)]


def _unpack_rows(name: str, column: pa.Array, num_classes: int) -> Iterator[tuple[Any, ...]]:
    """Yields the values of the fields of `ANNOTATION_FIELDS[name]`, row by row."""
    if name == "mask":
        yield from ((mask,) for mask in column.to_pylist())
    elif name == "present":
        yield from ((row,) for row in unpack_presence(column, num_classes))
    else:
        flat = column.flatten()
        if flat.null_count or any(flat.field(k).null_count for k in range(len(BOX_TYPE))):
            raise ValueError("a number of a box is missing")
        sides = np.stack([flat.field(k).to_numpy(zero_copy_only=False) for k in range(4)], 1).astype(np.float32)
        classes = flat.field("class").to_numpy(zero_copy_only=False).astype(np.int64)
        difficult = flat.field("difficult").to_numpy(zero_copy_only=False).astype(bool)
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
            raise ValueError(f"the class of a box is not in 0..{num_classes - 1}")
        ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
        for start, end in zip([0, *ends.tolist()], ends.tolist(), strict=False):
            yield sides[start:end], classes[start:end], difficult[start:end]


def unpack_presence(column: pa.Array, num_classes: int) -> np.ndarray:
    """Returns a column `present` as (n, num_classes) int8.

    Raises:
        ValueError: a row has another length.
    """
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    if values.dtype != np.int8 or (column.value_lengths().to_numpy(zero_copy_only=False) != num_classes).any():
        raise ValueError(f"present does not have {num_classes} numbers in every row")
    return values.reshape(len(column), num_classes)
