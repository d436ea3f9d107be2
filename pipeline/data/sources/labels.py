"""Labels as a source has them, by number or by name, turned into class numbers 0 to k-1."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from firstlight.pipeline.data.sources.files import Files
from firstlight.pipeline.errors import UserError

# In the folder of the images, with one class name a line
CLASSES_FILE = "classes.txt"
# A larger label is no class but something else, for example a number per image
MAX_CLASSES = 1_000_000
# Names of the classes, () = unlabelled, and (n,) int64 labels with -1 = unknown
ClassLabels = tuple[tuple[str, ...], np.ndarray]


def number_labels(
    values: pa.ChunkedArray, known: tuple[str, ...], row: Callable[[int], str], listed: str = ""
) -> ClassLabels:
    """Returns the classes and the class number of each image.

    Args:
        values: (n,) text or int64, null = unknown.
        known: the names of the classes, stated in the file `listed`; if empty, all names that occur become classes,
            sorted.
        row: describes the image at an index, for the error.
        listed: where `known` is stated, for the error.

    Raises:
        UserError: a label is no class; the message names the first such image.
    """
    encoded = values.combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    if pa.types.is_string(values.type):
        classes = known or tuple(sorted(found))
        class_numbers = {name: k for k, name in enumerate(classes)}
        numbers = [class_numbers.get(value, -2) for value in found]
    else:
        numbers = found
        classes = known or tuple(map(str, range(min(max(numbers, default=-1) + 1, MAX_CLASSES))))
    labels = np.array([*numbers, -1], np.int64)[encoded.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)]
    wrong = np.flatnonzero((labels < -1) | (labels >= len(classes)))
    if len(wrong):
        index = int(wrong[0])
        raise UserError(f"{row(index)}: label {_describe_wrong_label(values[index].as_py(), classes, listed)}")
    return classes, labels


def parse_integers(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a text column in which all values are integers as int64; any other text unchanged."""
    try:
        return pc.cast(values, pa.int64()) if values.null_count < len(values) else values
    except pa.ArrowInvalid:
        return values


def read_class_names(files: Files) -> tuple[str, ...]:
    """Returns the names in classes.txt; () if there is no such file.

    Raises:
        UserError: the file is no UTF-8 text, is empty, or lists a class twice.
    """
    if not files.exists(CLASSES_FILE):
        return ()
    try:
        with files.open(CLASSES_FILE) as file:
            names = tuple(line.strip() for line in file.read().decode("utf-8-sig").strip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{files.get_location(CLASSES_FILE)}: cannot be read as UTF-8 text: {error}") from None
    unique, counts = np.unique(names, return_counts=True)
    twice = unique[counts > 1].tolist()
    if twice or "" in names or not names:
        raise UserError(
            f"{files.get_location(CLASSES_FILE)}: must list every class once, one a line; "
            f"found twice or empty: {twice or 'an empty line'}"
        )
    return names


def _describe_wrong_label(value: object, classes: tuple[str, ...], listed: str) -> str:
    valid = f"0 to {len(classes) - 1}" if isinstance(value, int) else ", ".join(classes[:20])
    where = f"{listed} has {len(classes)} classes" if listed else f"there are {len(classes)} classes"
    return f"{value!r} is out of range: {where}; valid: {valid}, or -1 (unknown)"
