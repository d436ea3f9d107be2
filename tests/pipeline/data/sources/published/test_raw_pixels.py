"""Rows of raw pixels in binary files."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.sources import SourcePart
from firstlight.pipeline.data.sources.published.raw_pixels import PixelFile, RawPixelSource, count_rows
from firstlight.pipeline.errors import UserError
from tests.support.layouts import noise


class Rows(RawPixelSource):
    kind = "rows"


def write_rows(root: Path, images: np.ndarray) -> Rows:
    """Two files of a header of three bytes, and rows of one byte and planes; the second is gzipped."""
    rows = [b"h" * 3 + b"".join(b"x" + image.tobytes() for image in part) for part in (images[:2], images[2:])]
    (root / "a.bin").write_bytes(rows[0])
    (root / "b.gz").write_bytes(gzip.compress(rows[1]))
    files = (PixelFile("a.bin", 2, 3, 1), PixelFile("b.gz", len(images) - 2, 3, 1))
    listing = {"train": np.arange(len(images))}
    return Rows((), "", np.arange(len(images)), listing, root, files, images.shape[1:], (1, 2, 0))


def test_planes_become_png_across_files(tmp_path: Path) -> None:
    images = noise(0, 5, 3, 4, 6)
    records = list(write_rows(tmp_path, images).read(SourcePart("train", 1, 3)))
    assert [(record.path, record.label) for record in records] == [("a.bin#1", 1), ("b.gz#0", 2), ("b.gz#1", 3)]
    decoded = [np.asarray(Image.open(io.BytesIO(record.data or b""))) for record in records]
    np.testing.assert_array_equal(np.stack(decoded), images[1:4].transpose(0, 2, 3, 1))


def test_damage_is_reason_of_remaining_rows(tmp_path: Path) -> None:
    source = write_rows(tmp_path, noise(0, 5, 3, 4, 6))
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-1])
    (tmp_path / "b.gz").write_bytes(b"no gzip")
    reasons = [record.reason for record in source.read(SourcePart("train", 0, 5))]
    assert reasons[:2] == [None, "a.bin ends before row 1 does"]
    assert all(str(reason).startswith("b.gz cannot be read: ") for reason in reasons[2:])


def test_cut_row_counts(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 10)
    assert (count_rows(tmp_path / "x", 5), count_rows(tmp_path / "x", 4)) == (2, 3)
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(UserError, match=r"x: is empty \(0 bytes\); valid: rows of 4 bytes"):
        count_rows(tmp_path / "x", 4)
