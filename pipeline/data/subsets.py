"""Named parts of the training split, as a set publishes them: folds of its labelled images, the training part of trainval.

Written by id, so that an image that cannot be decoded is missing from its subsets too: how many are, is counted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from firstlight.pipeline.data.store import SUBSETS, file_sha256
from firstlight.pipeline.files import atomic_path

NONE = np.empty(0, np.int64)
SCHEMA = pa.schema([("subset", pa.string()), ("id", pa.int64())])


def write_subsets(
    folder: Path,
    subsets: Mapping[str, np.ndarray],
    train: np.ndarray,
    ids: np.ndarray,
    before: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """List the ids of each subset in SUBSETS; {sha256 of it, images: subset -> how many, lost: subset -> how many have no id}; {} if there are none.

    `subsets`: places in the source, any of them; `train` (n,): places of the training split, ascending; `ids` (n,): the id of each, -1 = none;
    `before`: subset -> ids that it has in a store that is extended.
    """
    if not subsets and not before:
        return {}
    found: dict[str, np.ndarray] = {}
    lost: dict[str, int] = {}
    for name in sorted({*subsets, *before}):
        members = ids[np.isin(train, subsets[name])] if name in subsets else NONE
        found[name] = np.union1d(members[members >= 0], before.get(name, NONE))
        lost[name] = int((members < 0).sum())
    with atomic_path(folder / SUBSETS) as temporary:
        names = [name for name, members in found.items() for _ in range(len(members))]
        pq.write_table(pa.table([names, np.concatenate(list(found.values()))], schema=SCHEMA), temporary)
        digest = file_sha256(temporary)
    return {"sha256": digest, "images": {name: len(members) for name, members in found.items()}, "lost": lost}


def lost_images(facts: Mapping[str, Any]) -> Sequence[str]:
    """`fold0 1, fold3 2`: the subsets that lack images, of what `write_subsets` gave."""
    return [f"{name} {count:,}" for name, count in facts.get("lost", {}).items() if count]
