"""Finds the images below a folder or a URI by their endings or bytes, and counts all that is left out."""

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from firstlight.pipeline.data.sources.conventions.folder_layout import SYSTEM_FILES, SYSTEM_FOLDERS
from firstlight.pipeline.data.sources.conventions.image_signatures import (
    IMAGE_SUFFIXES,
    OTHER_SUFFIXES,
    SIGNATURE_BYTES,
    find_ending,
    is_image_start,
)
from firstlight.pipeline.data.sources.conventions.reading import count_things, join_counts, join_names
from firstlight.pipeline.data.sources.files import (
    FileFacts,
    Files,
    LocalFiles,
    decode_path,
    is_below,
    read_many,
)
from firstlight.pipeline.data.sources.remote_files import RemoteFiles

ScannedFile = TypeVar("ScannedFile")
IMAGE_ENDINGS = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)


@dataclass
class FolderScan:
    """The images below a root, and what was left out."""

    images: list[FileFacts] = field(default_factory=list)
    # Paths of all folders, also of those without an image
    folders: set[bytes] = field(default_factory=set)
    # Reason -> number of files
    left_out: Counter[str] = field(default_factory=Counter)
    # Ending -> number of images whose bytes say what they are
    by_bytes: Counter[str] = field(default_factory=Counter)
    # Links to folders that are not followed; images that are links out of the root
    folder_links: list[bytes] = field(default_factory=list)
    outside_links: list[bytes] = field(default_factory=list)

    def describe_findings(self, follow_links: bool) -> list[str]:
        """Returns notes about links, and about images that were found by their bytes."""
        notes = []
        if self.by_bytes:
            count = count_things(self.by_bytes.total(), "image")
            notes.append(f"{count} with other endings, or none, read by their bytes: {join_counts(self.by_bytes)}")
        if self.folder_links:
            links = join_names(map(decode_path, sorted(self.folder_links)))
            why = "their folders are read already" if follow_links else "dataset.follow_links=true reads them"
            notes.append(f"left out, as they are links to folders: {links}; {why}")
        if self.outside_links:
            links = join_names(map(decode_path, sorted(self.outside_links)), 2)
            count = count_things(len(self.outside_links), "image")
            key = "dataset.follow_links=true reads them"
            notes.append(f"{count} not read, as they are links out of the root: {links}; {key}")
        return notes


def scan_folder(files: LocalFiles) -> FolderScan:
    """Lists the images below a folder on disk.

    Links to folders are followed only with `files.follow_links`, and after all other folders, so that no folder is read
    twice.
    """
    scan, unknown = FolderScan(), list[tuple[bytes, os.DirEntry[bytes]]]()
    root = os.fsencode(files.root)
    folders, links, visited = deque([b""]), deque[bytes](), set[tuple[int, int]]()
    while folders or links:
        is_link = not folders
        below = folders.pop() if folders else links.popleft()
        status = os.stat(os.path.join(root, below))
        if (status.st_dev, status.st_ino) in visited and is_link:
            scan.folder_links.append(below.rstrip(b"/"))
            continue
        visited.add((status.st_dev, status.st_ino))
        scan.folders.add(below.rstrip(b"/"))
        with os.scandir(os.path.join(root, below)) as opened:
            entries = list(opened)
        for entry in entries:
            path = below + entry.name
            if entry.name.startswith(b"."):
                scan.left_out["hidden"] += 1
            elif entry.is_dir(follow_symlinks=False):
                if _is_system_folder(entry.name):
                    scan.left_out[f"in {decode_path(entry.name)}"] += _count_files(entry.path)
                else:
                    folders.append(path + b"/")
            # entry.is_dir() raises if a link points to itself
            elif entry.is_symlink() and os.path.isdir(entry.path):
                (links if files.follow_links else scan.folder_links).append(path + b"/" if files.follow_links else path)
            elif path.lower().endswith(IMAGE_ENDINGS):
                # Broken links and pipes are listed too: their records get the reason when they are read
                scan.images.append(get_entry_facts(path, entry))
                if entry.is_symlink() and not files.follow_links and os.path.exists(entry.path):
                    scan.outside_links += [path] * (not is_below(root, entry.path))
            elif _count_other_ending(scan, entry.name):
                unknown.append((path, entry))
    _look_into_files(scan, files, unknown, lambda item: item[0], lambda item: get_entry_facts(*item))
    scan.left_out += Counter()
    return scan


def scan_remote(files: RemoteFiles) -> FolderScan:
    """Lists the images below a URI."""
    scan, unknown = FolderScan(), list[FileFacts]()
    for facts in files.list_all():
        path = facts[0]
        *folders, name = path.split(b"/")
        scan.folders |= {b"/".join(folders[:depth]) for depth in range(len(folders) + 1)}
        system = next((folder for folder in folders if _is_system_folder(folder)), None)
        if any(part.startswith(b".") for part in (*folders, name)):
            scan.left_out["hidden"] += 1
        elif system is not None:
            scan.left_out[f"in {decode_path(system)}"] += 1
        elif path.lower().endswith(IMAGE_ENDINGS):
            scan.images.append(facts)
        elif _count_other_ending(scan, name):
            unknown.append(facts)
    _look_into_files(scan, files, unknown, lambda facts: facts[0], lambda facts: facts)
    scan.folders = {
        folder
        for folder in scan.folders
        if not any(part.startswith(b".") or _is_system_folder(part) for part in folder.split(b"/"))
    }
    return scan


def _is_system_folder(name: bytes) -> bool:
    return decode_path(name).lower() in SYSTEM_FOLDERS


def _count_files(folder: bytes) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def _count_other_ending(scan: FolderScan, name: bytes) -> bool:
    """Counts a file whose ending is known to be no image's; returns True if its bytes have to say what it is."""
    text = decode_path(name)
    ending = find_ending(text)
    if text.lower() in SYSTEM_FILES:
        scan.left_out["of the system"] += 1
    elif ending in OTHER_SUFFIXES:
        scan.left_out[ending] += 1
    else:
        return True
    return False


def _look_into_files(
    scan: FolderScan,
    files: Files,
    unknown: Sequence[ScannedFile],
    path_of: Callable[[ScannedFile], bytes],
    facts_of: Callable[[ScannedFile], FileFacts],
) -> None:
    """Adds those files that are images by their first bytes, and counts the others by their endings."""
    for item, start in zip(
        unknown, read_many(lambda item: _read_file_start(files, path_of(item)), unknown), strict=True
    ):
        ending = find_ending(decode_path(path_of(item))) or "no ending"
        if start is not None and is_image_start(start):
            scan.images.append(facts_of(item))
            scan.by_bytes[ending] += 1
        else:
            scan.left_out[ending if start is not None else "not readable"] += 1


def _read_file_start(files: Files, path: bytes) -> bytes | None:
    try:
        return files.read_part(path, 0, SIGNATURE_BYTES)
    except (OSError, ValueError):
        return None


def get_entry_facts(path: bytes, entry: os.DirEntry[bytes]) -> FileFacts:
    """Returns the facts of a file; those of the link itself if it is broken."""
    try:
        facts = entry.stat()
    except OSError:
        facts = entry.stat(follow_symlinks=False)
    return path, facts.st_size, facts.st_mtime_ns
