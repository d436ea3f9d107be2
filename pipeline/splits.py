"""Which ids are trained on, held out, or labelled: pure functions of the store's labels and the seeds of the recipe."""

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

    Raises:
        UserError: `dataset.max_train` or `max_test` is more than there is.
    """
    rng = np.random.default_rng((dataset.split_seed, 0x5911))
    labels = np.concatenate([store.labels(name) for name in sorted(store.splits, key=lambda n: store.splits[n].first_id)])
    train = _subset(_ids(store, "train"), dataset.max_train, rng, "dataset.max_train")
    test = _subset(_ids(store, "test"), dataset.max_test, rng, "dataset.max_test")
    val = _held_out(train, labels, dataset.val_fraction, rng)
    return Splits(np.setdiff1d(train, val, assume_unique=True), val, test, labels)


def _ids(store: Store, name: str) -> np.ndarray:
    if name not in store.splits:
        return np.empty(0, np.int64)
    part = store.splits[name]
    return np.arange(part.first_id, part.first_id + part.count)


def _subset(ids: np.ndarray, count: int | None, rng: np.random.Generator, key: str) -> np.ndarray:
    if count is None:
        return ids
    if count > len(ids):
        raise UserError(f"{key}: {count} is more than the {len(ids)} images there are")
    return np.sort(rng.choice(ids, count, replace=False))


def _held_out(ids: np.ndarray, labels: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    parts = []
    for label in np.unique(labels[ids]):
        members = rng.permutation(ids[labels[ids] == label])
        parts.append(members[: round(fraction * len(members))])
    return np.sort(np.concatenate(parts)) if parts else ids[:0]
