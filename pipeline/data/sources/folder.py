"""A folder of images: a sub-folder per class, and train/ and test/ (or val/) where there are splits."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from firstlight.pipeline.data.sources.files import Listed, Local, Remote, at_once, fingerprint, text
from firstlight.pipeline.data.sources.source import SUFFIXES, Record, Source, not_read, root_files, with_test
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

TRAIN_FOLDERS, TEST_FOLDERS = (b"train", b"training"), (b"test", b"val", b"validation")  # the first that there is
ENDINGS = tuple(suffix.encode() for suffix in SUFFIXES)


@dataclass(frozen=True)
class Folder(Source):
    """Image files below a folder; a link is read only if it stays inside."""

    kind = "folder"
    root: Path
    paths: pa.BinaryArray  # (n,) relative to root, bytes as the file system has them: not every name is UTF-8

    def _records(self, places: np.ndarray) -> Iterator[Record]:
        for place in places.tolist():
            path, label = self.paths[place].as_py(), int(self.labels[place])
            try:
                yield Record(text(path), self._load(path), label)
            except OSError as error:
                yield Record(text(path), None, label, error.strerror or str(error))

    def _load(self, path: bytes) -> bytes:
        return Local(self.root).read(path)


@dataclass(frozen=True)
class RemoteFolder(Source):
    """Image files below a URI."""

    kind = "folder"
    below: Remote
    paths: pa.BinaryArray  # (n,) relative to the root

    def _records(self, places: np.ndarray) -> Iterator[Record]:
        yield from at_once(self._record, places.tolist())

    def _record(self, place: int) -> Record:
        path, label = self.paths[place].as_py(), int(self.labels[place])
        try:
            return Record(text(path), self.below.read(path), label)
        except OSError as error:
            return Record(text(path), None, label, error.strerror or str(error))


def open_folder(dataset: "Dataset") -> Source:
    below = root_files(dataset)
    tops, images, links, others = _on_disk(below.root) if isinstance(below, Local) else _remote(below.find())
    if not images:
        refused = f" ({len(links)} links to folders are not followed, e.g. {text(links[0][0])})" if links else ""
        raise UserError(f"dataset.root: no images ({' '.join(SUFFIXES)}) in {below.where()!r}{refused}")
    found_files = sorted(images + links)
    paths = [path for path, _, _ in found_files]
    members = {split: [k for k, path in enumerate(paths) if path.startswith(top + b"/")] for split, top in tops.items()}
    members = members if tops else {"train": list(range(len(paths)))}
    classes, labels = _folder_labels(paths, {path for path, _, _ in links}, members, tops)
    rows = {split: np.array(places, np.int64) for split, places in members.items() if places}
    if "train" not in rows:
        raise UserError(f"dataset.root: no images in {below.where(os.fsdecode(tops['train']))!r}")
    rows = with_test(rows, paths, labels, dataset)
    found = (classes, fingerprint(found_files), labels, rows)
    names, aside = (
        pa.array(paths, pa.binary()),
        not_read(map(text, others), f"as {b' and '.join(tops.values()).decode()} are the splits"),
    )
    return (
        Folder(*found, below.root, names, aside=aside)
        if isinstance(below, Local)
        else RemoteFolder(*found, below, names, aside=aside)
    )


def _on_disk(root: Path) -> tuple[dict[str, bytes], list[Listed], list[Listed], set[bytes]]:
    """The split folders, the images, the links to folders, and what lies beside the split folders."""
    tops = _split_folders(root)
    with os.scandir(os.fsencode(root)) as scan:
        beside = {entry.name for entry in scan if tops and not entry.name.startswith(b".") and _may_hold(entry)}
    return tops, *_walk(root, [top + b"/" for top in tops.values()] or [b""]), beside - {*tops.values()}


def _may_hold(entry: os.DirEntry[bytes]) -> bool:
    return os.path.isdir(entry.path) or entry.name.lower().endswith(ENDINGS)


def _remote(found_files: list[Listed]) -> tuple[dict[str, bytes], list[Listed], list[Listed], set[bytes]]:
    """As `_on_disk`."""
    images = [
        (path, size, changed)
        for path, size, changed in found_files
        if path.lower().endswith(ENDINGS) and not (b"/" + path).count(b"/.")
    ]
    there = {path.partition(b"/")[0] for path, _, _ in images if b"/" in path}
    found = {
        "train": [name for name in TRAIN_FOLDERS if name in there],
        "test": [name for name in TEST_FOLDERS if name in there],
    }
    tops = {split: names[0] for split, names in found.items() if names} if found["train"] else {}
    beside = {path.partition(b"/")[0] for path, _, _ in images} - {*tops.values()} if tops else set()
    return tops, [item for item in images if not tops or item[0].partition(b"/")[0] in tops.values()], [], beside


def _split_folders(root: Path) -> dict[str, bytes]:
    """The sub-folders that are splits: {} where there is none for training, as then the whole root is."""
    found: dict[str, bytes] = {}
    for split, names in (("train", TRAIN_FOLDERS), ("test", TEST_FOLDERS)):
        there = [name for name in names if (root / os.fsdecode(name)).is_dir()]
        if there:
            found[split] = there[0]
    for name in found.values():
        if (root / os.fsdecode(name)).is_symlink():
            raise UserError(
                f"dataset.root: {str(root / os.fsdecode(name))!r} is a link; valid: a folder, or dataset.root = the folder behind it"
            )
    return found if "train" in found else {}


def _walk(root: Path, starts: list[bytes]) -> tuple[list[Listed], list[Listed]]:
    """Image files, and links to folders, which are reported instead of followed: they may leave the root, or turn in circles."""
    images: list[Listed] = []
    links: list[Listed] = []
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
            elif os.path.isdir(entry.path):  # `entry` itself raises over a link to itself
                links.append(listed(path, entry))
            elif path.lower().endswith(ENDINGS):
                images.append(listed(path, entry))  # a link to nothing or itself, or a pipe, too: reading it says so
    return images, links


def listed(path: bytes, entry: os.DirEntry[bytes]) -> Listed:
    """Of a link to nothing, the link's own."""
    try:
        facts = entry.stat()
    except OSError:
        facts = entry.stat(follow_symlinks=False)
    return path, facts.st_size, facts.st_mtime_ns


def _folder_labels(
    paths: list[bytes], links: set[bytes], members: dict[str, list[int]], tops: dict[str, bytes]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes = the sub-folders of the training split, () if an image lies beside them; labels (n,), -1 = unknown."""
    names: list[bytes] = []
    labels = np.full(len(paths), -1, np.int64)
    for split, places in members.items():  # train first
        start = len(tops[split]) + 1 if tops else 0
        folders = {k: paths[k][start:].rpartition(b"/")[0].split(b"/")[0] for k in places if paths[k] not in links}
        kinds = set(folders.values())
        if b"" in kinds:
            continue
        names = sorted(kinds) if split == "train" else names
        index = {name: k for k, name in enumerate(names)}
        for place, name in folders.items() if names else ():
            if name not in index:
                raise UserError(f"dataset.root: {text(paths[place])}: the training split has no class {text(name)!r}")
            labels[place] = index[name]
    return tuple(map(text, names)), labels
