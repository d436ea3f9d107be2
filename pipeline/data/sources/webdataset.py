"""Tar archives in the layout of WebDataset.

`dataset.root` is the folder of train-000.tar, train-001.tar.gz ..., at any depth, or names archives itself:
.../train-{000..009}.tar.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.sources.conventions.archive_names import find_archives
from firstlight.pipeline.data.sources.conventions.folder_layout import build_folder_tree, find_layout
from firstlight.pipeline.data.sources.conventions.reading import (
    count_things,
    describe_absent_classes,
    describe_classes,
    describe_read_files,
    drop_refused,
)
from firstlight.pipeline.data.sources.conventions.split_names import SPLITS
from firstlight.pipeline.data.sources.conventions.tar_entries import (
    ArchiveEntries,
    PackedListing,
    ResolvedSamples,
    pack_listing,
    resolve_samples,
)
from firstlight.pipeline.data.sources.files import FileFacts, Files, decode_path, hash_facts, read_concurrently
from firstlight.pipeline.data.sources.labels import CLASSES_FILE, LabelReading, read_class_names, read_labels
from firstlight.pipeline.data.sources.source import Record, Source, SourceFiles, SourceOptions
from firstlight.pipeline.data.sources.source_splits import (
    FileSplits,
    describe_unread,
    lay_end_to_end,
    settle_splits,
    split_files,
)
from firstlight.pipeline.data.sources.tar_index import ARCHIVE_ERRORS, index_archive, open_archive
from firstlight.pipeline.errors import UserError, one_line


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

    def list_files(self) -> SourceFiles:
        names = [*self.archives, *[CLASSES_FILE] * self.files.exists(CLASSES_FILE)]
        return SourceFiles(self.files, [name.encode("utf-8", "surrogateescape") for name in names])

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
        UserError: there are no archives, no images for training, or a label is no class; or it cannot be told which
            member of a sample is its image.
    """
    files, names = find_archives(dataset)
    found = split_files(names, dataset, repr(files.get_location()))
    archives = tuple(found.names)
    facts = tuple(files.get_facts(name) for name in archives)
    listings = _list_archives(files, archives, facts, dataset.label_column)
    resolved = resolve_samples(listings, dataset)
    _require_training_images(found, resolved, archives, files)
    members, ends = resolved.entries, resolved.ends
    read, rows, folder_reading = _label_entries(dataset, files, archives, found, resolved)
    keys = [
        b"%s/%s" % (name.encode("utf-8", "surrogateescape"), path)
        for name, path in _iterate_names(archives, ends, members)
    ]
    settled = settle_splits(rows, keys, read.labels, dataset)
    facts += tuple(files.get_facts(name) for name in [CLASSES_FILE] * files.exists(CLASSES_FILE))
    read_rows = drop_refused(settled.rows, members.reasons)
    left_out: Counter[str] = sum((listing.left_out for listing in listings), Counter())
    return WebDataset(
        read.classes,
        hash_facts(facts),
        read.labels,
        settled.rows,
        files,
        archives,
        ends,
        members,
        reading=(
            f"{describe_read_files(sum(map(len, read_rows.values())), left_out, 'images')}, of "
            f"{count_things(len(archives), 'archive')}",
            *found.reading,
            *folder_reading,
            *settled.reading,
            *describe_classes(read.classes, read.labels, read_rows),
        ),
        notes=(
            *describe_unread(found.others, "as others are named for the splits"),
            *resolved.notes,
            *settled.notes,
            *read.notes,
            *describe_absent_classes(read.classes, read.labels, read_rows),
        ),
        draws_test=settled.draws_test,
    )


def _require_training_images(
    found: FileSplits, resolved: ResolvedSamples, archives: tuple[str, ...], files: Files
) -> None:
    members, num_train = resolved.entries, len(found.splits["train"])
    if len(members.reasons) == len(members.names) or num_train == 0 or int(resolved.ends[num_train - 1]) == 0:
        raise UserError(
            f"dataset.root: {_describe_no_images(members)} in {', '.join(archives[:3])} of {files.get_location()!r}"
        )


def _label_entries(
    dataset: SourceOptions, files: Files, archives: tuple[str, ...], found: FileSplits, resolved: ResolvedSamples
) -> tuple[LabelReading, dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the labels of the entries, the rows of the splits, and notes about the folders of the keys.

    Labels are those of the samples; where no sample has one, the folders of the keys are read like folders on disk.
    """
    members, ends = resolved.entries, resolved.ends
    counts = np.diff(ends, prepend=0).tolist()
    rows = lay_end_to_end(found.splits, counts)
    values = pa.chunked_array([members.labels])
    reading: tuple[str, ...] = ()
    if dataset.label_column is not None and values.null_count == len(values):
        placed, reading = _read_key_folders(members)
        if placed:
            values = pa.chunked_array([pa.array([kind or None for _, kind in placed], pa.string())])
        if placed and len(rows) == 1 and dataset.splits is None:
            splits = {split: [k for k, (own, _) in enumerate(placed) if own == split] for split in SPLITS}
            rows = {split: np.array(indices, np.int64) for split, indices in splits.items() if indices}
    listed = files.get_location(CLASSES_FILE) if files.exists(CLASSES_FILE) else ""
    known = read_class_names(files) if dataset.label_column is not None else ()
    read = read_labels(values, known, lambda index: _describe_entry(archives, ends, members, index), dataset, listed)
    return read, rows, reading


def _read_key_folders(members: ArchiveEntries) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Returns the split and the class of each entry by the folders of its key, and notes; [] without folders."""
    folders = [name.rpartition(b"/")[0].strip(b"/") for name in members.names.to_pylist()]
    good = [k for k in range(len(folders)) if k not in members.reasons]
    try:
        plan = find_layout(build_folder_tree(Counter(folders[k] for k in good)), decode_path)
    except UserError as error:
        return [], (f"no sample has a label, and the folders of the keys are not read: {error}",)
    known = {folder: plan.place_folder(folder) for folder in set(folders)}
    classes = {kind for folder in {folders[k] for k in good} for _, kind in [known[folder]]}
    if classes == {b""} or (b"" in classes and len(classes) > 1):
        return [], ()
    note = "no sample has a label: the folder of a key is its class; dataset.label_column=null reads no labels"
    placed = [(known[folder][0] or "train", decode_path(known[folder][1])) for folder in folders]
    return placed, (*plan.reading, *plan.notes, note)


# The cache serves a run, which lists its source twice: for its checks, and to prepare it
@functools.lru_cache(maxsize=1)
def _list_archives(
    files: Files, archives: tuple[str, ...], facts: tuple[FileFacts, ...], label_column: str | None
) -> tuple[PackedListing, ...]:
    """Returns the members of all archives.

    `facts` are those of the archives when they were listed: the cache is not used if they changed.
    """
    return tuple(read_concurrently(lambda name: pack_listing(index_archive(files, name, label_column)), archives))


def _describe_no_images(members: ArchiveEntries) -> str:
    return f"no images, but e.g. {next(iter(members.reasons.values()))!r}" if members.reasons else "no images"


def _describe_entry(archives: tuple[str, ...], ends: np.ndarray, members: ArchiveEntries, index: int) -> str:
    return f"{archives[int(np.searchsorted(ends, index, side='right'))]}/{members.names[index].as_py().decode()}"


def _iterate_names(archives: tuple[str, ...], ends: np.ndarray, members: ArchiveEntries) -> Iterator[tuple[str, bytes]]:
    for archive, start, end in zip(archives, [0, *ends.tolist()], ends.tolist(), strict=False):
        yield from ((archive, name) for name in members.names[start:end].to_pylist())
