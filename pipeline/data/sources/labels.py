"""Labels as a source has them, by number or by name, turned into class numbers 0 to k-1."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from firstlight.pipeline.data.sources.conventions.reading import (
    count_things,
    describe_near_twins,
    fold_name,
    join_counts,
    join_names,
)
from firstlight.pipeline.data.sources.files import Files
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.errors import UserError

# The file in the folder of the images with one class name a line
CLASSES_FILE = "classes.txt"
# A larger label is no class but something else, for example a number per image
MAX_CLASSES = 1_000_000
# The texts that spreadsheets and pandas write if there is no value
MISSING_LABELS = ("nan", "none", "null", "n/a", "na", "#n/a", "<na>", "-nan")
DECIMAL_NUMBER = re.compile(r"[+-]?\d*\.?\d+(?:[eE][+-]?\d+)?", re.ASCII)
WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}(?:\.0*)?", re.ASCII)
FALSE_TRUE = ("False", "True")


class LabelReading(NamedTuple):
    """The names of the classes, () = unlabelled, the (n,) int64 labels, -1 = unknown, and notes."""

    classes: tuple[str, ...]
    labels: np.ndarray
    notes: tuple[str, ...] = ()


def is_text_type(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list_type(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_label_type(kind: pa.DataType) -> bool:
    """Returns True if a column of this type can hold labels: text, whole numbers, truth values, or lists of one."""
    if pa.types.is_dictionary(kind) or _is_list_type(kind):
        return is_label_type(kind.value_type)
    return bool(
        is_text_type(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    )


def simplify_labels(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a column of a type that `is_label_type` names as text or int64.

    Raises:
        ValueError: a number is no whole one, or a list has several values; the text says which.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        return simplify_labels(values.cast(kind.value_type))
    if _is_list_type(kind):
        return simplify_labels(_take_only_values(values))
    if pa.types.is_boolean(kind):
        return pc.if_else(values, FALSE_TRUE[1], FALSE_TRUE[0]).cast(pa.string())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = values.cast(pa.float64())
        numbers = pc.if_else(pc.is_nan(numbers), None, numbers)
        fractions = pc.filter(numbers, pc.not_equal(pc.floor(numbers), numbers))
        if len(fractions):
            raise ValueError(f"holds numbers that are not whole, e.g. {fractions[0].as_py():g}")
        return numbers.cast(pa.int64())
    return values.cast(pa.int64() if pa.types.is_integer(kind) else pa.string())


def _take_only_values(values: pa.ChunkedArray) -> pa.ChunkedArray:
    lists = values.cast(pa.large_list(values.type.value_type)).combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    if (lengths > 1).any():
        row = int(np.flatnonzero(lengths > 1)[0])
        raise ValueError(f"holds several labels in row {row}: {str(lists[row].as_py())[:60]}")
    places = np.where(lengths == 1, np.cumsum(lengths) - 1, -1)
    wanted = pa.array(places, mask=places < 0)
    return pa.chunked_array([pc.list_flatten(lists).take(wanted)])


def read_labels(
    values: pa.ChunkedArray,
    known: tuple[str, ...],
    row: Callable[[int], str],
    dataset: SourceOptions,
    listed: str = "",
) -> LabelReading:
    """Returns the classes and the class number of each image.

    Args:
        values: (n,) text or int64, null = unknown.
        known: the names of the classes, stated in the file `listed`; if empty, the labels that occur become classes,
            texts sorted, numbers in their order and named by themselves.
        row: describes the image at an index, for the error.
        dataset: says which texts stand for no label, and whether case counts.
        listed: where `known` is stated, for the error.

    Raises:
        UserError: a label is no class; the message names the first such image.
    """
    encoded = values.combine_chunks().dictionary_encode()
    found: list[Any] = encoded.dictionary.to_pylist()
    indices = encoded.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)
    counts = np.bincount(indices, minlength=len(found) + 1)[: len(found)].tolist()
    notes: list[str] = []
    absent = Counter({"empty": values.null_count})
    if not pa.types.is_integer(values.type):
        found = _clean_texts(found, counts, known, dataset, notes, absent)
        found = _parse_whole_numbers(found, known)
    absent["-1"] += sum(count for value, count in zip(found, counts, strict=True) if value == -1)
    classes, numbers = _number_values(found, counts, known, listed, notes)
    labels = np.array([*numbers, -1], np.int64)[indices]
    wrong = np.flatnonzero((labels < -1) | (labels >= max(len(classes), 1)))
    if len(wrong):
        index = int(wrong[0])
        value = found[int(indices[index])]
        raise UserError(f"{row(index)}: label {_describe_wrong_label(value, known, listed)}")
    if (labels >= 0).any():
        notes += _describe_missing_labels(absent)
    if not known:
        notes += describe_near_twins(classes, _sum_counts(numbers, counts))
    return LabelReading(classes, labels, tuple(notes))


def _sum_counts(numbers: Sequence[int], counts: Sequence[int]) -> Counter[int]:
    total = Counter[int]()
    for number, count in zip(numbers, counts, strict=True):
        total[number] += count
    return total


def clean_label(text: str, dataset: SourceOptions) -> str:
    """Returns a label, or the name of a class folder, without spaces around it, and in lower case if that is asked."""
    plain = text.strip()
    return plain.lower() if dataset.label_case == "lower" else plain


def _describe_missing_labels(absent: Counter[str]) -> list[str]:
    """Returns a note about images without a label. `absent`: what stands in its place -> number of images."""
    found = +absent
    if not found:
        return []
    texts = found.keys() - {"empty", "-1"}
    advice = "; dataset.missing_labels=[] reads such texts as classes" if texts else ""
    return [f"no label: {count_things(found.total(), 'image')} ({join_counts(found)}){advice}"]


def _clean_texts(
    found: Sequence[str],
    counts: Sequence[int],
    known: tuple[str, ...],
    dataset: SourceOptions,
    notes: list[str],
    absent: Counter[str],
) -> list[str | None]:
    """Returns the label of each text, None if it stands for no label, which is counted in `absent`."""
    missing = {"", *(text.strip().lower() for text in dataset.missing_labels)} - {fold_name(name) for name in known}
    cleaned = [None if text.strip().lower() in missing else clean_label(text, dataset) for text in found]
    for text, label, count in zip(found, cleaned, counts, strict=True):
        if label is None:
            absent[repr(text.strip()) if text.strip() else "empty"] += count
    padded = sum(c for text, label, c in zip(found, cleaned, counts, strict=True) if label and text != text.strip())
    if padded:
        notes.append(f"{count_things(padded, 'label')} with spaces around: read without them")
    return cleaned


def _parse_whole_numbers(found: Sequence[str | None], known: tuple[str, ...]) -> list[Any]:
    """Returns texts that are all whole numbers, such as 3 or 3.0, as numbers, unless they are all names of `known`."""
    texts = [text for text in found if text is not None]
    if not texts or set(texts) <= set(known) or not all(WHOLE_NUMBER.fullmatch(text) for text in texts):
        return list(found)
    return [None if text is None else int(text.partition(".")[0]) for text in found]


def _number_values(
    found: Sequence[Any], counts: Sequence[int], known: tuple[str, ...], listed: str, notes: list[str]
) -> tuple[tuple[str, ...], list[int]]:
    """Returns the classes, and the number of each value: -1 without a label, less if it is no class."""
    values = [value for value in found if value is not None]
    if values and isinstance(values[0], int):
        return _number_integers(found, known, listed, notes)
    if not known:
        classes = tuple(sorted(set(values)))
        if values and all(DECIMAL_NUMBER.fullmatch(value) for value in values):
            notes.append(
                f"labels are numbers that are not whole, e.g. {values[0]}: each is read as the name of a class"
            )
        numbers = {name: k for k, name in enumerate(classes)}
        return classes, [-1 if value is None else numbers[value] for value in found]
    numbers = {name: k for k, name in enumerate(known)}
    folded: dict[str, list[str]] = {}
    for name in known:
        folded.setdefault(fold_name(name), []).append(name)
    spelled: dict[str, int] = {}
    for value, count in zip(found, counts, strict=True):
        near = [] if value is None or value in numbers else folded.get(fold_name(value), [])
        if len(near) == 1:
            numbers[value] = numbers[near[0]]
            spelled[f"{value!r} as {near[0]!r}"] = count
    if spelled:
        notes.append(f"labels read as the class that {listed or 'the file'} spells otherwise: {join_counts(spelled)}")
    return known, [-1 if value is None else numbers.get(value, -2) for value in found]


def _number_integers(
    found: Sequence[int | None], known: tuple[str, ...], listed: str, notes: list[str]
) -> tuple[tuple[str, ...], list[int]]:
    values = sorted({value for value in found if value is not None and value >= 0})
    if not known:
        classes = tuple(str(value) for value in values if value < MAX_CLASSES)
        if values and values != list(range(len(values))):
            notes.append(
                f"labels are {len(values):,} numbers from {values[0]} to {values[-1]}: each that occurs is a class, "
                f"named by it; a {CLASSES_FILE} in the folder of the images names classes from 0 on"
            )
        numbers = {int(name): k for k, name in enumerate(classes)}
        return classes, [-1 if value is None or value == -1 else numbers.get(value, -2) for value in found]
    names = {name: k for k, name in enumerate(known)}
    if values and all(str(value) in names for value in values):
        by_name = [-1 if value in (None, -1) else names.get(str(value), -2) for value in found]
        if any(names[str(value)] != value for value in values):
            notes.append(f"labels are read as the names that {listed or 'the file'} lists, not as numbers from 0 on")
        return known, by_name
    first = 0
    if values and values[0] >= 1 and values[-1] == len(known):
        first = 1
        notes.append(f"labels run from 1 to {len(known):,}, as many as there are classes: 1 is {known[0]!r}")
    return known, [-1 if value is None or value == -1 else value - first if value >= 0 else -2 for value in found]


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


def _describe_wrong_label(value: object, known: tuple[str, ...], listed: str) -> str:
    if not known:
        return f"{value!r} is out of range; valid: 0 to {MAX_CLASSES - 1}, or -1 (unknown)"
    valid = f"0 to {len(known) - 1}" if isinstance(value, int) else join_names(known, 20)
    return f"{value!r} is out of range: {listed or 'the set'} has {len(known)} classes; valid: {valid}, or -1 (unknown)"
