"""A preparation of a store that ends after its k-th file, and the files it leaves."""

import os
from pathlib import Path

import pytest

from firstlight.pipeline.config.dataset import DatasetOptions
from firstlight.pipeline.data.store import Store
from tests.support.grey_images import local


def contents(store: Store) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.path.iterdir()}


class Stop(BaseException):
    """Ends a preparation as a kill would, within the process."""


def stop(data: DatasetOptions, out: Path, k: int, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Runs `prepare` and raises `Stop` when its k-th file has its final name."""
    replace, count = os.replace, 0

    def stopping(*paths: str) -> None:
        nonlocal count
        count += 1
        replace(*paths)
        if count == k:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        return local(data, out)
