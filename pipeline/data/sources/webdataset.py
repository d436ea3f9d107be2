"""Tar archives in the layout of WebDataset.

`dataset.root` is the folder of train-000.tar, train-001.tar.gz ..., or names archives itself: .../train-{000..009}.tar.
"""

import fnmatch
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.sources.files import FileFacts, Files, hash_facts, read_concurrently
from firstlight.pipeline.data.sources.labels import CLASSES_FILE, number_labels, parse_integers, read_class_names
from firstlight.pipeline.data.sources.source import (
    Record,
    Source,
    SourceOptions,
    add_test_split,
    describe_unread,
    open_root,
    split_by_prefix,
)
from firstlight.pipeline.data.sources.tar_index import (
    ARCHIVE_ERRORS,
    ARCHIVE_SUFFIXES,
    TarEntry,
    index_archive,
    open_archive,
)
from firstlight.pipeline.errors import UserError, one_line

ARCHIVE_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_ARCHIVES = 1_000_000


@dataclass(frozen=True)
class ArchiveEntries:
    """n entries of archives, laid end to end."""

    # (n,)
    names: pa.BinaryArray
    # (n, 2) int64: offset and size of the bytes in the archive
    spans: np.ndarray
    # (n,)
    labels: pa.StringArray
    # Entry -> the reason why it is no image
    reasons: dict[int, str]


@dataclass(frozen=True)
class WebDataset(Source):
    """Samples of tar archives.

    A part is read at the offsets that the listing found; a compressed archive is read up to the last of them.
    """

    kind = "webdataset"
    files: Files
    archives: tuple[str, ...]
    # (archives,) number of entries up to the end of each archive
    ends: np.ndarray
    entries: ArchiveEntries

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        within = np.searchsorted(self.ends, indices, side="right")
        for archive in np.unique(within).tolist():
            yield from self._read_archive(self.archives[archive], indices[within == archive].tolist())

    def _read_archive(self, archive: str, indices: list[int]) -> Iterator[Record]:
        done = 0
        try:
            with open_archive(self.files, archive) as stream:
                for index in indices:
                    data, reason = None, self.entries.reasons.get(index)
                    if reason is None:
                        offset, size = self.entries.spans[index].tolist()
                        stream.seek(offset)
                        data = stream.read(size)
                        data, reason = (data, None) if len(data) == size else (None, f"{archive} ends before it")
                    yield self._make_record(archive, index, data, reason)
                    done += 1
        except ARCHIVE_ERRORS as error:
            lost = f"{archive} cannot be read: {one_line(error, limit=1000)}"
            yield from (
                self._make_record(archive, index, None, self.entries.reasons.get(index, lost))
                for index in indices[done:]
            )

    def _make_record(self, archive: str, index: int, data: bytes | None, reason: str | None) -> Record:
        name = self.entries.names[index].as_py().decode()
        return Record(f"{archive}/{name}" if name else archive, data, int(self.labels[index]), reason)


def open_webdataset(dataset: SourceOptions) -> WebDataset:
    """Lists the samples of the archives.

    Raises:
        UserError: there are no archives, no images for training, or a label is no class.
    """
    files, names = _find_archives(dataset)
    splits = split_by_prefix(names)
    archives = tuple(name for split in splits.values() for name in split)
    facts = tuple(files.get_facts(name) for name in archives)
    members, ends = _list_entries(files, archives, facts, dataset.label_column)
    num_train = int(ends[len(splits["train"]) - 1])
    if len(members.reasons) == len(members.names) or num_train == 0:
        raise UserError(
            f"dataset.root: {_describe_no_images(members)} in {', '.join(archives[:3])} of {files.get_location()!r}"
        )
    listed = files.get_location(CLASSES_FILE) if files.exists(CLASSES_FILE) else ""
    values = parse_integers(pa.chunked_array([members.labels]))
    known = read_class_names(files) if dataset.label_column is not None else ()
    classes, labels = number_labels(
        values, known, lambda index: _describe_entry(archives, ends, members, index), listed
    )
    rows = {"train": np.arange(num_train), "test": np.arange(num_train, len(labels))}
    keys = [
        b"%s/%s" % (name.encode("utf-8", "surrogateescape"), path)
        for name, path in _iterate_names(archives, ends, members)
    ]
    rows = add_test_split({split: indices for split, indices in rows.items() if len(indices)}, keys, labels, dataset)
    facts += tuple(files.get_facts(name) for name in [CLASSES_FILE] * bool(listed))
    note = describe_unread({*names} - {*archives}, "as others are named for the splits")
    return WebDataset(classes, hash_facts(facts), labels, rows, files, archives, ends, members, unread_note=note)


def _find_archives(dataset: SourceOptions) -> tuple[Files, list[str]]:
    """Returns the folder of the archives and their names: all in the folder, or those that the end of the root names.

    Raises:
        UserError: no archive is found.
    """
    top, _, last = str(dataset.root).rstrip("/").rpartition("/")
    if not (last.lower().endswith(ARCHIVE_SUFFIXES) or "*" in last or ARCHIVE_RANGE.search(last)):
        files = open_root(dataset.root, dataset.source)
        names = [name for name in files.list_names() if name.lower().endswith(ARCHIVE_SUFFIXES)]
        return files, _require_names(names, f"*{', *'.join(ARCHIVE_SUFFIXES)}", files)
    files = open_root(top or ("/" if str(dataset.root).startswith("/") else "."), dataset.source)
    patterns = _expand_ranges(last)
    if not any(sign in last for sign in "*?["):
        return files, patterns
    names = [name for name in files.list_names() if name.lower().endswith(ARCHIVE_SUFFIXES)]
    names = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return files, _require_names(names, last, files)


def _require_names(names: list[str], what: str, files: Files) -> list[str]:
    if not names:
        raise UserError(f"dataset.root: no {what} files in {files.get_location()!r}")
    return names


def _expand_ranges(pattern: str) -> list[str]:
    """Returns the names that the ranges of a pattern stand for.

    `a-{08..10}.tar` becomes a-08.tar, a-09.tar, a-10.tar.

    Raises:
        UserError: a range is empty or has more than `MAX_ARCHIVES` numbers.
    """
    found = ARCHIVE_RANGE.search(pattern)
    if found is None:
        return [pattern]
    low, high = int(found[1]), int(found[2])
    if not 0 <= high - low < MAX_ARCHIVES:
        raise UserError(
            f"dataset.root: {found[0]!r} is no range of 1 to {MAX_ARCHIVES} archives; valid: e.g. {{000..009}}"
        )
    rests = _expand_ranges(pattern[found.end() :])
    return [f"{pattern[: found.start()]}{k:0{len(found[1])}d}{rest}" for k in range(low, high + 1) for rest in rests]


# Cached, as a run lists its source twice: for its checks, and to prepare it
@functools.lru_cache(maxsize=1)
def _list_entries(
    files: Files, archives: tuple[str, ...], facts: tuple[FileFacts, ...], label_column: str | None
) -> tuple[ArchiveEntries, np.ndarray]:
    """Returns the entries of all archives, and (archives,) the number of entries up to the end of each.

    `facts` are those of the archives when they were listed: the cache is not used if they changed.
    """
    parts = list(read_concurrently(lambda name: _pack_entries(index_archive(files, name, label_column)), archives))
    ends = np.cumsum([len(part.names) for part in parts])
    firsts = [0, *ends.tolist()]
    reasons = {
        first + index: reason
        for first, part in zip(firsts, parts, strict=False)
        for index, reason in part.reasons.items()
    }
    names, labels = (pa.concat_arrays([getattr(part, key) for part in parts]) for key in ("names", "labels"))
    return ArchiveEntries(names, np.concatenate([part.spans for part in parts]), labels, reasons), ends


def _pack_entries(found: list[TarEntry]) -> ArchiveEntries:
    spans = np.array([(entry.offset, entry.size) for entry in found], np.int64).reshape(-1, 2)
    reasons = {index: entry.reason for index, entry in enumerate(found) if entry.reason is not None}
    return ArchiveEntries(
        pa.array([entry.member.encode() for entry in found], pa.binary()),
        spans,
        pa.array([e.label for e in found], pa.string()),
        reasons,
    )


def _describe_no_images(members: ArchiveEntries) -> str:
    return f"no images, but e.g. {next(iter(members.reasons.values()))!r}" if members.reasons else "no images"


def _describe_entry(archives: tuple[str, ...], ends: np.ndarray, members: ArchiveEntries, index: int) -> str:
    return f"{archives[int(np.searchsorted(ends, index, side='right'))]}/{members.names[index].as_py().decode()}"


def _iterate_names(archives: tuple[str, ...], ends: np.ndarray, members: ArchiveEntries) -> Iterator[tuple[str, bytes]]:
    for archive, start, end in zip(archives, [0, *ends.tolist()], ends.tolist(), strict=False):
        yield from ((archive, name) for name in members.names[start:end].to_pylist())
