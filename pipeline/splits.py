"""Which ids are trained on, held out, or labelled: pure functions of the store's labels and the seeds of the recipe."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pipeline.config import Dataset
from pipeline.errors import UserError
from pipeline.store import Store


@dataclass(frozen=True)
class Splits:
    """Sorted int64 ids. `val` is held out of the training split: settings are chosen on it. `test` is read once, at the end."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    labels: np.ndarray  # (n,) of every id of the store, -1 = unknown

    def few(self, per_class: int | None, seed: int) -> np.ndarray:
        """`per_class` training ids of every class, drawn by `seed`; None: all that have a label.

        Raises:
            UserError: a class has fewer.
        """
        rng = np.random.default_rng((seed, 0xFE3))
        known = self.train[self.labels[self.train] >= 0]
        if per_class is None:
            return np.asarray(known)
        chosen = []
        for label in np.unique(self.labels[known]):
            members = known[self.labels[known] == label]
            if len(members) < per_class:
                raise UserError(f"labels_per_class: {per_class} is more than the {len(members)} training images of class {label}")
            chosen.append(rng.choice(members, per_class, replace=False))
        return np.sort(np.concatenate(chosen))


def split(store: Store, dataset: Dataset) -> Splits:
    """Draw the subset and the held-out part by `dataset.split_seed`, class by class where there are labels.

    What an extension added is drawn for itself: an image that was trained on is never held out later, nor the other way round.

    Raises:
        UserError: `dataset.max_train` or `max_test` is more than there is.
    """
    edges, labels = store.edges, store.labels()
    rngs = [np.random.default_rng((dataset.split_seed, 0x5911, *([k] if k else []))) for k in range(len(edges) - 1)]
    train = _subset(_by_time(store.ids("train"), edges), dataset.max_train, rngs, "dataset.max_train")
    test = _subset(_by_time(store.ids("test"), edges), dataset.max_test, rngs, "dataset.max_test")
    val = _held_out(train, labels, dataset.val_fraction, rngs)
    return Splits(np.setdiff1d(np.concatenate(train), val, assume_unique=True), val, np.concatenate(test), labels)


def _by_time(ids: np.ndarray, edges: list[int]) -> list[np.ndarray]:
    """Sorted ids -> those of the first store, and those that each extension added."""
    return np.split(ids, np.searchsorted(ids, edges[1:-1]))


def _subset(parts: list[np.ndarray], count: int | None, rngs: list[np.random.Generator], key: str) -> list[np.ndarray]:
    """The oldest images come first, so that a stated subset stays what it is when the store is extended."""
    total = sum(map(len, parts))
    if count is None:
        return parts
    if count > total:
        raise UserError(f"{key}: {count} is more than the {total} images there are")
    chosen = []
    for ids, rng in zip(parts, rngs, strict=True):
        chosen.append(np.sort(rng.choice(ids, min(count, len(ids)), replace=False)))
        count -= len(chosen[-1])
    return chosen


def _held_out(parts: list[np.ndarray], labels: np.ndarray, fraction: float, rngs: list[np.random.Generator]) -> np.ndarray:
    """`fraction` of each class over all `parts`; no image changes sides when a part is added."""
    held, seen = [parts[0][:0]], Counter[int]()
    for ids, rng in zip(parts, rngs, strict=True):
        for label in np.unique(labels[ids]).tolist():
            members = rng.permutation(ids[labels[ids] == label])
            before, seen[label] = round(fraction * seen[label]), seen[label] + len(members)
            held.append(members[: round(fraction * seen[label]) - before])
    return np.sort(np.concatenate(held))
