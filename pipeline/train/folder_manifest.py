"""Folders of files that count once their manifest exists, with the size and sha256 of each file and a sum of itself."""

import hashlib
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from firstlight.pipeline.files import write_flushed
from firstlight.pipeline.records import Count, DamagedRecord, HexDigest, RecordShape, parse_record, write_sealed_json

FOLDER_MANIFEST = "manifest.json"


class _FileEntry(RecordShape):
    """The size and the sum of a file."""

    bytes: Count
    sha256: HexDigest


class _FolderManifest(RecordShape):
    """The manifest of any folder that `write_manifest` makes."""

    files: dict[str, _FileEntry]


FOLDER_SHAPE = TypeAdapter(_FolderManifest)


class DamagedFileError(ValueError):
    """A file differs from its manifest or violates its format. The text names the file."""


def write_manifest(folder: Path, files: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Writes the manifest of a folder, which makes the folder count."""
    write_sealed_json(folder / FOLDER_MANIFEST, {**facts, "files": files})


def write_file(folder: Path, name: str, data: bytes) -> dict[str, dict[str, Any]]:
    """Writes one file of a folder that gets a manifest later. Returns its entry of the manifest."""
    write_flushed(folder / name, data)
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


def read_verified(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the manifest of a folder, and the bytes of its files by name.

    Raises:
        DamagedFileError: a file is missing, cut short or changed; names the first one.
    """
    manifest = _read_manifest(folder / FOLDER_MANIFEST)
    return manifest, {name: _read_listed(folder / name, entry) for name, entry in manifest["files"].items()}


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = parse_record(file.read_bytes(), FOLDER_SHAPE, str(file))
    except OSError as error:
        raise DamagedFileError(f"{file}: cannot be read: {error.strerror}") from None
    except DamagedRecord as error:
        raise DamagedFileError(str(error)) from None
    for name in manifest["files"]:
        if Path(name).name != name:
            raise DamagedFileError(f"{file}: is damaged: it names {name!r}, which is no file of its folder")
    return manifest


def _read_listed(path: Path, entry: dict[str, Any]) -> bytes:
    """Returns the content of a file that a manifest lists."""
    if not path.is_file():
        raise DamagedFileError(f"{path}: is missing")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) != entry["bytes"]:
        raise DamagedFileError(f"{path}: has {len(data)} bytes, its manifest says {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DamagedFileError(f"{path}: its sha256 is not the one in its manifest")
    return data
