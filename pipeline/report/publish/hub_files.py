"""The files of an export as a hub gets them: checked against their manifest, with the model card as README.md."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from firstlight.pipeline.data.manifest import file_sha256
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.records import Count, DamagedRecord, HexDigest, RecordShape, parse_record
from firstlight.pipeline.report.cards.card_parts import CARD_FILE
from firstlight.pipeline.train.folder_manifest import FOLDER_MANIFEST
from firstlight.tasks.nn.export_formats import EXPORT_FORMATS
from firstlight.tasks.nn.timm_folder import TIMM_CONFIG_FILE

README_FILE = "README.md"
# The folder whose files stand at the top as well, where timm and others look for them.
TOP_FORMAT = "timm"
TOP_FILES = (TIMM_CONFIG_FILE, "model.safetensors")
MAX_CARD_BYTES, MAX_MANIFEST_BYTES = 10_000_000, 10_000_000
VALID_FOLDER = "the folder `export` of a stage export"


class _PushedFileShape(RecordShape):
    """The size and the sum of a file."""

    bytes: Count
    sha256: HexDigest


ExportedName = Annotated[str, Field(pattern=rf"^({'|'.join(EXPORT_FORMATS)})/[A-Za-z0-9][A-Za-z0-9._-]*\z")]


class _ManifestShape(RecordShape):
    """The manifest of an export, by the names of its files below the folder."""

    files: Annotated[dict[ExportedName, _PushedFileShape], Field(min_length=1)]


MANIFEST_SHAPE = TypeAdapter(_ManifestShape)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, and where its content is."""

    name: str
    path: Path
    size: int


def list_hub_files(folder: Path) -> list[HubFile]:
    """Returns the files of a hub's repository for the export in a folder, README.md first.

    They are the model card, the files of the formats in their folders, and the manifest; the files that timm loads
    stand at the top as well. Other files of the folder are left out.

    Raises:
        UserError: the folder is no export, has no card, or a file differs from the manifest or is a link.
    """
    manifest = _find_file(folder, FOLDER_MANIFEST, MAX_MANIFEST_BYTES)
    try:
        files = parse_record(manifest.read_bytes(), MANIFEST_SHAPE, str(manifest))["files"]
    except DamagedRecord as error:
        raise UserError(f"{folder}: is no export: {error}; valid: {VALID_FOLDER}") from None
    card = _find_file(folder, CARD_FILE, MAX_CARD_BYTES)
    if not card.read_bytes().startswith(b"---\n"):
        raise UserError(f"{card}: is no model card: it has no front matter; run the recipe again")
    found = [HubFile(README_FILE, card, card.stat().st_size)]
    for name, entry in files.items():
        file = _find_file(folder, name, entry["bytes"])
        if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
            raise UserError(f"{file}: is not the file that was exported: its size or sha256 differs from the manifest")
        found.append(HubFile(name, file, entry["bytes"]))
    found.append(HubFile(FOLDER_MANIFEST, manifest, manifest.stat().st_size))
    return [*found, *_list_top_files(found)]


def _find_file(folder: Path, name: str, limit: int) -> Path:
    """Returns a file of the folder.

    Raises:
        UserError: it is missing, too large, or a link, or lies behind one.
    """
    file = folder / name
    if file.is_symlink() or (file.parent != folder and file.parent.is_symlink()):
        raise UserError(f"{file}: is a link, and only files of the folder itself are pushed")
    if not file.is_file():
        what = "has no model card" if name == CARD_FILE else f"is no export: it has no {name}"
        raise UserError(f"{folder}: {what}; valid: {VALID_FOLDER}")
    if file.stat().st_size > limit:
        raise UserError(f"{file}: has {file.stat().st_size:,} bytes, more than the {limit:,} that it should have")
    return file


def _list_top_files(found: list[HubFile]) -> list[HubFile]:
    """Returns timm's files under the names that they have at the top; none if timm does not load its folder."""
    by_name = {file.name: file for file in found}
    there = [by_name.get(f"{TOP_FORMAT}/{name}") for name in TOP_FILES]
    if None in there:
        return []
    return [HubFile(name, file.path, file.size) for name, file in zip(TOP_FILES, there, strict=True) if file]


def find_stale_files(names: list[str], files: list[HubFile]) -> list[str]:
    """Returns the files of an earlier push that a repository has, and the new export has not.

    `names`: the files of the repository. Files that no export has written stay.
    """
    if FOLDER_MANIFEST not in names:
        return []
    new = {file.name for file in files}
    ours = [name for name in names if name in TOP_FILES or name.partition("/")[0] in EXPORT_FORMATS]
    return [name for name in ours if name not in new]
