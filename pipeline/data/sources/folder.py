"""A folder of images: a subfolder for each class, below the folders of the splits if there are any.

The rules in `conventions/` decide which folders stand for a split or a class, and which files are left out.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.parquet import make_texts
from firstlight.pipeline.data.sources.conventions.folder_layout import (
    UNLABELLED_FOLDERS,
    FolderPlan,
    build_folder_tree,
    find_layout,
    plan_given_splits,
)
from firstlight.pipeline.data.sources.conventions.folder_scan import (
    FolderScan,
    scan_folder,
    scan_remote,
)
from firstlight.pipeline.data.sources.conventions.image_signatures import IMAGE_SUFFIXES
from firstlight.pipeline.data.sources.conventions.reading import (
    count_labels,
    describe_absent_classes,
    describe_classes,
    describe_near_twins,
    describe_read_files,
    fold_name,
    join_names,
)
from firstlight.pipeline.data.sources.conventions.split_names import SPLIT_TITLES, SPLITS, find_split_names, list_words
from firstlight.pipeline.data.sources.files import Files, LocalFiles, decode_path, hash_facts, read_concurrently
from firstlight.pipeline.data.sources.labels import clean_label
from firstlight.pipeline.data.sources.remote_files import RemoteFiles
from firstlight.pipeline.data.sources.source import Record, Source, SourceFiles, SourceOptions, open_root
from firstlight.pipeline.data.sources.source_splits import describe_unread, settle_splits
from firstlight.pipeline.errors import UserError, describe_os_error

# Ending of files -> the source that reads them
OTHER_SOURCES = {".tar": "webdataset", ".tgz": "webdataset", ".parquet": "parquet"}


@dataclass(frozen=True)
class FolderSource(Source):
    """Image files below a folder. A link is read only if its target is below the folder, unless links are followed."""

    kind = "folder"
    root: Path
    # (n,) relative to the root, as the bytes of the file system, since not every name is UTF-8
    paths: pa.BinaryArray
    follow_links: bool = field(default=False, kw_only=True)

    def list_files(self) -> SourceFiles:
        # Published sets, which derive from this class, have lists and annotations besides
        besides = "" if type(self) is FolderSource else self.fingerprint
        return SourceFiles(LocalFiles(self.root, self.follow_links), self.paths.to_pylist(), besides)

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        for index in indices.tolist():
            path, label = self.paths[index].as_py(), int(self.labels[index])
            try:
                yield Record(decode_path(path), self._load_file(path), label)
            except OSError as error:
                yield Record(decode_path(path), None, label, describe_os_error(error, None))

    def _load_file(self, path: bytes) -> bytes:
        return LocalFiles(self.root, self.follow_links).read(path)


@dataclass(frozen=True)
class RemoteFolderSource(Source):
    """Image files below a URI."""

    kind = "folder"
    files: RemoteFiles
    paths: pa.BinaryArray  # (n,) relative to the root

    def list_files(self) -> SourceFiles:
        return SourceFiles(self.files, self.paths.to_pylist())

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        yield from read_concurrently(self._read_record, indices.tolist())

    def _read_record(self, index: int) -> Record:
        path, label = self.paths[index].as_py(), int(self.labels[index])
        try:
            return Record(decode_path(path), self.files.read(path), label)
        except OSError as error:
            return Record(decode_path(path), None, label, describe_os_error(error, None))


def open_folder(dataset: SourceOptions) -> Source:
    """Lists the images of a folder or a URI.

    Raises:
        UserError: there are no images, it cannot be told what the folders are, or a class occurs only in another split
            than the training split.
    """
    below = open_root(dataset.root, dataset.source, dataset.follow_links)
    scan = scan_folder(below) if isinstance(below, LocalFiles) else scan_remote(below)
    if not dataset.follow_links:
        _check_split_links(scan, below)
    _require_images(scan, below)
    facts = sorted(scan.images)
    paths = [path for path, _, _ in facts]
    counts = Counter(path.rpartition(b"/")[0] for path in paths)
    tree = build_folder_tree(counts)
    plan = (
        find_layout(tree, decode_path)
        if dataset.splits is None
        else plan_given_splits(tree, dataset.splits, os.fsencode, decode_path)
    )
    placed = _place_images(paths, plan)
    classes, labels, notes = _label_by_folder(paths, placed, dataset)
    members = {split: [k for k, (own, _) in enumerate(placed) if own == split] for split in SPLITS}
    rows = {split: np.array(indices, np.int64) for split, indices in members.items() if indices}
    settled = settle_splits(rows, paths, labels, dataset)
    outside = {decode_path(plan.name_outsider(paths[k])) for k, (own, _) in enumerate(placed) if own is None}
    num_outside = sum(own is None for own, _ in placed)
    left_out = {**scan.left_out, **({"images outside of the splits": num_outside} if num_outside else {})}
    fingerprint = hash_facts(facts[k] for k, (own, _) in enumerate(placed) if own is not None)
    common = (classes, fingerprint, labels, settled.rows)
    array = make_texts(paths, pa.binary())
    source: Source
    if isinstance(below, LocalFiles):
        source = FolderSource(*common, below.root, array, follow_links=dataset.follow_links)
    else:
        source = RemoteFolderSource(*common, below, array)
    return replace(
        source,
        reading=(
            describe_read_files(len(paths) - num_outside, left_out),
            *plan.reading,
            *settled.reading,
            *describe_classes(classes, labels, settled.rows),
        ),
        notes=(
            *plan.notes,
            *settled.notes,
            *describe_unread(outside, "outside of the splits"),
            *scan.describe_findings(dataset.follow_links),
            *(_describe_empty_folders(scan, plan, counts) if classes else ()),
            *notes,
            *describe_absent_classes(classes, labels, settled.rows),
        ),
        draws_test=settled.draws_test,
    )


def _require_images(scan: FolderScan, below: Files) -> None:
    """Raises UserError if no image can be read; the message says what was seen instead."""
    where = below.get_location()
    if scan.images and len(scan.outside_links) == len(scan.images):
        raise UserError(
            f"dataset.root: all {len(scan.images):,} images in {where!r} are links out of it, e.g. "
            f"{decode_path(min(scan.outside_links))}; dataset.follow_links=true reads them"
        )
    if not scan.images:
        links = join_names(map(decode_path, sorted(scan.folder_links)))
        seen = f" (links to folders are not followed: {links}; dataset.follow_links=true does)" if links else ""
        seen += f" ({describe_read_files(0, scan.left_out)})" if scan.left_out else ""
        other = next((source for ending, source in OTHER_SOURCES.items() if ending in scan.left_out), None)
        seen += f"; valid besides: dataset.source={other}" if other else ""
        raise UserError(f"dataset.root: no images ({' '.join(IMAGE_SUFFIXES)}) in {where!r}{seen}")


def _check_split_links(scan: FolderScan, below: Files) -> None:
    """Raises UserError if a link that is not followed has the name of a split, which would then be missing."""
    for link in sorted(scan.folder_links):
        name = decode_path(link.rpartition(b"/")[2])
        if find_split_names([name]):
            raise UserError(
                f"dataset.root: {below.get_location(os.fsdecode(link))!r} is a link; valid: dataset.follow_links=true, "
                "or a folder in its place"
            )


def _place_images(paths: list[bytes], plan: FolderPlan) -> list[tuple[str | None, bytes]]:
    """Returns the split and the class folder of each image, see `FolderPlan.place_folder`."""
    known: dict[bytes, tuple[str | None, bytes]] = {}
    placed = []
    for path in paths:
        folder = path.rpartition(b"/")[0]
        if folder not in known:
            known[folder] = plan.place_folder(folder)
        placed.append(known[folder])
    return placed


def _label_by_folder(
    paths: list[bytes], placed: list[tuple[str | None, bytes]], dataset: SourceOptions
) -> tuple[tuple[str, ...], np.ndarray, list[str]]:
    """Returns the classes, the (n,) labels, -1 = unknown, and notes.

    Classes are the folders of the training split; () if an image lies directly in the folder of the split.

    Raises:
        UserError: another split has a class that the training split lacks.
    """
    labels, notes = np.full(len(paths), -1, np.int64), list[str]()
    folders = {split: {kind for own, kind in placed if own == split} for split in SPLITS}
    if b"" in folders["train"]:
        return (), labels, _describe_strays(paths, placed, "train")
    names = {kind: clean_label(decode_path(kind), dataset) for kind in sorted(set().union(*folders.values())) if kind}
    unlabelled = {kind for kind, name in names.items() if "".join(list_words(name)) in UNLABELLED_FOLDERS}
    classes = tuple(dict.fromkeys(names[kind] for kind in sorted(folders["train"] - unlabelled)))
    if not classes:
        classes, unlabelled = tuple(dict.fromkeys(names[kind] for kind in sorted(folders["train"]))), set()
    numbers = {name: k for k, name in enumerate(classes)}
    for k, (split, kind) in enumerate(placed):
        if split is None or b"" in folders[split] or kind in unlabelled:
            continue
        if names[kind] not in numbers:
            raise _missing_class_error(decode_path(paths[k]), names[kind], classes)
        labels[k] = numbers[names[kind]]
    for split in ("val", "test"):
        notes += _describe_strays(paths, placed, split) if b"" in folders[split] else []
    if unlabelled:
        count = sum(kind in unlabelled for _, kind in placed)
        notes.append(f"{count:,} images in {join_names(names[kind] for kind in sorted(unlabelled))} have no label")
    if merged := _describe_merged(names):
        notes.append(merged)
    return classes, labels, [*notes, *describe_near_twins(classes, count_labels(labels))]


def _missing_class_error(path: str, name: str, classes: tuple[str, ...]) -> UserError:
    near = [known for known in classes if fold_name(known) == fold_name(name)]
    advice = f"; its classes: {join_names(classes, 20)}; valid: the same classes, or dataset.splits without that folder"
    if near:
        advice = f"; {near[0]!r} is one: dataset.label_case=lower reads both alike"
    return UserError(f"dataset.root: {path}: the training split has no class {name!r}{advice}")


def _describe_strays(paths: list[bytes], placed: list[tuple[str | None, bytes]], split: str) -> list[str]:
    """Returns a note if images lie beside the folders of the classes, so that a split has no labels."""
    stray = [path for path, (own, kind) in zip(paths, placed, strict=True) if own == split and not kind]
    folders = sorted({decode_path(kind) for own, kind in placed if own == split and kind})
    if not folders:
        return []
    return [
        f"the {SPLIT_TITLES[split]} split has no labels, as {len(stray):,} images lie beside the folders "
        f"{join_names(folders)}: {join_names(map(decode_path, stray), 2)}"
    ]


def _describe_merged(names: Mapping[bytes, str]) -> str:
    """Returns a note about folders that became one class."""
    groups: dict[str, list[str]] = {}
    for kind, name in names.items():
        groups.setdefault(name, []).append(decode_path(kind))
    merged = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    return f"folders read as one class: {join_names(merged)}" if merged else ""


def _describe_empty_folders(scan: FolderScan, plan: FolderPlan, folders: Iterable[bytes]) -> list[str]:
    """Returns a note about folders without an image among those of the classes. `folders`: those with images."""
    full = {folder[:end] for folder in folders for end in range(len(folder)) if folder[end : end + 1] == b"/"}
    parents = set()
    for pattern in (pattern for patterns in plan.patterns.values() for pattern in patterns):
        start = next((depth for depth, part in enumerate(pattern) if b"*" in part), len(pattern))
        parents.add(b"/".join(pattern[:start]))
    without = scan.folders - full - set(folders) - {b""}
    empty = sorted(folder for folder in without if folder.rpartition(b"/")[0] in parents)
    return [f"folders without an image: {join_names(map(decode_path, empty))}"] if empty else []
