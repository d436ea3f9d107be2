"""The registry of sources: it opens by name, and every OSError becomes one line that names the file."""

from pathlib import Path

import pytest

from firstlight.pipeline.data.sources import SOURCES, open_source
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import dataset_options, write_named_files


def test_every_source_opens_its_own_kind(tmp_path: Path) -> None:
    assert open_source(dataset_options(source="digits")).kind == "digits"
    root = write_named_files(tmp_path, "a.jpg")
    assert open_source(dataset_options(source="folder", root=root)).kind == "folder"
    assert {"digits", "folder", "list", "parquet", "webdataset", "cifar10", "idx", "imagenet", "voc"} <= set(SOURCES)


def test_os_error_becomes_one_line_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dataset: object) -> None:
        raise OSError(5, "Input/output error", str(tmp_path / "x.jpg"))

    def fail_without_name(dataset: object) -> None:
        raise OSError("lost\nconnection")

    monkeypatch.setitem(SOURCES, "folder", fail)
    with pytest.raises(UserError, match=rf"^dataset\.root: {tmp_path}/x\.jpg: cannot be read: Input/output error$"):
        open_source(dataset_options(source="folder", root=tmp_path))
    monkeypatch.setitem(SOURCES, "folder", fail_without_name)
    with pytest.raises(UserError, match=rf"^dataset\.root: {tmp_path}: cannot be read: lost connection$"):
        open_source(dataset_options(source="folder", root=tmp_path))
