"""IDX files, the layout of MNIST and of those that took it over: {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or gzipped."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from firstlight.pipeline.data.sources.files import fingerprint
from firstlight.pipeline.data.sources.published.layout import check_labels, need
from firstlight.pipeline.data.sources.published.raw_pixels import UNREADABLE, PixelFile, Raw, opened, rows_in
from firstlight.pipeline.data.sources.source import file_facts, local_root
from firstlight.pipeline.errors import UserError

if TYPE_CHECKING:
    from firstlight.pipeline.config.recipe import (
        Dataset,  # its methods and tasks bring torch, which no reading task needs
    )

BYTES = 8  # the type code of unsigned bytes


@dataclass(frozen=True)
class Idx(Raw):
    kind = "idx"


def open_idx(dataset: "Dataset") -> Idx:
    """Grey images; the classes are the labels of the training split, by number."""
    root = local_root(dataset)
    (train, shape, known), (test, other, truth) = (
        _split(root, split, dataset.max_pixels) for split in ("train", "t10k")
    )
    if shape != other:
        raise UserError(
            f"{root / test.name}: has images of {other[0]} x {other[1]} pixels; valid: {shape[0]} x {shape[1]}, as in {train.name}"
        )
    classes = tuple(map(str, range(int(known.max()) + 1)))
    check_labels(_file(root, "t10k-labels-idx1-ubyte"), truth, 0, len(classes) - 1)
    names = [train.name, test.name, *(_file(root, f"{split}-labels-idx1-ubyte").name for split in ("train", "t10k"))]
    rows = {"train": np.arange(train.count), "test": np.arange(train.count, train.count + test.count)}
    facts = fingerprint(file_facts(root, name) for name in names)
    return Idx(classes, facts, np.concatenate([known, truth]), rows, root, (train, test), shape, (0, 1))


def _file(root: Path, name: str) -> Path:
    zipped = root / f"{name}.gz"
    if not zipped.exists():
        need(root, name)
    return root / name if (root / name).exists() else zipped


def _split(root: Path, split: str, max_pixels: int) -> tuple[PixelFile, tuple[int, ...], np.ndarray]:
    """The file of images, their (H, W), and their labels (n,) int64."""
    images, labels = _file(root, f"{split}-images-idx3-ubyte"), _file(root, f"{split}-labels-idx1-ubyte")
    (count, *shape), (stored,) = _header(images, 3), _header(labels, 1)
    if count != stored or not count or not all(shape):
        raise UserError(
            f"{labels}: has {stored} labels for the {count} images of {shape[0]} x {shape[1]} pixels of {images.name}"
        )
    if shape[0] * shape[1] > max_pixels:
        raise UserError(
            f"{images}: has images of {shape[0]} x {shape[1]} pixels; valid: at most {max_pixels} in all (dataset.max_pixels)"
        )
    file = PixelFile(images.name, count, start=16)
    if images.suffix != ".gz" and rows_in(images, 1) > file.start + count * shape[0] * shape[1]:
        raise UserError(
            f"{images}: is larger than the {count} images of {shape[0]} x {shape[1]} pixels that its header tells of"
        )
    return file, tuple(shape), _labels(labels, count)


def _labels(file: Path, count: int) -> np.ndarray:
    found = _read(file, 8, count)
    if len(found) < count:
        raise UserError(f"{file}: holds {len(found)} of the {count} labels that its header tells of")
    return np.frombuffer(found, np.uint8).astype(np.int64)


def _header(file: Path, dimensions: int) -> tuple[int, ...]:
    """Two zero bytes, the type, the number of dimensions, and the size of each as 4 bytes, highest first."""
    data = _read(file, 0, 4 + 4 * dimensions)
    if len(data) < 4 + 4 * dimensions or data[:4] != bytes((0, 0, BYTES, dimensions)):
        raise UserError(
            f"{file}: is no IDX file of bytes in {dimensions} dimensions: it starts with {data[:4].hex(' ') or 'nothing'}"
        )
    return struct.unpack(f">{dimensions}I", data[4:])


def _read(file: Path, start: int, count: int) -> bytes:
    try:
        with opened(file) as stream:
            stream.seek(start)
            return stream.read(count)
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
