"""A folder of images: a subfolder for each class, below train/ and test/ (or val/) if there are splits."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.sources.files import (
    FileFacts,
    LocalFiles,
    decode_path,
    hash_facts,
    read_concurrently,
)
from firstlight.pipeline.data.sources.remote_files import RemoteFiles
from firstlight.pipeline.data.sources.source import (
    IMAGE_SUFFIXES,
    Record,
    Source,
    SourceOptions,
    add_test_split,
    describe_unread,
    open_root,
)
from firstlight.pipeline.errors import UserError

# The first that exists counts
TRAIN_FOLDERS, TEST_FOLDERS = (b"train", b"training"), (b"test", b"val", b"validation")
IMAGE_ENDINGS = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True)
class FolderSource(Source):
    """Image files below a folder. A link is read only if its target is below the folder."""

    kind = "folder"
    root: Path
    # (n,) relative to the root, as the bytes of the file system, since not every name is UTF-8
    paths: pa.BinaryArray

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        for index in indices.tolist():
            path, label = self.paths[index].as_py(), int(self.labels[index])
            try:
                yield Record(decode_path(path), self._load_file(path), label)
            except OSError as error:
                yield Record(decode_path(path), None, label, error.strerror or str(error))

    def _load_file(self, path: bytes) -> bytes:
        return LocalFiles(self.root).read(path)


@dataclass(frozen=True)
class RemoteFolderSource(Source):
    """Image files below a URI."""

    kind = "folder"
    files: RemoteFiles
    paths: pa.BinaryArray  # (n,) relative to the root

    def _read_records(self, indices: np.ndarray) -> Iterator[Record]:
        yield from read_concurrently(self._read_record, indices.tolist())

    def _read_record(self, index: int) -> Record:
        path, label = self.paths[index].as_py(), int(self.labels[index])
        try:
            return Record(decode_path(path), self.files.read(path), label)
        except OSError as error:
            return Record(decode_path(path), None, label, error.strerror or str(error))


class _FolderListing(NamedTuple):
    """The files below a root.

    `tops` has the folder of each split. `others` are the names outside of these folders that may hold images.
    """

    tops: dict[str, bytes]
    images: list[FileFacts]
    links: list[FileFacts]
    others: set[bytes]


def open_folder(dataset: SourceOptions) -> Source:
    """Lists the images of a folder or a URI.

    Raises:
        UserError: there are no images, a split folder is a link, or a class occurs only in the test split.
    """
    below = open_root(dataset.root, dataset.source)
    listing = _list_local(below.root) if isinstance(below, LocalFiles) else _list_remote(below.list_all())
    tops, links = listing.tops, listing.links
    if not listing.images:
        refused = f" ({len(links)} links to folders are not followed, e.g. {decode_path(links[0][0])})" if links else ""
        raise UserError(f"dataset.root: no images ({' '.join(IMAGE_SUFFIXES)}) in {below.get_location()!r}{refused}")
    facts = sorted(listing.images + links)
    paths = [path for path, _, _ in facts]
    members = {split: [k for k, path in enumerate(paths) if path.startswith(top + b"/")] for split, top in tops.items()}
    members = members if tops else {"train": list(range(len(paths)))}
    classes, labels = _label_by_folder(paths, {path for path, _, _ in links}, members, tops)
    rows = {split: np.array(indices, np.int64) for split, indices in members.items() if indices}
    if "train" not in rows:
        raise UserError(f"dataset.root: no images in {below.get_location(os.fsdecode(tops['train']))!r}")
    rows = add_test_split(rows, paths, labels, dataset)
    why = f"as {b' and '.join(tops.values()).decode()} are the splits"
    note = describe_unread(map(decode_path, listing.others), why)
    common = (classes, hash_facts(facts), labels, rows)
    if isinstance(below, LocalFiles):
        return FolderSource(*common, below.root, pa.array(paths, pa.binary()), unread_note=note)
    return RemoteFolderSource(*common, below, pa.array(paths, pa.binary()), unread_note=note)


def _list_local(root: Path) -> _FolderListing:
    tops = _find_split_folders(root)
    with os.scandir(os.fsencode(root)) as scan:
        names = {entry.name for entry in scan if tops and not entry.name.startswith(b".") and _may_hold_images(entry)}
    images, links = _walk_folders(root, [top + b"/" for top in tops.values()] or [b""])
    return _FolderListing(tops, images, links, names - {*tops.values()})


def _may_hold_images(entry: os.DirEntry[bytes]) -> bool:
    return os.path.isdir(entry.path) or entry.name.lower().endswith(IMAGE_ENDINGS)


def _list_remote(files: list[FileFacts]) -> _FolderListing:
    images = [
        (path, size, changed)
        for path, size, changed in files
        if path.lower().endswith(IMAGE_ENDINGS) and not (b"/" + path).count(b"/.")
    ]
    folders = {path.partition(b"/")[0] for path, _, _ in images if b"/" in path}
    found = {
        "train": [name for name in TRAIN_FOLDERS if name in folders],
        "test": [name for name in TEST_FOLDERS if name in folders],
    }
    tops = {split: names[0] for split, names in found.items() if names} if found["train"] else {}
    others = {path.partition(b"/")[0] for path, _, _ in images} - {*tops.values()} if tops else set()
    images = [facts for facts in images if not tops or facts[0].partition(b"/")[0] in tops.values()]
    return _FolderListing(tops, images, [], others)


def _find_split_folders(root: Path) -> dict[str, bytes]:
    """Returns the subfolder of each split; {} if none is for training, as the whole root is the training split then.

    Raises:
        UserError: a split folder is a link.
    """
    found: dict[str, bytes] = {}
    for split, names in (("train", TRAIN_FOLDERS), ("test", TEST_FOLDERS)):
        existing = [name for name in names if (root / os.fsdecode(name)).is_dir()]
        if existing:
            found[split] = existing[0]
    for name in found.values():
        if (root / os.fsdecode(name)).is_symlink():
            raise UserError(
                f"dataset.root: {str(root / os.fsdecode(name))!r} is a link; "
                "valid: a folder, or dataset.root = the target of the link"
            )
    return found if "train" in found else {}


def _walk_folders(root: Path, starts: list[bytes]) -> tuple[list[FileFacts], list[FileFacts]]:
    """Returns the image files below the folders `starts`, and the links to folders.

    Such links are reported instead of followed: they may leave the root, or form a circle.
    """
    images: list[FileFacts] = []
    links: list[FileFacts] = []
    folders = list(starts)
    while folders:
        below = folders.pop()
        with os.scandir(os.path.join(os.fsencode(root), below)) as scan:
            entries = list(scan)
        for entry in entries:
            path = below + entry.name
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(path + b"/")
            # entry.is_dir() raises if a link points to itself
            elif os.path.isdir(entry.path):
                links.append(get_entry_facts(path, entry))
            elif path.lower().endswith(IMAGE_ENDINGS):
                # Broken links and pipes are listed too: their records get the reason when they are read
                images.append(get_entry_facts(path, entry))
    return images, links


def get_entry_facts(path: bytes, entry: os.DirEntry[bytes]) -> FileFacts:
    """Returns the facts of a file; those of the link itself if it is broken."""
    try:
        facts = entry.stat()
    except OSError:
        facts = entry.stat(follow_symlinks=False)
    return path, facts.st_size, facts.st_mtime_ns


def _label_by_folder(
    paths: list[bytes], links: set[bytes], members: dict[str, list[int]], tops: dict[str, bytes]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the classes and the (n,) labels, -1 = unknown.

    Classes are the subfolders of the training split; () if an image lies directly in the folder of the split.

    Raises:
        UserError: the test split has a class that the training split lacks.
    """
    names: list[bytes] = []
    labels = np.full(len(paths), -1, np.int64)
    # The training split comes first
    for split, indices in members.items():
        start = len(tops[split]) + 1 if tops else 0
        folders = {k: paths[k][start:].rpartition(b"/")[0].split(b"/")[0] for k in indices if paths[k] not in links}
        kinds = set(folders.values())
        if b"" in kinds:
            continue
        names = sorted(kinds) if split == "train" else names
        class_numbers = {name: k for k, name in enumerate(names)}
        for index, name in folders.items() if names else ():
            if name not in class_numbers:
                raise UserError(
                    f"dataset.root: {decode_path(paths[index])}: the training split has no class {decode_path(name)!r}"
                )
            labels[index] = class_numbers[name]
    return tuple(map(decode_path, names)), labels
