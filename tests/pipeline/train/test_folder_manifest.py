"""Folders with a manifest: any changed bit of any file, the manifest too, is detected and named."""

import json
from pathlib import Path

import pytest

from firstlight.pipeline.train.folder_manifest import (
    FOLDER_MANIFEST,
    DamagedFileError,
    read_verified,
    write_file,
    write_manifest,
)


def make_folder(folder: Path) -> None:
    write_manifest(folder, write_file(folder, "a.bin", b"some bytes"), step=15, names=["x"])


def test_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    make_folder(tmp_path)
    manifest, files = read_verified(tmp_path)
    assert (manifest["step"], manifest["names"]) == (15, ["x"])
    assert files == {"a.bin": b"some bytes"}


@pytest.mark.fault(18, "every bit of a manifest")
def test_every_flipped_bit_of_the_manifest_changes_nothing_or_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path)
    path, whole, refused = tmp_path / FOLDER_MANIFEST, read_verified(tmp_path), 0
    data = path.read_bytes()
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(changed))
        told = str(tmp_path)
        try:
            assert read_verified(tmp_path) == whole
        except DamagedFileError as error:
            told, refused = str(error), refused + 1
        assert str(tmp_path) in told
    assert refused > 7 * len(data), "spaces between keys and values do not matter"


def test_manifest_without_a_sum_is_read(tmp_path: Path) -> None:
    make_folder(tmp_path)
    path = tmp_path / FOLDER_MANIFEST
    earlier = {key: value for key, value in json.loads(path.read_text()).items() if key != "sum"}
    path.write_text(json.dumps(earlier))
    assert read_verified(tmp_path)[0] == earlier


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=rf"^{tmp_path}/manifest.json: cannot be read: No such file"):
        read_verified(tmp_path)
