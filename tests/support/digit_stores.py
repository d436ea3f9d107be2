"""Copies the stores of the digits that this process has written: to write one is a quarter of a small recipe's work."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.prepare import prepare as module
from firstlight.pipeline.data.store import Store


def copy_written_stores(kept: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes `prepare` write each store of the digits once, into `kept` too, and copy it from there after that.

    A store that Ray writes, that extends another, or whose folder exists, is written.
    """
    write = module._write_store

    def write_or_copy(
        dataset: Any, source: Any, target: Any, run_jobs: Any, progress: Callable[[int, int], None]
    ) -> Store:
        on_ray, *_ = run_jobs.args
        if dataset.source != "digits" or on_ray or target.old or target.folder.exists():
            return write(dataset, source, target, run_jobs, progress)
        # The name of the folder has a hash of all that decides what the store holds, except how it is divided.
        copy = kept / f"{target.folder.name}-{module.IMAGES_PER_SHARD}"
        if not copy.exists():
            store = write(dataset, source, target, run_jobs, progress)
            shutil.copytree(target.folder, copy)
            return store
        shutil.copytree(copy, target.folder)
        total = sum(source.splits.values())
        progress(total, total)
        return Store.open(target.folder)

    patch.setattr(module, "_write_store", write_or_copy)
