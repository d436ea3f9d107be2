"""The identity of a source looks at names, times, the way it is read, and bytes."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data.sources import Source, identity, open_source
from firstlight.pipeline.data.sources.files import LocalFiles
from firstlight.pipeline.data.sources.identity import hash_contents, hash_samples
from tests.support.image_sources import dataset_options, open_folder_set, write_csv, write_image_table
from tests.support.webdataset_shards import write_shard


def write_bitmaps(root: Path, value: int, count: int = 3, size: int = 16) -> Path:
    """Writes images of one size in bytes, whatever their pixels, with the same times."""
    for k in range(count):
        file = root / "ab"[k % 2] / f"{k}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size, 3), value + k, np.uint8)).save(file)
        os.utime(file, (1, 1))
    return root


def open_bitmaps(root: Path, **fields: object) -> Source:
    return open_folder_set(root, **fields)


def open_bitmap_list(root: Path, **fields: object) -> Source:
    file = write_csv(root, "path,label\n" + "".join(f"{'ab'[k % 2]}/{k}.bmp,{k % 2}\n" for k in range(3)))
    os.utime(file, (1, 1))
    return open_source(dataset_options(source="list", list=file, **fields))


def open_bitmap_table(root: Path, **fields: object) -> Source:
    images = [(root / "ab"[k % 2] / f"{k}.bmp").read_bytes() for k in range(3)]
    write_image_table(root / "table" / "x.parquet", images, [0, 1, 0])
    os.utime(root / "table" / "x.parquet", (1, 1))
    return open_source(dataset_options(source="parquet", root=root / "table", **fields))


def open_bitmap_tar(root: Path, **fields: object) -> Source:
    members = [(f"{k}.bmp", (root / "ab"[k % 2] / f"{k}.bmp").read_bytes()) for k in range(3)]
    os.utime(write_shard(root / "tars" / "x.tar", *members), (1, 1))
    return open_source(dataset_options(source="webdataset", root=root / "tars", **fields))


OPENERS = [open_bitmaps, open_bitmap_list, open_bitmap_table, open_bitmap_tar]


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("mode", ["sample", "content"])
def test_other_pixels_are_another_source(tmp_path: Path, opener: Callable[..., Source], mode: str) -> None:
    first = opener(write_bitmaps(tmp_path / "v", 10), fingerprint=mode)
    assert opener(tmp_path / "v", fingerprint=mode).fingerprint == first.fingerprint
    # The same names, sizes and times
    shutil.rmtree(tmp_path / "v")
    second = opener(write_bitmaps(tmp_path / "v", 90), fingerprint=mode)
    assert second.fingerprint != first.fingerprint
    assert (first.identity, second.identity) == (mode, mode)


@pytest.mark.parametrize("opener", OPENERS)
def test_copy_is_same_source_by_content_only(tmp_path: Path, opener: Callable[..., Source]) -> None:
    write_bitmaps(tmp_path / "one", 10)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copy)
    found = {
        mode: [opener(tmp_path / name, fingerprint=mode) for name in ("one", "two")] for mode in ("sample", "content")
    }
    assert len({source.fingerprint for source in found["content"]}) == 1
    if opener is open_bitmaps:
        assert len({source.fingerprint for source in found["sample"]}) == 2


def test_pixel_changed_in_place_is_noticed(tmp_path: Path) -> None:
    root = write_bitmaps(tmp_path, 10)
    before = open_folder_set(root).fingerprint
    with open(root / "a" / "0.bmp", "r+b") as file:
        file.seek(300)
        file.write(b"\xff")
    os.utime(root / "a" / "0.bmp", (1, 1))
    assert open_folder_set(root).fingerprint != before


def test_content_changed_between_two_openings_is_noticed(tmp_path: Path) -> None:
    root = write_bitmaps(tmp_path, 10)
    before = open_folder_set(root, fingerprint="content").fingerprint
    (root / "a" / "0.bmp").write_bytes(b"\0" + (root / "a" / "0.bmp").read_bytes()[1:])
    os.utime(root / "a" / "0.bmp", (1, 1))
    assert open_folder_set(root, fingerprint="content").fingerprint != before


def test_large_sets_are_sampled_and_not_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_bitmaps(tmp_path, 10, count=40, size=64)
    names = [f"{'ab'[k % 2]}/{k}.bmp".encode() for k in range(40)]
    read: list[int] = []
    real = LocalFiles.read_blocks

    def count(files: LocalFiles, name: bytes, offsets: Iterable[int], size: int) -> bytes:
        data = real(files, name, offsets, size)
        read.append(len(data))
        return data

    monkeypatch.setattr(LocalFiles, "read_blocks", count)
    whole = hash_samples(LocalFiles(root), names)
    assert sum(read) == sum((root / name.decode()).stat().st_size for name in names)
    monkeypatch.setattr(identity, "MAX_WHOLE_BYTES", 1000)
    monkeypatch.setattr(identity, "MAX_SAMPLED_FILES", 10)
    monkeypatch.setattr(identity, "MAX_ALL_BLOCKS", 10)
    monkeypatch.setattr(identity, "SAMPLED_BLOCK_BYTES", 100)
    read.clear()
    sampled = hash_samples(LocalFiles(root), names)
    assert (sum(read), sampled != whole) == (10 * identity.MIN_BLOCKS * 100, True)
    write_bitmaps(tmp_path, 50, count=40, size=64)
    assert hash_samples(LocalFiles(root), names) != sampled


def test_unreadable_files_count_as_such(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    names = [b"pipe.jpg", b"none.jpg", b"zero\0.jpg"]
    assert hash_samples(LocalFiles(tmp_path), names) == hash_samples(LocalFiles(tmp_path), names)
    assert hash_contents(LocalFiles(tmp_path), tuple(names), "") != hash_contents(
        LocalFiles(tmp_path), (b"none.jpg",), ""
    )
    assert len(hash_samples(LocalFiles(tmp_path), [])) == 64


def test_reading_is_part_of_the_identity(tmp_path: Path) -> None:
    root = write_bitmaps(tmp_path / "Cat", 10).parent
    shutil.copytree(root / "Cat" / "a", root / "cat")
    seen = {
        open_folder_set(root, **fields).fingerprint
        for fields in ({}, {"label_case": "lower"}, {"test_fraction": 0.5}, {"splits": {"train": "cat"}})
    }
    assert len(seen) == 4


def test_remote_versions_and_contents() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/idx/a.jpg", b"one")
    first = {mode: open_folder_set("memory://idx", fingerprint=mode).fingerprint for mode in ("sample", "content")}
    fs.pipe("/idx/a.jpg", b"two")
    assert all(open_folder_set("memory://idx", fingerprint=mode).fingerprint != first[mode] for mode in first)


def test_source_without_files_keeps_its_fingerprint() -> None:
    source = open_source(dataset_options(source="digits"))
    assert (source.identity, source.earlier_fingerprint) == ("", "")
    assert source.fingerprint == open_source(dataset_options(source="digits", fingerprint="content")).fingerprint
