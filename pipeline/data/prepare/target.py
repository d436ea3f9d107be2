"""Finds the folder of the store that `prepare` returns, and the earlier store that it extends."""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from firstlight.pipeline.data.manifest import MANIFEST_FILE, STORE_FORMAT, Shard, canonical_json
from firstlight.pipeline.data.prepare.extend import blame_extends, is_store, open_earlier_store
from firstlight.pipeline.data.prepare.extend_checks import check_same_kind
from firstlight.pipeline.data.sources import Source, SourceOptions
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError

# Options of the data set that change the content of its store.
DECISIVE_FIELDS = (
    "source",
    "image_column",
    "path_column",
    "label_column",
    "split_column",
    "test_fraction",
    "split_seed",
    "max_pixels",
)


class PrepareOptions(SourceOptions, Protocol):
    """The options of a recipe's section `dataset` that `prepare` reads."""

    @property
    def extends(self) -> str | None: ...

    @property
    def max_bad_fraction(self) -> float: ...


@dataclass(frozen=True)
class StoreTarget:
    """The folder of the store to be written, and the store that it extends, if any."""

    folder: Path
    old: Store | None = None

    @property
    def old_shards(self) -> tuple[Shard, ...]:
        return self.old.shards if self.old else ()

    def check(self, source: Source, progress: Callable[[int, int], None]) -> None:
        """Checks everything about the earlier store that can be checked before Ray starts.

        Raises:
            UserError: the earlier store is damaged, or `source` cannot extend it.
        """
        if self.old:
            check_same_kind(self.old, source)
            with blame_extends(self.old.path):
                self.old.verify(progress)


def find_target(dataset: PrepareOptions, source: Source, stores: Path) -> StoreTarget:
    """Returns the folder below `stores` of the store of `dataset`, and the store that it extends.

    If the earlier store was deleted after the extended one was finished, the extended one is found by its manifest.

    Raises:
        UserError: `dataset.extends` is not a whole store.
    """
    if dataset.extends is None:
        return StoreTarget(_name_folder(dataset, source, stores))
    if not is_store(dataset.extends):
        for manifest in sorted(stores.glob(f"{dataset.name}-*/{MANIFEST_FILE}")):
            with contextlib.suppress(UserError):
                for earlier in Store.open(manifest.parent).extends[-1:]:
                    folder = _name_folder(dataset, source, stores, extends=earlier.hash)
                    if (earlier.name, folder) == (Path(dataset.extends).name, manifest.parent):
                        return StoreTarget(folder)
    old = open_earlier_store(dataset.extends)
    return StoreTarget(_name_folder(dataset, source, stores, extends=old.hash), old)


def _name_folder(dataset: PrepareOptions, source: Source, stores: Path, **extends: str) -> Path:
    fields = {**{name: getattr(dataset, name) for name in DECISIVE_FIELDS}, **extends}
    content = canonical_json({**fields, "fingerprint": source.fingerprint, "format": STORE_FORMAT})
    return stores / f"{dataset.name}-{hashlib.sha256(content).hexdigest()[:12]}"
