"""The rows of a list: their splits, paths that are written otherwise than the files are called, repeated images."""

import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from firstlight.pipeline.data.sources.conventions.image_signatures import IMAGE_SUFFIXES
from firstlight.pipeline.data.sources.conventions.reading import count_things, join_names, show_name
from firstlight.pipeline.data.sources.conventions.split_names import (
    SPLIT_TITLES,
    SPLITS,
    describe_split_names,
    find_value_splits,
)
from firstlight.pipeline.data.sources.files import Files, LocalFiles, decode_path
from firstlight.pipeline.data.sources.labels import LabelReading
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.errors import UserError


@dataclass
class MarkedRows:
    """The rows of each split, those of none, by reason, and notes."""

    rows: dict[str, np.ndarray]
    left_out: dict[str, int] = field(default_factory=dict)
    reading: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def split_rows(dataset: SourceOptions, table: pa.Table, where: str) -> MarkedRows:
    """Returns the rows of each split, by `dataset.splits` or by the names of splits in the column `split`.

    Raises:
        UserError: a row has no split, or none that can be told; or no row is for training.
    """
    if "split" not in table.column_names and dataset.splits:
        raise UserError(
            f"dataset.splits: names values of a column of {where}; valid: dataset.split_column = that column"
        )
    if "split" not in table.column_names or dataset.splits == {}:
        return MarkedRows({"train": np.arange(len(table))})
    texts = pc.fill_null(pc.utf8_trim_whitespace(table["split"].cast(pa.string())), "").combine_chunks()
    encoded = texts.dictionary_encode()
    values = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    if dataset.splits is not None:
        known = {name.strip(): split for split, names in dataset.splits.items() for name in names}
    else:
        known = find_value_splits(value for value in values if value)
        _require_known_values(dataset, values, codes, known, where)
    kinds = np.array([known.get(value, "") for value in values])[codes]
    rows = {split: np.flatnonzero(kinds == split) for split in SPLITS}
    if not len(rows["train"]):
        example = f"{{train: {show_name(values[0])}}}"
        raise UserError(
            f"dataset.split_column: no row of {where} is of the training split; values: {join_names(values, 10)}; "
            f"valid: dataset.splits={example} with these values"
        )
    found = MarkedRows({split: indices for split, indices in rows.items() if len(indices)})
    if any(kinds == ""):
        found.left_out["of no split in dataset.splits"] = int((kinds == "").sum())
    found.reading.append(describe_split_names({value: split for value, split in known.items() if value in values}))
    return found


def _require_known_values(
    dataset: SourceOptions, values: Sequence[str], codes: np.ndarray, known: dict[str, str], where: str
) -> None:
    """Raises UserError if a value of the column names no split; the message has the values and the key."""
    column = repr(dataset.split_column or "split")
    empty = np.flatnonzero(codes == values.index("")) if "" in values else codes[:0]
    example = ", ".join(f"{split}: {name}" for name, split in known.items()) or "train: a, test: b"
    if len(empty):
        raise UserError(
            f"{where}: {count_things(len(empty), 'row')} without a split in {column}, the first is row {empty[0]}; "
            f"valid: dataset.splits={{{example}}} leaves them out, and '' among its values reads them"
        )
    wrong = [value for value in values if value not in known]
    if wrong:
        row = int(np.flatnonzero(codes == values.index(wrong[0]))[0])
        raise UserError(
            f"{where}: row {row}: {column} {wrong[0]!r} is no name of a split; values: {join_names(values, 10)}; "
            f"valid: train, val, test or the like, or dataset.splits={{train: ..., test: ...}} with these values"
        )


def spread_label_lists(table: pa.Table) -> pa.Table:
    """Returns a row for each label, where a column of labels holds lists."""
    if "label" not in table.column_names:
        return table
    kind = table.schema.field("label").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return table
    lists = table["label"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(lists)), np.maximum(lengths, 1))
    flat, places = pc.list_flatten(lists), np.full(len(rows), -1)
    places[np.repeat(lengths, np.maximum(lengths, 1)) > 0] = np.arange(len(flat))
    labels = flat.take(pa.array(places, mask=places < 0))
    spread = table.drop_columns(["label"]).take(pa.array(rows))
    return spread.append_column("label", labels)


def resolve_paths(column: pa.ChunkedArray, below: Files, encoding: str, where: str) -> tuple[pa.BinaryArray, list[str]]:
    """Returns the paths of the files, and notes about those that are written otherwise than the files are called.

    On disk, a path of no file is tried without spaces around it, with / for \\, with each way in which Unicode composes
    a character, as the bytes that the list has, and with the ending of an image. At URIs, \\ is / if no path has a /.

    Raises:
        UserError: no path is one of a file.
    """
    paths = column.cast(pa.binary()).fill_null(b"").combine_chunks()
    if not isinstance(below, LocalFiles):
        return _resolve_remote_paths(paths)
    texts, root = paths.to_pylist(), os.fsencode(below.root)
    counts: dict[str, int] = {}
    found = 0
    for k, path in enumerate(texts):
        if not path or b"://" in path or _is_there(root, path):
            found += bool(path)
            continue
        for how, other in (*_list_other_spellings(path, encoding), *_find_endings(root, path)):
            if _is_there(root, other):
                texts[k], counts[how], found = other, counts.get(how, 0) + 1, found + 1
                break
    if not found and any(texts):
        first = next(path for path in texts if path)
        raise UserError(
            f"dataset.list: none of the {len(texts):,} images of {where} exists, e.g. "
            f"{decode_path(os.path.join(root, first))!r}; valid: dataset.root = the folder that the paths start from"
        )
    notes = [f"{count_things(count, 'path')} read {how}" for how, count in counts.items()]
    return (pa.array(texts, pa.binary()) if counts else paths), notes


def _resolve_remote_paths(paths: pa.BinaryArray) -> tuple[pa.BinaryArray, list[str]]:
    texts = paths.to_pylist()
    if any(b"/" in path for path in texts) or not any(b"\\" in path for path in texts):
        return paths, []
    return pa.array([path.replace(b"\\", b"/") for path in texts], pa.binary()), ["paths read with / for \\"]


def _is_there(root: bytes, path: bytes) -> bool:
    try:
        return os.path.lexists(os.path.join(root, path))
    # A zero byte
    except ValueError:
        return False


def _list_other_spellings(path: bytes, encoding: str) -> Iterator[tuple[str, bytes]]:
    text = path.decode("utf-8", "surrogateescape")
    ways: dict[str, Callable[[str], bytes]] = {
        "without spaces around": lambda t: os.fsencode(t.strip()),
        "with / for \\": lambda t: os.fsencode(t.strip().replace("\\", "/").removeprefix("./")),
        "in another form of Unicode": lambda t: os.fsencode(unicodedata.normalize("NFC", t)),
        "in another form of Unicode ": lambda t: os.fsencode(unicodedata.normalize("NFD", t)),
        f"as the bytes of {encoding}": lambda t: t.encode(encoding),
    }
    for how, spell in ways.items():
        try:
            other = spell(text)
        except (UnicodeError, LookupError):
            continue
        if other != path:
            yield how.strip(), other


def _find_endings(root: bytes, path: bytes) -> list[tuple[str, bytes]]:
    """Returns the only image file that is called like a path without an ending."""
    if b"." in path.rpartition(b"/")[2]:
        return []
    endings = [suffix for suffix in IMAGE_SUFFIXES for suffix in (suffix, suffix.upper())]
    found = [ending for ending in endings if _is_there(root, path + ending.encode())]
    return [(f"with the ending {found[0]}", path + found[0].encode())] if len(found) == 1 else []


def normalise_paths(paths: pa.BinaryArray, below: Files) -> pa.BinaryArray:
    """Returns the paths, written alike as far as that is possible without asking the disk.

    ./a.png, b/../a.png and <root>/a.png become a.png.
    """
    root = posixpath.join(os.fsencode(below.get_location()), b"")
    odd = np.flatnonzero(pc.match_substring_regex(paths, rb"^/|//|\./").to_numpy(zero_copy_only=False))
    found = {k: path for k in odd.tolist() if b"://" not in (path := paths[k].as_py())}
    if not found:
        return paths
    plain = paths.to_pylist()
    for k, path in found.items():
        plain[k] = posixpath.normpath(path).removeprefix(root)
    return pa.array(plain, pa.binary())


@dataclass(frozen=True)
class RepeatedImages:
    """The rows that name the same image: `first` (n,) is the first row of each row's image."""

    first: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Rows that name an image first."""
        return np.flatnonzero(self.first == np.arange(len(self.first)))

    @property
    def repetitions(self) -> np.ndarray:
        return np.flatnonzero(self.first != np.arange(len(self.first)))

    def describe_splits(self, rows: dict[str, np.ndarray], paths: pa.BinaryArray) -> list[str]:
        """Returns a note about images that are listed in two splits."""
        split_of = np.full(len(self.first), -1)
        for k, indices in enumerate(rows.values()):
            split_of[indices] = k
        names = [SPLIT_TITLES[split] for split in rows]
        wrong = [k for k in self.repetitions.tolist() if split_of[k] != split_of[self.first[k]] and split_of[k] >= 0]
        if not wrong:
            return []
        first = wrong[0]
        before = self.first[first]
        both = f"row {before} ({names[split_of[before]]}) and row {first} ({names[split_of[first]]})"
        return [
            f"{count_things(len(wrong), 'image')} listed in two splits, and read in the first: "
            f"{show_name(decode_path(paths[first].as_py()))} in {both}"
        ]


def find_repeated_images(paths: pa.BinaryArray, below: Files) -> RepeatedImages:
    """Finds the rows with the same path; rows without a path are all different."""
    codes = normalise_paths(paths, below).dictionary_encode().indices.to_numpy(zero_copy_only=False)
    _, firsts, inverse = np.unique(codes, return_index=True, return_inverse=True)
    first = firsts[inverse]
    empty = np.flatnonzero(pc.equal(pc.binary_length(paths), 0).to_numpy(zero_copy_only=False))
    first[empty] = empty
    return RepeatedImages(first)


class MergedLabels(NamedTuple):
    """The labels of images that several rows may name."""

    # (n,) int64, -1 = unknown, or several
    single: np.ndarray
    # (n, C) int8 where images have several labels
    present: np.ndarray | None
    # (n,) int64: one label of each row, for counts
    counted: np.ndarray


def merge_labels(
    read: LabelReading, repeated: RepeatedImages, paths: pa.BinaryArray, where: str, has_several: bool
) -> MergedLabels:
    """Returns the labels of each image, at the first of its rows.

    Raises:
        UserError: an image has two labels, and `has_several` is False.
    """
    labels, first = read.labels, repeated.first
    if has_several:
        present = np.zeros((len(labels), len(read.classes)), np.int8)
        known = np.flatnonzero(labels >= 0)
        present[first[known], labels[known]] = 1
        # Nothing is known of an image without any label
        present[~present.any(axis=1)] = -1
        return MergedLabels(np.full(len(labels), -1, np.int64), present, labels)
    merged = labels.copy()
    conflicts = []
    for row in repeated.repetitions.tolist():
        before, now = merged[first[row]], labels[row]
        if before >= 0 and now >= 0 and before != now:
            conflicts.append(row)
        elif before < 0:
            merged[first[row]] = now
    if conflicts:
        row = conflicts[0]
        one, other = (show_name(read.classes[labels[k]]) for k in (first[row], row))
        path = show_name(decode_path(paths[row].as_py()))
        count = count_things(len({int(first[k]) for k in conflicts}), "image")
        raise UserError(
            f"{where}: row {first[row]} and row {row}: {path} is {one!r} and {other!r} ({count} with several labels); "
            "valid: one label for an image, or dataset.annotations=[present], which keeps them all"
        )
    return MergedLabels(merged, None, merged)
