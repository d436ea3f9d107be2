"""Fixtures of the tests of stores: one to read, and a copy of it to damage."""

import shutil
from pathlib import Path

import pytest

from firstlight.pipeline.data import store as store_module
from firstlight.pipeline.data.row_groups import RowGroupCache
from firstlight.pipeline.data.store import Store
from tests.support.text_store import write_text_store


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "image_cache", RowGroupCache(10**6))


@pytest.fixture(scope="session")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_text_store(tmp_path_factory.mktemp("store") / "whole")


@pytest.fixture
def store_copy(text_store: Store, tmp_path: Path) -> Store:
    shutil.copytree(text_store.path, tmp_path / "copy")
    return Store.open(tmp_path / "copy")
