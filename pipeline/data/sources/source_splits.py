"""The splits of a source: by the names of its files, and drawn from the training split where a source has none."""

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from firstlight.pipeline.data.sources.conventions.reading import count_things, join_names
from firstlight.pipeline.data.sources.conventions.split_names import (
    SPLIT_TITLES,
    SPLITS,
    describe_split_names,
    find_file_splits,
)
from firstlight.pipeline.data.sources.source import SourceOptions
from firstlight.pipeline.errors import UserError

# The fraction that becomes the test split where `dataset.test_fraction` is null
DEFAULT_TEST_FRACTION = 0.2


class SettledSplits(NamedTuple):
    """The images of each split, and notes about them."""

    rows: dict[str, np.ndarray]
    reading: tuple[str, ...]
    notes: tuple[str, ...]
    draws_test: bool


def settle_splits(
    rows: dict[str, np.ndarray], keys: Sequence[bytes], labels: np.ndarray, dataset: SourceOptions
) -> SettledSplits:
    """Returns the splits that are used, of those that the files name.

    A test or held-out split without any label, beside training images with labels, is left out: nothing can be measured
    on it. The held-out split is then tested on. Where there is no test split, one is drawn, see `add_test_split`.
    `dataset.splits`, where it is given, counts as it is.
    """
    found, reading, notes = dict(rows), list[str](), list[str]()
    if dataset.splits is None and (labels[found["train"]] >= 0).any():
        for split in [split for split in ("val", "test") if split in found and (labels[found[split]] < 0).all()]:
            count = count_things(len(found.pop(split)), "image")
            key = f"dataset.splits={{train: ..., {split}: ...}} keeps them"
            notes.append(f"left out, as none has a label: {count} of the {SPLIT_TITLES[split]} split; {key}")
        if "test" in rows and "test" not in found and "val" in found:
            found["test"] = found.pop("val")
            count = count_things(len(found["test"]), "image")
            notes.append(f"the held-out split is tested on, as the test split has no labels: {count}")
    if "val" in found:
        reading.append(f"held out: {count_things(len(found['val']), 'image')}, instead of a part of the training split")
    draws_test = "test" not in found
    settled = add_test_split(found, keys, labels, dataset)
    if draws_test and "test" in settled:
        count = count_things(len(settled["test"]), "image")
        reading.append(f"test split: {count}, drawn from those to train on (dataset.test_fraction)")
    return SettledSplits(settled, tuple(reading), tuple(notes), draws_test)


class FileSplits(NamedTuple):
    """The files of each split, those of none, and notes."""

    splits: dict[str, list[str]]
    others: list[str]
    reading: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All files that are read, in the order of the splits."""
        return [name for names in self.splits.values() for name in names]


def split_files(names: list[str], dataset: SourceOptions, where: str) -> FileSplits:
    """Returns the files of each split, by `dataset.splits` or by their names and folders.

    Files without the name of a split are left out if others name the training split; else they are trained on.

    Raises:
        UserError: a name has words of two splits, or no file is for training.
    """
    if dataset.splits is not None:
        return _match_file_patterns(names, dataset.splits, where)
    try:
        found = find_file_splits(names)
    except ValueError as error:
        raise UserError(
            f"dataset.root: {str(error)!r} in {where} names two splits; "
            "valid: dataset.splits={train: 'a*', test: 'b*'} with patterns of names"
        ) from None
    groups = {split: [name for name in names if found.get(name) == split] for split in SPLITS}
    rest = [name for name in names if name not in found]
    if groups["train"]:
        return FileSplits(groups, rest, (describe_split_names(found),) if groups["val"] or groups["test"] else ())
    if rest:
        placed = {**found, **dict.fromkeys(rest, "train")}
        return FileSplits({**groups, "train": rest}, [], (describe_split_names(placed),) if found else ())
    if len(set(found.values())) == 1:
        return FileSplits({"train": names, "val": [], "test": []}, [], ())
    raise UserError(
        f"dataset.root: {join_names(names)} in {where}: none to train on; "
        "valid: dataset.splits={train: 'a*', test: 'b*'} with patterns of names"
    )


def _match_file_patterns(names: list[str], splits: Mapping[str, tuple[str, ...]], where: str) -> FileSplits:
    groups: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names if splits else ():
        for split in SPLITS:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in splits.get(split, ())):
                groups[split].append(name)
                break
    empty = [split for split in splits if not groups[split]]
    if empty or (splits and not groups["train"]):
        split = (*empty, "train")[0]
        raise UserError(
            f"dataset.splits.{split}: {list(splits.get(split, ()))} matches no file in {where}; files: "
            f"{join_names(names, 20)}"
        )
    groups = groups if splits else {"train": names, "val": [], "test": []}
    read = {name: split for split, found in groups.items() for name in found}
    notes = (describe_split_names(read, " (dataset.splits)"),) if splits else ()
    return FileSplits(groups, [name for name in names if name not in read], notes)


def lay_end_to_end(splits: Mapping[str, Sequence[object]], counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns the rows of each split, where files lie end to end in the order of the splits.

    `counts`: the number of rows of each file.
    """
    rows, start, file = {}, 0, 0
    for split, files in splits.items():
        count = sum(counts[file : file + len(files)])
        if count:
            rows[split] = np.arange(start, start + count)
        start, file = start + count, file + len(files)
    return rows


def describe_unread(names: Iterable[str], why: str) -> list[str]:
    """Returns a note about files that are not read; [] if there are none."""
    listed = sorted(names)
    return [f"not read, {why}: {join_names(listed)}"] if listed else []


def add_test_split(
    rows: dict[str, np.ndarray], keys: Sequence[bytes], labels: np.ndarray, dataset: SourceOptions
) -> dict[str, np.ndarray]:
    """Returns `rows` with a test split: if it has none, the images of each class with the lowest `hash_rank` become it.

    A hash of each image is used instead of one draw over all images, so that images that are added later move few
    others. Each class keeps at least one image for training.
    """
    if "test" in rows:
        return rows
    indices = rows["train"]
    ranks = np.array([hash_rank(dataset.split_seed, keys[index]) for index in indices.tolist()], np.uint64)
    fraction = DEFAULT_TEST_FRACTION if dataset.test_fraction is None else dataset.test_fraction
    test = select_lowest(ranks, labels[indices], fraction)
    return {**rows, "train": indices[~test], "test": indices[test]} if test.any() else rows


def select_lowest(ranks: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """Returns (n,) bool: the images with the lowest ranks of each class, `fraction` of it but never all of it."""
    _, kinds, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((ranks, kinds))
    position = np.empty(len(ranks), np.int64)
    position[order] = np.arange(len(ranks)) - np.repeat(np.cumsum(counts) - counts, counts)
    quota = np.minimum(np.floor(counts * fraction + 0.5).astype(np.int64), counts - 1)
    return np.asarray(position < quota[kinds])


def hash_rank(seed: int, key: bytes) -> int:
    """Returns 64 bits of the SHA-256 of a split seed and the key of an image."""
    return int.from_bytes(hashlib.sha256(b"%d\0%s" % (seed, key)).digest()[:8], "big")
