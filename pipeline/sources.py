"""Where images come from: the digits of scikit-learn, a folder, Parquet files. The only file that knows how a source is laid out.

A source lists itself when it is opened (paths and labels, never pixels), and is then read in parts, each by a task of its own.
"""

import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.errors import UserError
from pipeline.store import DAMAGE

if TYPE_CHECKING:
    from pipeline.config import Dataset  # its methods and tasks bring torch, which no reading task needs

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
TRAIN_FOLDERS, TEST_FOLDERS = (b"train", b"training"), (b"test", b"val", b"validation")  # the first that there is
MAX_CLASSES = 1_000_000  # a label beyond is no class but something else, e.g. a number per image
READ_ROWS = 128  # rows of a Parquet file in memory at a time
CLASSES = "classes.txt"
Listed = tuple[bytes, int, int]  # relative path, bytes, modification time in ns
Value = tuple[bytes | None, str, str | None]  # a Parquet row's image, " path" if it states one, and the reason where there is no image


@dataclass(frozen=True)
class Part:
    """`count` images of one split from `start` on, in source order."""

    split: str
    start: int
    count: int


@dataclass(frozen=True)
class Record:
    """One image as found; `data` None: it could not be read, for `reason`."""

    path: str
    data: bytes | None
    label: int  # -1 = unknown
    reason: str | None = None


@dataclass(frozen=True)
class Source(ABC):
    """A listing of n images; pickles to little more than its paths and labels."""

    kind: ClassVar[str]
    classes: tuple[str, ...]  # () = unlabelled
    fingerprint: str  # changes when the files do
    labels: np.ndarray  # (n,) int64
    rows: dict[str, np.ndarray]  # split -> places in the listing, ascending

    @property
    def splits(self) -> dict[str, int]:
        """Images per split, readable or not."""
        return {split: len(rows) for split, rows in self.rows.items()}

    def parts(self, rows: int) -> list[Part]:
        """All images in parts of at most `rows`, train first, in source order."""
        return [Part(split, k, min(rows, n - k)) for split, n in self.splits.items() for k in range(0, n, rows)]

    def read(self, part: Part) -> Iterator[Record]:
        """The images of a part, in source order. Raises nothing over a file: what cannot be read is a record with its reason."""
        return self._records(self.rows[part.split][part.start : part.start + part.count])

    @abstractmethod
    def _records(self, places: np.ndarray) -> Iterator[Record]: ...


def open_source(dataset: "Dataset") -> Source:
    """List the images of `dataset`, without reading them. Where the source has no test split, `test_fraction` of each class becomes it.

    Raises:
        UserError: naming `dataset.root`, a column or a file that is missing, cannot be read, or does not hold what the config says.
    """
    opener: Callable[[Dataset], Source] = {"digits": _digits, "folder": _folder, "parquet": _parquet}[dataset.source]
    try:
        return opener(dataset)
    except OSError as error:
        raise UserError(f"dataset.root: {_text(os.fsencode(error.filename or str(dataset.root)))}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class Digits(Source):
    """1,797 digits of 8 x 8 pixels that come with scikit-learn, as PNG."""

    kind = "digits"

    def _records(self, places: np.ndarray) -> Iterator[Record]:
        images, labels = _sklearn_digits()
        for place in places.tolist():
            file = io.BytesIO()
            Image.fromarray(np.rint(images[place] * (255 / 16)).astype(np.uint8)).save(file, "PNG")
            yield Record(str(place), file.getvalue(), int(labels[place]))


def _sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # importing it takes seconds, and only this source needs it

    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


def _digits(dataset: "Dataset") -> Digits:
    images, labels = _sklearn_digits()
    fingerprint = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    rows = _with_test({"train": np.arange(len(labels))}, [str(i).encode() for i in range(len(labels))], labels, dataset)
    return Digits(tuple("0123456789"), fingerprint, labels, rows)


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
                yield Record(_text(path), self._load(path), label)
            except OSError as error:
                yield Record(_text(path), None, label, error.strerror or str(error))

    def _load(self, path: bytes) -> bytes:
        root = os.fsencode(self.root)
        file = os.path.join(root, path)
        if os.path.islink(file) and not os.path.join(os.path.realpath(file), b"").startswith(os.path.join(os.path.realpath(root), b"")):
            raise OSError("link leaves the root")
        with open(file, "rb") as opened:
            return opened.read()


def _folder(dataset: "Dataset") -> Folder:
    root = _root(dataset)
    tops = _split_folders(root)
    images, links = _walk(root, [top + b"/" for top in tops.values()] or [b""])
    if not images:
        refused = f" ({len(links)} links to folders are not followed, e.g. {_text(links[0][0])})" if links else ""
        raise UserError(f"dataset.root: no images ({' '.join(SUFFIXES)}) in {str(root)!r}{refused}")
    listed = sorted(images + links)
    paths = [path for path, _, _ in listed]
    members = {split: [k for k, path in enumerate(paths) if path.startswith(top + b"/")] for split, top in tops.items()}
    members = members if tops else {"train": list(range(len(paths)))}
    classes, labels = _folder_labels(paths, {path for path, _, _ in links}, members, tops)
    rows = {split: np.array(places, np.int64) for split, places in members.items() if places}
    if "train" not in rows:
        raise UserError(f"dataset.root: no images in {str(root / os.fsdecode(tops['train']))!r}")
    return Folder(classes, _fingerprint(listed), labels, _with_test(rows, paths, labels, dataset), root, pa.array(paths, pa.binary()))


def _split_folders(root: Path) -> dict[str, bytes]:
    """The sub-folders that are splits: {} where there is none for training, as then the whole root is."""
    found: dict[str, bytes] = {}
    for split, names in (("train", TRAIN_FOLDERS), ("test", TEST_FOLDERS)):
        there = [name for name in names if (root / os.fsdecode(name)).is_dir()]
        if there:
            found[split] = there[0]
    for name in found.values():
        if (root / os.fsdecode(name)).is_symlink():
            raise UserError(f"dataset.root: {str(root / os.fsdecode(name))!r} is a link; valid: a folder, or dataset.root = the folder behind it")
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
            elif entry.is_dir():
                links.append(_listed(path, entry))
            elif path.lower().endswith(tuple(s.encode() for s in SUFFIXES)) and (entry.is_file() or not os.path.exists(entry.path)):
                images.append(_listed(path, entry))  # a link to nothing is listed too, so that reading it says so
    return images, links


def _listed(path: bytes, entry: os.DirEntry[bytes]) -> Listed:
    try:
        facts = entry.stat()
    except OSError:  # a link to nothing
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
                raise UserError(f"dataset.root: {_text(paths[place])}: the training split has no class {_text(name)!r}")
            labels[place] = index[name]
    return tuple(map(_text, names)), labels


@dataclass(frozen=True)
class Parquet(Source):
    """Rows of Parquet files, e.g. of a Hugging Face data set."""

    kind = "parquet"
    root: Path
    files: tuple[tuple[str, int], ...]  # name, rows
    column: tuple[str, ...]  # of the image's bytes: (column,) or (column, field)

    def _records(self, places: np.ndarray) -> Iterator[Record]:
        first = 0
        for k, rows in _by_part([rows for _, rows in self.files], places):
            name, labels = self.files[k][0], self.labels[places[first : first + len(rows)]].tolist()
            for row, label, (data, known_as, reason) in zip(rows.tolist(), labels, self._images(name, rows), strict=True):
                yield Record(f"{name}#{row}{known_as}", data, label, reason)
            first += len(rows)

    def _images(self, name: str, rows: np.ndarray) -> Iterator[Value]:
        """Of ascending rows of one file. Damage costs the rows of its row group from there on."""
        try:
            file = pq.ParquetFile(self.root / name, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
        except DAMAGE as error:
            yield from [_unread(name, error)] * len(rows)
            return
        with file:
            sizes = [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]
            for group, within in _by_part(sizes, rows):
                yield from _or_reason(name, len(within), self._values(file, group, within))

    def _values(self, file: pq.ParquetFile, group: int, rows: np.ndarray) -> Iterator[Value]:
        """Of ascending rows of one row group, of which only a few are in memory at a time."""
        start = 0
        for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=[self.column[0]], use_threads=False):
            wanted = rows[(rows >= start) & (rows < start + len(batch))] - start
            for value in batch.column(0).take(pa.array(wanted)).to_pylist():
                data, path = (value.get(self.column[-1]), value.get("path")) if isinstance(value, dict) else (value, None)
                yield data, f" {path}" if isinstance(path, str) else "", None if data is not None else "the row has no image (null)"
            start += len(batch)


def _by_part(sizes: Sequence[int], places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Ascending places in parts laid end to end -> (part, places within it) of each part that holds some."""
    ends = np.cumsum(sizes)
    parts = np.searchsorted(ends, places, side="right")
    for part in np.unique(parts).tolist():
        yield part, places[parts == part] - (ends[part] - sizes[part])


def _or_reason(name: str, count: int, values: Iterator[Value]) -> Iterator[Value]:
    """`count` values: where reading fails, the reason takes the place of the rest."""
    done = 0
    try:
        for value in values:
            yield value
            done += 1
    except DAMAGE as error:
        yield from [_unread(name, error)] * (count - done)


def _unread(name: str, error: BaseException) -> Value:
    return None, "", f"{name} cannot be read: {' '.join(str(error).split())}"


def _parquet(dataset: "Dataset") -> Parquet:
    root = _root(dataset)
    names = _parquet_names(root)
    schemas, counts = zip(*(_parquet_facts(root / name) for split in names.values() for name in split), strict=True)
    files = tuple(zip([name for split in names.values() for name in split], counts, strict=True))
    columns = {_image_column(dataset.image_column, schema, root / name) for (name, _), schema in zip(files, schemas, strict=True)}
    if len(columns) > 1:
        raise UserError(f"dataset.image_column: {dataset.image_column!r} is not of one type in all files of {str(root)!r}")
    classes, labels = _parquet_labels(dataset, root, files, schemas)
    first = sum(rows for name, rows in files if name in names["train"])
    if first == 0:
        raise UserError(f"dataset.root: no rows in {', '.join(names['train'])} of {str(root)!r}")
    rows = {"train": np.arange(first), "test": np.arange(first, len(labels))}
    keys = [f"{name}#{row}".encode() for name, count in files for row in range(count)]
    rows = _with_test({split: places for split, places in rows.items() if len(places)}, keys, labels, dataset)
    facts = [_file_facts(root, name) for name in [name for name, _ in files] + [CLASSES] if (root / name).exists()]
    return Parquet(classes, _fingerprint(sorted(facts)), labels, rows, root, files, columns.pop())


def _parquet_names(root: Path) -> dict[str, list[str]]:
    names = sorted(file.name for file in root.glob("*.parquet") if not file.name.startswith("."))
    if not names:
        raise UserError(f"dataset.root: no *.parquet files in {str(root)!r}")
    train, test, val = ([name for name in names if name.startswith(start)] for start in ("train", "test", "val"))
    return {"train": train, "test": test or val} if train else {"train": names, "test": []}


def _parquet_facts(file: Path) -> tuple[pa.Schema, int]:
    try:
        with pq.ParquetFile(file) as opened:
            return opened.schema_arrow, opened.metadata.num_rows
    except DAMAGE as error:
        raise UserError(f"{file}: cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _image_column(column: str, schema: pa.Schema, file: Path) -> tuple[str, ...]:
    """Where the bytes are: a column of bytes, or a field (`bytes`, or the one after the dot) of a column of structs."""
    top, _, field = (column, "", "") if column in schema.names else column.partition(".")
    kind = schema.field(top).type if top in schema.names else None
    if kind is not None and pa.types.is_struct(kind):
        field = field or "bytes"
        kind = kind.field(field).type if kind.get_field_index(field) >= 0 else None
    elif field:
        kind = None
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"dataset.image_column: {column!r} is no column of bytes, or of structs with a field 'bytes', in {file}; columns: {_columns(schema)}"
        )
    return (top, field) if field else (top,)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _parquet_labels(
    dataset: "Dataset", root: Path, files: Sequence[tuple[str, int]], schemas: Sequence[pa.Schema]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes by name, and labels (n,) int64 with -1 for null."""
    column = dataset.label_column
    if column is None:
        return (), np.full(sum(rows for _, rows in files), -1, np.int64)
    kinds: dict[bool, Path] = {}  # label is a text -> a file where it is so
    for (name, _), schema in zip(files, schemas, strict=True):
        kinds.setdefault(_is_text(column, schema, root / name), root / name)
    if len(kinds) > 1:
        raise UserError(f"dataset.label_column: {column!r} has mixed types: text in {kinds[True]}, integers in {kinds[False]}")
    values = [value for name, _ in files for value in _read_labels(root / name, column)]
    known = _class_names(root, schemas[0], column)
    if True in kinds:
        classes = known or tuple(sorted({str(value) for value in values if value is not None}))
        index = {name: k for k, name in enumerate(classes)}
        numbers = [-1 if value is None else index.get(str(value), -2) for value in values]
    else:
        numbers = [-1 if value is None else int(value) for value in values]
        classes = known or tuple(map(str, range(min(max(numbers, default=-1) + 1, MAX_CLASSES))))
    wrong = next((row for row, number in enumerate(numbers) if not -1 <= number < len(classes)), None)
    if wrong is not None:
        raise UserError(_wrong_label(files, wrong, values[wrong], classes, root))
    return classes, np.array(numbers, np.int64)


def _wrong_label(files: Sequence[tuple[str, int]], place: int, value: object, classes: tuple[str, ...], root: Path) -> str:
    ends = np.cumsum([rows for _, rows in files])
    name, rows = files[(k := int(np.searchsorted(ends, place, side="right")))]
    valid = f"0 to {len(classes) - 1}" if isinstance(value, int) else ", ".join(classes[:20])
    listed = f"{root / CLASSES} has {len(classes)} classes" if (root / CLASSES).exists() else f"there are {len(classes)} classes"
    return f"{root / name}: row {place - ends[k] + rows}: label {value!r} is out of range: {listed}; valid: {valid}, or -1 (unknown)"


def _is_text(column: str, schema: pa.Schema, file: Path) -> bool:
    kind = schema.field(column).type if column in schema.names else None
    kind = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    text = kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))
    if kind is None or not (text or pa.types.is_integer(kind)):
        raise UserError(f"dataset.label_column: {column!r} is no column of integers or text in {file}; columns: {_columns(schema)}; null: no labels")
    return text


def _read_labels(file: Path, column: str) -> list[int | str | None]:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            values: list[int | str | None] = opened.read(columns=[column], use_threads=False).column(column).to_pylist()
            return values
    except DAMAGE as error:
        raise UserError(f"{file}: the column {column!r} cannot be read: {' '.join(str(error).split())}") from None


def _class_names(root: Path, schema: pa.Schema, column: str) -> tuple[str, ...]:
    """From classes.txt, one a line, else from what `datasets` wrote into the schema, else ()."""
    file = root / CLASSES
    if not file.exists():
        return _hugging_face_names(schema, column)
    try:
        names = tuple(line.strip() for line in file.read_text("utf-8").strip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    twice = {name for name in names if names.count(name) > 1}
    if twice or "" in names or not names:
        raise UserError(f"{file}: must list every class once, one a line; found twice or empty: {sorted(twice) or 'an empty line'}")
    return names


def _hugging_face_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(map(str, feature["names"]))
    except (KeyError, TypeError, ValueError):  # not written by `datasets`, or not a class label
        return ()


def _root(dataset: "Dataset") -> Path:
    if dataset.root is None:
        raise UserError(f"dataset.root: is missing; dataset.source {dataset.source!r} takes the folder of the images")
    root = Path(os.path.abspath(dataset.root.expanduser()))
    if not root.exists():
        raise UserError(f"dataset.root: {str(root)!r} does not exist")
    if not root.is_dir():
        raise UserError(f"dataset.root: {str(root)!r} is a file; valid: the folder that holds the images")
    return root


def _file_facts(root: Path, name: str) -> Listed:
    facts = (root / name).stat()
    return os.fsencode(name), facts.st_size, facts.st_mtime_ns


def _fingerprint(listed: Iterable[Listed]) -> str:
    found = hashlib.sha256()
    for path, size, changed in listed:
        found.update(b"%s\0%d\0%d\0" % (path, size, changed))
    return found.hexdigest()


def _text(path: bytes) -> str:
    """Valid UTF-8, whatever the bytes."""
    return os.fsdecode(path).encode("utf-8", "backslashreplace").decode()


def _with_test(rows: dict[str, np.ndarray], keys: list[bytes], labels: np.ndarray, dataset: "Dataset") -> dict[str, np.ndarray]:
    """Where there is no test split, the images of each class with the lowest hashes of (split_seed, key) become it.

    A hash per image, and not a draw over all of them: images that are added later move few of the others. Each class keeps one for training.
    """
    if "test" in rows:
        return rows
    places = rows["train"]
    ranks = np.array([_rank(dataset.split_seed, keys[place]) for place in places.tolist()], np.uint64)
    _, kinds, counts = np.unique(labels[places], return_inverse=True, return_counts=True)
    order = np.lexsort((ranks, kinds))
    position = np.empty(len(places), np.int64)
    position[order] = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    quota = np.minimum(np.floor(counts * dataset.test_fraction + 0.5).astype(np.int64), counts - 1)
    test = position < quota[kinds]
    return {"train": places[~test], "test": places[test]} if test.any() else rows


def _rank(seed: int, key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(b"%d\0%s" % (seed, key)).digest()[:8], "big")
