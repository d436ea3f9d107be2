"""The classes that occur in the images of a store."""

import numpy as np

from firstlight.pipeline.data.store import Store


def read_presence(store: Store, split: str) -> np.ndarray:
    """Returns (count, classes) int8 for the images of a split: 1 the class occurs, 0 it does not, -1 unknown."""
    rows = [one.present for one in store.read_annotations(store.ids(split))]
    known = [row for row in rows if row is not None]
    assert len(known) == len(rows), f"the store has {store.annotations}"
    return np.stack(known)
