"""Buckets in the memory of this process, with a working folder, for tests that need no server."""

from pathlib import Path

import fsspec
import pytest

from firstlight.pipeline.data.mirror import places
from firstlight.pipeline.data.mirror.mirror import Mirror


def make_mirror(cache: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    """Returns the mirror of memory://<name>/runs, which is empty, with a working folder below `cache`."""
    fs = fsspec.filesystem("memory")
    if fs.exists(f"/{name}"):
        fs.rm(f"/{name}", recursive=True)
    return open_elsewhere(cache, name, monkeypatch)


def open_elsewhere(cache: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    """Returns the mirror of the same bucket on a machine whose working folders are below `cache`."""
    monkeypatch.setenv(places.CACHE_VARIABLE, str(cache))
    mirror = places.find_mirror(places.place_storage(f"memory://{name}/runs"))
    assert mirror is not None
    mirror.root.mkdir(parents=True, exist_ok=True)
    return mirror


def write_files(folder: Path, **files: str) -> Path:
    """Writes files into a folder; `__` in a name stands for a dot. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder
