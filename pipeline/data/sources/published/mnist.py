"""IDX files, the layout of MNIST and of sets that adopted it.

The files are {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or gzipped.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firstlight.pipeline.data.sources.files import hash_facts
from firstlight.pipeline.data.sources.published.layout import check_labels, require_files
from firstlight.pipeline.data.sources.published.raw_pixels import (
    PIXEL_READ_ERRORS,
    PixelFile,
    RawPixelSource,
    count_rows,
    open_maybe_gzipped,
)
from firstlight.pipeline.data.sources.source import SourceOptions, get_local_facts, open_local_root
from firstlight.pipeline.errors import UserError, one_line

# The type code of unsigned bytes
IDX_BYTE_TYPE = 8
IDX_SPLITS = ("train", "t10k")


@dataclass(frozen=True)
class Idx(RawPixelSource):
    kind = "idx"


def open_idx(dataset: SourceOptions) -> Idx:
    """Lists grey images. The classes are the labels of the training split, by number.

    Raises:
        UserError: a file is missing, has another layout, or does not agree with the others.
    """
    root = open_local_root(dataset)
    (train, shape, known), (test, other, truth) = (
        _read_idx_split(root, split, dataset.max_pixels) for split in IDX_SPLITS
    )
    if shape != other:
        raise UserError(
            f"{root / test.name}: has images of {other[0]} x {other[1]} pixels; "
            f"valid: {shape[0]} x {shape[1]}, as in {train.name}"
        )
    classes = tuple(map(str, range(int(known.max()) + 1)))
    check_labels(_find_idx_file(root, "t10k-labels-idx1-ubyte"), truth, 0, len(classes) - 1)
    label_names = [_find_idx_file(root, f"{split}-labels-idx1-ubyte").name for split in IDX_SPLITS]
    rows = {"train": np.arange(train.count), "test": np.arange(train.count, train.count + test.count)}
    facts = hash_facts(get_local_facts(root, name) for name in [train.name, test.name, *label_names])
    return Idx(classes, facts, np.concatenate([known, truth]), rows, root, (train, test), shape, (0, 1))


def _find_idx_file(root: Path, name: str) -> Path:
    """Returns the plain file if it exists, else the gzipped one.

    Raises:
        UserError: both are missing.
    """
    zipped = root / f"{name}.gz"
    if not zipped.exists():
        require_files(root, name)
    return root / name if (root / name).exists() else zipped


def _read_idx_split(root: Path, split: str, max_pixels: int) -> tuple[PixelFile, tuple[int, ...], np.ndarray]:
    """Returns the file of images, their (H, W), and their labels (n,) int64.

    Raises:
        UserError: the headers do not agree, or the images have more than `max_pixels` pixels.
    """
    images = _find_idx_file(root, f"{split}-images-idx3-ubyte")
    labels = _find_idx_file(root, f"{split}-labels-idx1-ubyte")
    (count, *shape), (stored,) = _read_idx_header(images, 3), _read_idx_header(labels, 1)
    if count != stored or not count or not all(shape):
        raise UserError(
            f"{labels}: has {stored} labels for the {count} images of {shape[0]} x {shape[1]} pixels of {images.name}"
        )
    if shape[0] * shape[1] > max_pixels:
        raise UserError(
            f"{images}: has images of {shape[0]} x {shape[1]} pixels; "
            f"valid: at most {max_pixels} in all (dataset.max_pixels)"
        )
    file = PixelFile(images.name, count, start=16)
    if images.suffix != ".gz" and count_rows(images, 1) > file.start + count * shape[0] * shape[1]:
        raise UserError(
            f"{images}: is larger than the {count} images of {shape[0]} x {shape[1]} pixels that its header states"
        )
    return file, tuple(shape), _read_idx_labels(labels, count)


def _read_idx_labels(file: Path, count: int) -> np.ndarray:
    found = _read_idx_bytes(file, 8, count)
    if len(found) < count:
        raise UserError(f"{file}: holds {len(found)} of the {count} labels that its header states")
    return np.frombuffer(found, np.uint8).astype(np.int64)


def _read_idx_header(file: Path, dimensions: int) -> tuple[int, ...]:
    """Returns the size of each dimension.

    A header is two zero bytes, the type, the number of dimensions, and each size as 4 bytes, most significant first.

    Raises:
        UserError: the file has another header.
    """
    data = _read_idx_bytes(file, 0, 4 + 4 * dimensions)
    if len(data) < 4 + 4 * dimensions or data[:4] != bytes((0, 0, IDX_BYTE_TYPE, dimensions)):
        raise UserError(
            f"{file}: is no IDX file of bytes in {dimensions} dimensions: "
            f"it starts with {data[:4].hex(' ') or 'nothing'}"
        )
    return struct.unpack(f">{dimensions}I", data[4:])


def _read_idx_bytes(file: Path, start: int, count: int) -> bytes:
    try:
        with open_maybe_gzipped(file) as stream:
            stream.seek(start)
            return stream.read(count)
    except PIXEL_READ_ERRORS as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from None
