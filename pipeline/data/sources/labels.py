"""Labels as a source states them, by number or by name, as numbers 0 to k-1."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from firstlight.pipeline.data.sources.files import Files
from firstlight.pipeline.errors import UserError

CLASSES = "classes.txt"  # beside the images: a name a line
MAX_CLASSES = 1_000_000  # a label beyond is no class but something else, e.g. a number per image
Labels = tuple[tuple[str, ...], np.ndarray]  # the classes' names, () = unlabelled, and (n,) int64 with -1 = unknown


def numbered(values: pa.ChunkedArray, known: tuple[str, ...], row: Callable[[int], str], listed: str = "") -> Labels:
    """Values (n,) text or int64, null = unknown. `known`: the classes' names if stated, in the file `listed`; else all names that occur, sorted.

    Raises:
        UserError: names by `row(place)` the first label that is no class.
    """
    encoded = values.combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    if pa.types.is_string(values.type):
        classes = known or tuple(sorted(found))
        index = {name: k for k, name in enumerate(classes)}
        numbers = [index.get(value, -2) for value in found]
    else:
        numbers = found
        classes = known or tuple(map(str, range(min(max(numbers, default=-1) + 1, MAX_CLASSES))))
    labels = np.array([*numbers, -1], np.int64)[encoded.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)]
    wrong = np.flatnonzero((labels < -1) | (labels >= len(classes)))
    if len(wrong):
        place = int(wrong[0])
        raise UserError(f"{row(place)}: label {_complaint(values[place].as_py(), classes, listed)}")
    return classes, labels


def whole_numbers(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text in which all values are integers, as int64; any other text as it is."""
    try:
        return pc.cast(values, pa.int64()) if values.null_count < len(values) else values
    except pa.ArrowInvalid:
        return values


def class_names(files: Files) -> tuple[str, ...]:
    """From classes.txt; () where there is none."""
    if not files.exists(CLASSES):
        return ()
    try:
        with files.open(CLASSES) as file:
            names = tuple(line.strip() for line in file.read().decode("utf-8-sig").strip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{files.where(CLASSES)}: cannot be read as UTF-8 text: {error}") from None
    unique, counts = np.unique(names, return_counts=True)
    twice = unique[counts > 1].tolist()
    if twice or "" in names or not names:
        raise UserError(
            f"{files.where(CLASSES)}: must list every class once, one a line; found twice or empty: {twice or 'an empty line'}"
        )
    return names


def _complaint(value: object, classes: tuple[str, ...], listed: str) -> str:
    valid = f"0 to {len(classes) - 1}" if isinstance(value, int) else ", ".join(classes[:20])
    where = f"{listed} has {len(classes)} classes" if listed else f"there are {len(classes)} classes"
    return f"{value!r} is out of range: {where}; valid: {valid}, or -1 (unknown)"
