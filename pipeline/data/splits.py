"""Which ids are trained on, held out, or labelled: pure functions of the store's labels and the seeds of the recipe."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from firstlight.pipeline.config.recipe import Dataset, FewLabels
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.tasks.downstream.task import Target


def _no_subsets(name: str) -> np.ndarray:
    raise UserError(f"{name!r} is unknown: this data set names no subsets")


@dataclass(frozen=True)
class Splits:
    """Sorted int64 ids. `val` is held out of the training split: settings are chosen on it. `test` is read once, at the end."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    labels: np.ndarray  # (n,) of every id of the store, -1 = unknown
    subset: Callable[[str], np.ndarray] = field(
        default=_no_subsets, compare=False
    )  # name -> sorted ids, as the data set names them

    def with_target(self, ids: np.ndarray, target: Target) -> np.ndarray:
        """Those of `ids` whose answer is known; annotations, where a store has them, it has of every image."""
        return ids[self.labels[ids] >= 0] if target == "label" else ids

    def labelled_subset(self, chosen: FewLabels, seed: int, target: Target = "label") -> np.ndarray:
        """The sorted training ids whose labels are learned from.

        Raises:
            UserError: a class has fewer images than are asked for; a subset that is not there, or has no training image with a label.
        """
        known = self.with_target(self.train, target)
        if chosen.labels_subset is not None:
            return self._named(chosen.labels_subset.replace("{seed}", str(seed)), known)
        if not chosen.labels_given:
            return np.asarray(known)
        rng = np.random.default_rng((seed, 0xFE3))
        drawn = [
            rng.choice(members, _count(chosen, members, self.labels), replace=False)
            for members in self._by_class(known)
        ]
        return np.sort(np.concatenate(drawn)) if drawn else known

    def held_back(self, chosen: FewLabels, seed: int) -> int:
        """How many images of the named subset are not among the training images, as they are held out or left out; 0 without a subset."""
        if chosen.labels_subset is None:
            return 0
        return len(self.subset(chosen.labels_subset.replace("{seed}", str(seed)))) - len(
            self.labelled_subset(chosen, seed)
        )

    def _named(self, name: str, known: np.ndarray) -> np.ndarray:
        try:
            ids = np.intersect1d(self.subset(name), known)
        except UserError as error:
            raise UserError(f"labels_subset: {error}") from None
        if len(ids) == 0:
            raise UserError(f"labels_subset: {name!r} has no training image with a label")
        return ids

    def _by_class(self, ids: np.ndarray) -> list[np.ndarray]:
        """`ids` apart by their labels, in the order of the labels."""
        order = ids[np.argsort(self.labels[ids], kind="stable")]
        return np.split(order, np.flatnonzero(np.diff(self.labels[order])) + 1) if len(ids) else []


def _count(chosen: FewLabels, members: np.ndarray, labels: np.ndarray) -> int:
    """How many of the images of one class are asked for."""
    if chosen.labels_fraction is not None:  # exact: 0.145 of 100 is 14.5 and rounds up, whatever 0.145 is in binary
        return max(1, int(Fraction(str(chosen.labels_fraction)) * len(members) + Fraction(1, 2)))
    count = chosen.labels_per_class
    assert count is not None
    if len(members) < count:
        raise UserError(
            f"labels_per_class: {count} is more than the {len(members)} training images of class {labels[members[0]]}"
        )
    return count


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
    return Splits(
        np.setdiff1d(np.concatenate(train), val, assume_unique=True), val, np.concatenate(test), labels, store.subset
    )


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


def _held_out(
    parts: list[np.ndarray], labels: np.ndarray, fraction: float, rngs: list[np.random.Generator]
) -> np.ndarray:
    """`fraction` of each class over all `parts`; no image changes sides when a part is added."""
    held, seen = [parts[0][:0]], Counter[int]()
    for ids, rng in zip(parts, rngs, strict=True):
        for label in np.unique(labels[ids]).tolist():
            members = rng.permutation(ids[labels[ids] == label])
            before, seen[label] = round(fraction * seen[label]), seen[label] + len(members)
            held.append(members[: round(fraction * seen[label]) - before])
    return np.sort(np.concatenate(held))


def spread(ids: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` of `ids`, in their order, from the first to the last, evenly."""
    return np.asarray(ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)])
