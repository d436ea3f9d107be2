"""The identity of a source: what changes whenever its files, or the way they are read, do.

With `dataset.fingerprint: sample` it is of names, sizes and times, and of a sample of bytes: two folders with the same
names, sizes and times, as a reproducible archive unpacks them, are told apart by their pixels. With `content` it is of
all bytes, and not of times, so that a copy of a folder is the same source.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from firstlight.pipeline.data.sources.files import Files, LocalFiles, read_concurrently, read_many
from firstlight.pipeline.data.sources.source import Source, SourceOptions

# Files of which bytes are sampled, evenly spaced in the order of their names
MAX_SAMPLED_FILES = 4096
# Up to this many bytes, the sampled files are read as a whole
MAX_WHOLE_BYTES = 1 << 26
# Otherwise blocks are read, evenly spaced; of many files few each, of few files, which are archives, more
SAMPLED_BLOCK_BYTES, MIN_BLOCKS, MAX_BLOCKS, MAX_ALL_BLOCKS = 1 << 12, 3, 256, 16_384
HASHED_CHUNK_BYTES = 1 << 20


def identify_source(source: Source, dataset: SourceOptions) -> Source:
    """Returns the source with a fingerprint of its files and of how they are read: classes, labels and splits.

    `earlier_fingerprint` is the one by which earlier versions named stores: of names, sizes and times only.
    """
    listed = source.list_files()
    if listed is None:
        return source
    found = hashlib.sha256(_hash_reading(source).encode())
    if dataset.fingerprint == "content":
        state = _hash_state(listed.files, listed.names) or source.fingerprint
        found.update(hash_contents(listed.files, tuple(listed.names), state).encode())
        found.update(listed.besides.encode())
    else:
        found.update(source.fingerprint.encode())
        # The clients of remote files give a version of each file, which changes with its bytes
        found.update(hash_samples(listed.files, listed.names).encode() if isinstance(listed.files, LocalFiles) else b"")
    return replace(
        source,
        fingerprint=found.hexdigest(),
        identity=dataset.fingerprint,
        earlier_fingerprint=source.fingerprint,
    )


def _hash_reading(source: Source) -> str:
    """Returns the SHA-256 of the classes, of the label of each image, and of the images of each split."""
    found = hashlib.sha256(json.dumps([source.classes, source.annotations]).encode())
    found.update(np.ascontiguousarray(source.labels, np.int64).tobytes())
    for split, rows in source.rows.items():
        found.update(f"\0{split}\0{len(rows)}\0".encode())
        found.update(np.ascontiguousarray(rows, np.int64).tobytes())
    return found.hexdigest()


def hash_samples(files: LocalFiles, names: Sequence[bytes]) -> str:
    """Returns the SHA-256 of a sample of the bytes of some of the files; a file that cannot be read counts as such."""
    chosen = [names[k] for k in np.linspace(0, len(names) - 1, min(len(names), MAX_SAMPLED_FILES)).astype(int)]
    sizes = list(read_many(lambda name: _find_size(files, name), chosen))
    is_whole = sum(sizes) <= MAX_WHOLE_BYTES
    blocks = min(max(MAX_ALL_BLOCKS // max(len(chosen), 1), MIN_BLOCKS), MAX_BLOCKS)

    def sample(item: tuple[bytes, int]) -> bytes:
        name, size = item
        starts = [0] if is_whole else np.linspace(0, max(size - SAMPLED_BLOCK_BYTES, 0), blocks).astype(int).tolist()
        try:
            read = files.read_blocks(name, dict.fromkeys(starts), size if is_whole else SAMPLED_BLOCK_BYTES)
        except (OSError, ValueError):
            return b"unreadable"
        return hashlib.sha256(read).digest()

    digest = hashlib.sha256()
    for name, sampled in zip(chosen, read_many(sample, list(zip(chosen, sizes, strict=True))), strict=True):
        digest.update(b"%s\0%s\0" % (name, sampled))
    return digest.hexdigest()


def _find_size(files: LocalFiles, name: bytes) -> int:
    try:
        return files.get_facts(name.decode("utf-8", "surrogateescape"))[1]
    except (OSError, ValueError):
        return 0


def _hash_state(files: Files, names: Sequence[bytes]) -> str:
    """Returns the SHA-256 of sizes, times and times of change, which no program can set; "" for remote files."""
    if not isinstance(files, LocalFiles):
        return ""
    digest = hashlib.sha256()
    for name in names:
        try:
            status = os.stat(os.path.join(os.fsencode(files.root), name))
            digest.update(b"%d %d %d\0" % (status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        except (OSError, ValueError):
            digest.update(b"\0")
    return digest.hexdigest()


# The cache serves a source that is opened twice where it extends a store, for the checks and to prepare it, and where
# it is looked at before a recipe is written for it. Files that changed have another `state`
@functools.lru_cache(maxsize=2)
def hash_contents(files: Files, names: tuple[bytes, ...], state: str) -> str:
    """Returns the SHA-256 of the names of the files and of all of their bytes."""
    digest = hashlib.sha256()
    for name, content in zip(names, read_concurrently(lambda name: _hash_content(files, name), names), strict=True):
        digest.update(b"%s\0%s\0" % (name, content))
    return digest.hexdigest()


def _hash_content(files: Files, name: bytes) -> bytes:
    digest, place = hashlib.sha256(), 0
    try:
        if not isinstance(files, LocalFiles):
            with files.open(os.fsdecode(name)) as opened:
                while chunk := opened.read(HASHED_CHUNK_BYTES):
                    digest.update(chunk)
                return digest.digest()
        while chunk := files.read_part(name, place, HASHED_CHUNK_BYTES):
            digest.update(chunk)
            place += len(chunk)
    except (OSError, ValueError):
        return b"unreadable"
    return digest.digest()
