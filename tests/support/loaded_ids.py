"""The ids of the images that a loader loads."""

from typing import Any

import pytest

from firstlight.pipeline.data.loader import Loader, StoredImages


def record_loaded_ids(monkeypatch: pytest.MonkeyPatch, kind: type[Loader | StoredImages]) -> list[int]:
    """Returns a list that gets the ids of every call of `kind.load` during a test."""
    seen: list[int] = []
    load = kind.load

    def record(self: Any, ids: Any, *others: Any) -> Any:
        seen.extend(ids.tolist())
        return load(self, ids, *others)

    monkeypatch.setattr(kind, "load", record)
    return seen
