"""The manifest of a store, which is written last, and the names and limits of the store's files."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field, TypeAdapter

from firstlight.pipeline.data.annotations import ANNOTATION_COLUMNS
from firstlight.pipeline.data.channels.pixel_format import MAX_CHANNELS
from firstlight.pipeline.records import RECORD_SUM_KEY, Count, FiniteNumber, HexDigest, RecordShape, check_shape

STORE_FORMAT = 3
# Number of rows that one random access reads and verifies.
ROWS_PER_GROUP = 128
# Limit of the encoded images of one row group; a single larger image is a group by itself.
MAX_GROUP_BYTES = 16_000_000
MANIFEST_FILE = "manifest.json"
# Columns path, split, reason: images that cannot be decoded have no id.
QUARANTINE_FILE = "quarantine.parquet"
# Columns id, first_id, split, path: images with the same bytes as an earlier one.
DUPLICATES_FILE = "duplicates.parquet"
# Columns subset, id: named parts of the training split. The file exists only if the source defines some.
SUBSETS_FILE = "subsets.parquet"
# The keys of the entry `source` that hold lines for people.
SOURCE_TEXTS = ("reading", "notes")
# Columns of every shard; columns of annotations follow. digest: the first 8 bytes of the sha256 of the image as it is
# in the source, big-endian.
SHARD_SCHEMA = pa.schema(
    [("id", pa.int64()), ("image", pa.binary()), ("label", pa.int64()), ("path", pa.string()), ("digest", pa.uint64())]
)
SHARD_NAME = re.compile(r"[a-z]+-\d{5,}\.parquet\Z", re.ASCII)
# Exceptions of pyarrow on a damaged file: from its own to those of a length that exceeds the memory.
DAMAGE_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Shard:
    """A file with the images `first_id` .. `first_id + count - 1` in order; `row_groups` are their numbers of rows."""

    file: str
    split: str
    first_id: int
    count: int
    row_groups: tuple[int, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class EarlierStore:
    """A store that another one extends: the images 0 .. `ids` - 1 of that one. `name` is that of its folder."""

    name: str
    hash: str
    ids: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a store."""

    # () if the images have no labels.
    classes: tuple[str, ...]
    # Number of images per split; the shards say which.
    splits: dict[str, int]
    # The shards in id order. Shards of different splits alternate if the store was extended.
    shards: tuple[Shard, ...]
    # Oldest first; () if the store was written at once.
    extends: tuple[EarlierStore, ...]
    # Number of images that cannot be decoded.
    quarantined: int
    hash: str
    # kind, root, fingerprint; and, of `Source`, identity, reading, notes and draws_test.
    source: dict[str, Any]
    # Result of `SourceStatistics.dump`; key duplicates: result of `write_duplicates`.
    images: dict[str, Any]
    # Columns of `ANNOTATION_COLUMNS` that the shards have, sorted.
    annotations: tuple[str, ...] = ()
    # Result of `write_subsets`.
    subsets: dict[str, Any] = field(default_factory=dict)


class _ShardShape(RecordShape):
    """An entry of `shards`."""

    file: str
    split: str
    first_id: Count
    count: Count
    row_groups: Annotated[list[Count], Field(min_length=1)]
    bytes: Count
    sha256: HexDigest


class _EarlierShape(RecordShape):
    """An entry of `extends`."""

    name: str
    hash: str
    ids: Count


class _SourceShape(RecordShape):
    """The entry `source`."""

    kind: str
    root: str | None
    fingerprint: str
    # The note of an earlier version about files that it did not read
    aside: str = ""
    identity: str = ""
    reading: list[str] = Field([])
    notes: list[str] = Field([])
    draws_test: bool = False


class _LevelShape(RecordShape):
    """A value of `levels`: what is black and white in images of more than 8 bits of one kind."""

    black: FiniteNumber
    white: FiniteNumber
    lowest: FiniteNumber
    highest: FiniteNumber
    images: Count
    dark: Count
    flat: Count


class _ColoursShape(RecordShape):
    """Sums of the colours of the training images, see `ColourSums`. Each is at most 2**32 times `images`."""

    images: Count
    means: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_CHANNELS)]
    squares: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_CHANNELS)]


class _ShrunkShape(RecordShape):
    """The images whose shorter side had more than `side` pixels in the source."""

    side: Annotated[int, Field(ge=1)]
    quality: Count
    rules: Count
    images: Count = 0
    source_bytes: Count = 0
    stored_bytes: Count = 0


class _PixelsShape(RecordShape):
    """The format of the pixels, where the data set states its channels."""

    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
    bits: Literal[8, 16]
    # The lowest and the highest level of each channel.
    low: list[Count]
    high: list[Count]


class _ImagesShape(RecordShape):
    """The entry `images`: statistics of the images."""

    width: Annotated[list[Count], Field(min_length=2, max_length=2)] = Field([0, 0])
    height: Annotated[list[Count], Field(min_length=2, max_length=2)] = Field([0, 0])
    bytes: Count = 0
    sizes: list[Annotated[list[int], Field(min_length=3, max_length=3)]] = Field([])
    modes: dict[str, Count] = Field({})
    formats: dict[str, Count] = Field({})
    labels: dict[str, dict[str, Count]] = Field({})
    annotated: dict[str, dict[str, dict[str, Count]]] = Field({})
    duplicates: dict[str, Count] = Field({})
    readings: dict[str, Count] = Field({})
    refused: dict[str, Count] = Field({})
    levels: dict[str, _LevelShape] = Field({})
    lost_classes: dict[str, list[Count]] = Field({})
    colours: _ColoursShape | None = None
    shrunk: _ShrunkShape | None = None
    pixels: _PixelsShape | None = None


class _StoreShape(RecordShape):
    """The manifest of a store."""

    classes: list[str]
    splits: dict[str, Count]
    shards: list[_ShardShape]
    extends: list[_EarlierShape]
    quarantined: Count
    hash: HexDigest
    source: _SourceShape
    images: _ImagesShape = _ImagesShape()
    annotations: list[str] = Field([])
    subsets: dict[str, Any] = Field({})


STORE_SHAPE = TypeAdapter(_StoreShape)


def parse_manifest(raw: dict[str, Any]) -> Manifest:
    """Returns the manifest that was read as JSON.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is not a manifest of `STORE_FORMAT`.
    """
    if raw["format"] != STORE_FORMAT:
        raise ValueError(f"format {raw['format']!r}")
    check_shape(raw, STORE_SHAPE, MANIFEST_FILE)
    shards = tuple(Shard(**{**entry, "row_groups": tuple(entry["row_groups"])}) for entry in raw["shards"])
    splits = {str(name): int(count) for name, count in raw["splits"].items()}
    extends = tuple(EarlierStore(str(entry["name"]), str(entry["hash"]), int(entry["ids"])) for entry in raw["extends"])
    _check_shard_order(shards, splits, extends)
    annotations = tuple(raw.get("annotations", ()))
    if list(annotations) != sorted(ANNOTATION_COLUMNS.keys() & set(annotations)):
        raise ValueError(f"annotations {annotations!r}")
    return Manifest(
        classes=tuple(map(str, raw["classes"])),
        splits=splits,
        shards=shards,
        extends=extends,
        quarantined=int(raw["quarantined"]),
        hash=str(raw["hash"]),
        source=dict(raw["source"]),
        images=dict(raw.get("images", {})),
        annotations=annotations,
        subsets=dict(raw.get("subsets", {})),
    )


def _check_shard_order(shards: tuple[Shard, ...], splits: dict[str, int], extends: tuple[EarlierStore, ...]) -> None:
    """Raises ValueError unless the ids are 0..n-1 without gaps and every file name is a plain name of a shard."""
    expected, found = 0, dict.fromkeys(splits, 0)
    for shard in shards:
        is_whole = min(shard.row_groups) >= 1 and shard.count == sum(shard.row_groups)
        if not SHARD_NAME.match(shard.file) or shard.first_id != expected or not is_whole:
            raise ValueError(f"shard {shard.file!r} does not follow the one before it")
        expected, found[shard.split] = expected + shard.count, found[shard.split] + shard.count
    if found != splits:
        raise ValueError("the splits and the shards differ")
    boundaries = [0, *(earlier.ids for earlier in extends), expected]
    if boundaries != sorted(boundaries):
        raise ValueError("the extended stores have more images than there are")


def shard_schema(annotations: Sequence[str]) -> pa.Schema:
    """Returns the schema of the shards of a store with these columns of `ANNOTATION_COLUMNS`."""
    return pa.schema([*SHARD_SCHEMA, *((name, ANNOTATION_COLUMNS[name]) for name in annotations)])


def canonical_json(value: Any) -> bytes:
    """Returns `value` as JSON with sorted keys and no spaces, so that equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def manifest_hash(raw: dict[str, Any]) -> str:
    """Returns the sha256 of a manifest, excluding its own hash and sum, the location of the source, and its texts.

    The same images have the same hash wherever they are, and in whatever words a version says how they were read.
    """
    return _hash_without(raw, "root", *SOURCE_TEXTS)


def is_hash_of(raw: dict[str, Any]) -> bool:
    """Returns True if a manifest has its own hash; earlier versions included the texts."""
    return str(raw["hash"]) in (manifest_hash(raw), _hash_without(raw, "root"))


def _hash_without(raw: dict[str, Any], *left_out: str) -> str:
    source = {key: value for key, value in raw["source"].items() if key not in left_out}
    facts = {key: value for key, value in raw.items() if key not in ("hash", RECORD_SUM_KEY)}
    return hashlib.sha256(canonical_json({**facts, "source": source})).hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def advise_repair(path: Path) -> str:
    """Returns what to do about a damaged store, as the end of a `UserError`."""
    return f"delete the folder {path} and run again: prepare writes it from scratch"
