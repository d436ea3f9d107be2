"""Fixtures of the tests of `prepare`."""

import pytest

from firstlight.pipeline.data import shards
from firstlight.pipeline.data.prepare import prepare as module


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 images a shard, 4 a row group."""
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 10)
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 4)
