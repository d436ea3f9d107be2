"""Writes the subsets of the training split that a data set defines, e.g. folds of its labelled images.

Subsets are written as ids. An image that cannot be decoded has no id and is missing from its subsets; the number of
such images is recorded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.manifest import SUBSETS_FILE, file_sha256
from firstlight.pipeline.files import atomic_path

NO_IDS = np.empty(0, np.int64)
SUBSETS_SCHEMA = pa.schema([("subset", pa.string()), ("id", pa.int64())])


def write_subsets(
    folder: Path,
    subsets: Mapping[str, np.ndarray],
    train_rows: np.ndarray,
    ids: np.ndarray,
    earlier: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Writes the ids of each subset into SUBSETS_FILE.

    `subsets`: name -> rows in the source, in any order, of any split. `train_rows` (n,): rows of the training split,
    ascending; `ids` (n,): the id of each, -1 if it has none. `earlier`: name -> ids in the store that is extended.

    Returns {sha256 of the file, images: name -> number of ids, lost: name -> number of images without an id}, or {} if
    there are no subsets.
    """
    if not subsets and not earlier:
        return {}
    found: dict[str, np.ndarray] = {}
    lost: dict[str, int] = {}
    for name in sorted({*subsets, *earlier}):
        members = ids[np.isin(train_rows, subsets[name])] if name in subsets else NO_IDS
        found[name] = np.union1d(members[members >= 0], earlier.get(name, NO_IDS))
        lost[name] = int((members < 0).sum())
    with atomic_path(folder / SUBSETS_FILE) as temporary:
        names = [name for name, members in found.items() for _ in range(len(members))]
        pq.write_table(pa.table([names, np.concatenate(list(found.values()))], schema=SUBSETS_SCHEMA), temporary)
        digest = file_sha256(temporary)
    return {"sha256": digest, "images": {name: len(members) for name, members in found.items()}, "lost": lost}


def describe_lost_images(facts: Mapping[str, Any]) -> Sequence[str]:
    """Returns the subsets with lost images, e.g. `fold0 1`, `fold3 2`, from the result of `write_subsets`."""
    return [f"{name} {count:,}" for name, count in facts.get("lost", {}).items() if count]
