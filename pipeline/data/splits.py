"""Selects the ids that are trained on, held out or labelled, as functions of a store's labels and a recipe's seeds."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

import numpy as np

from firstlight.pipeline.data.annotations import Target
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError

# Constants of the seeds, so that the two draws are independent.
SPLIT_STREAM, LABEL_STREAM = 0x5911, 0xFE3
# The fraction that is held out where `dataset.val_fraction` is null.
DEFAULT_VAL_FRACTION = 0.1
# The splits that stages measure on, see `Recipe.measured_splits`.
MEASURED_SPLITS = frozenset(("val", "test"))


class SplitOptions(Protocol):
    """The options of a recipe's section `dataset` that splits read; `config.dataset.DatasetOptions` describes each."""

    @property
    def split_seed(self) -> int: ...

    @property
    def test_fraction(self) -> float | None: ...

    @property
    def val_fraction(self) -> float | None: ...

    @property
    def max_train(self) -> int | None: ...

    @property
    def max_test(self) -> int | None: ...


class LabelOptions(Protocol):
    """The options of a stage that choose the labelled images; `config.stages.LabelBudget` describes each."""

    @property
    def labels_per_class(self) -> int | None: ...

    @property
    def labels_fraction(self) -> float | None: ...

    @property
    def labels_subset(self) -> str | None: ...


def _refuse_subset(name: str) -> np.ndarray:
    raise UserError(f"{name!r} is unknown: this data set names no subsets")


@dataclass(frozen=True)
class Splits:
    """Sorted int64 ids of each split.

    `val` is held out of the training split, and settings are chosen on it. `test` is read once, at the end.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    # (n,) int64 of every id of the store; -1 is unknown.
    labels: np.ndarray
    # Name of a subset of the data set -> its sorted ids.
    subset: Callable[[str], np.ndarray] = field(default=_refuse_subset, compare=False)
    # The splits of the store that `train` is of, among them `test` if nothing is measured on the images drawn for it.
    stored_in: tuple[str, ...] = ("train",)

    @property
    def figure_ids(self) -> np.ndarray:
        """The images that figures show: held-out ones, or training images where none is held out."""
        return self.val if len(self.val) else self.train

    def describe_counts(self, is_own_val: bool) -> str:
        """Returns the numbers of images as text. `is_own_val`: the source itself has a held-out split."""
        drawn = "" if is_own_val else " of these"
        return f"{len(self.train):,} to train on, {len(self.val):,} held out{drawn}, {len(self.test):,} to test on"

    def with_target(self, ids: np.ndarray, target: Target) -> np.ndarray:
        """Returns those of `ids` whose target is known. A store with annotations has them for every image."""
        return ids[self.labels[ids] >= 0] if target == "label" else ids

    def labelled_subset(self, chosen: LabelOptions, seed: int, target: Target = "label") -> np.ndarray:
        """Returns the sorted training ids whose targets are used.

        Raises:
            UserError: a class has fewer images than are asked for; or the subset does not exist, or contains no
                training image with a label.
        """
        known = self.with_target(self.train, target)
        if chosen.labels_subset is not None:
            return self._intersect_subset(chosen.labels_subset.replace("{seed}", str(seed)), known)
        if chosen.labels_fraction is None and chosen.labels_per_class is None:
            return np.asarray(known)
        rng = np.random.default_rng((seed, LABEL_STREAM))
        drawn = [
            rng.choice(members, _count_wanted(chosen, members, self.labels), replace=False)
            for members in self._group_by_class(known)
        ]
        return np.sort(np.concatenate(drawn)) if drawn else known

    def count_withheld(self, chosen: LabelOptions, seed: int) -> int:
        """Returns how many images of the named subset are not training images, as they are held out or left out.

        Returns 0 if no subset is named.
        """
        if chosen.labels_subset is None:
            return 0
        subset = self.subset(chosen.labels_subset.replace("{seed}", str(seed)))
        return len(subset) - len(self.labelled_subset(chosen, seed))

    def _intersect_subset(self, name: str, known: np.ndarray) -> np.ndarray:
        try:
            ids = np.intersect1d(self.subset(name), known)
        except UserError as error:
            raise UserError(f"labels_subset: {error}") from None
        if len(ids) == 0:
            raise UserError(f"labels_subset: {name!r} has no training image with a label")
        return ids

    def _group_by_class(self, ids: np.ndarray) -> list[np.ndarray]:
        """Returns `ids` grouped by label, in the order of the labels."""
        order = ids[np.argsort(self.labels[ids], kind="stable")]
        return np.split(order, np.flatnonzero(np.diff(self.labels[order])) + 1) if len(ids) else []


def _count_wanted(chosen: LabelOptions, members: np.ndarray, labels: np.ndarray) -> int:
    """Returns how many of the images `members` of one class are to be labelled."""
    if chosen.labels_fraction is not None:
        # Exact decimal arithmetic: 0.145 of 100 is 14.5 and rounds up, whatever 0.145 is in binary.
        return max(1, int(Fraction(str(chosen.labels_fraction)) * len(members) + Fraction(1, 2)))
    count = chosen.labels_per_class
    assert count is not None
    if len(members) < count:
        raise UserError(
            f"labels_per_class: {count} is more than the {len(members)} training images of class {labels[members[0]]}"
        )
    return count


def draw_splits(store: Store, dataset: SplitOptions, measured: Collection[str] = MEASURED_SPLITS) -> Splits:
    """Draws the subset and the held-out part by `dataset.split_seed`, class by class if there are labels.

    The held-out part is the store's own, if its source has one. The images that an extension added are drawn
    separately: an image that was trained on is never held out later, and a held-out image is never trained on.

    `measured`: the splits that the recipe measures anything on. Where `dataset.val_fraction` or `test_fraction` is
    null, no image is kept apart for another one; the source's own test and held-out images are never trained on.

    Raises:
        UserError: `dataset.max_train` or `max_test` exceeds the number of images.
    """
    edges, labels = store.extension_edges, store.labels()
    rngs = [
        np.random.default_rng((dataset.split_seed, SPLIT_STREAM, *([k] if k else []))) for k in range(len(edges) - 1)
    ]
    stored_in = ("train", "test") if _trains_on_test(store, dataset, measured) else ("train",)
    images, test_images = np.sort(np.concatenate([store.ids(split) for split in stored_in])), store.ids("test")
    train = _draw_subset(_split_by_extension(images, edges), dataset.max_train, rngs, "dataset.max_train")
    max_test = dataset.max_test
    if "test" in stored_in:
        test_images, max_test = test_images[:0], None
    test = _draw_subset(_split_by_extension(test_images, edges), max_test, rngs, "dataset.max_test")
    own = store.ids("val")
    fraction = dataset.val_fraction
    if fraction is None:
        fraction = DEFAULT_VAL_FRACTION if "val" in measured else 0.0
    val = own if len(own) else _draw_held_out(train, labels, fraction, rngs)
    remaining = np.setdiff1d(np.concatenate(train), val, assume_unique=True)
    return Splits(remaining, val, np.concatenate(test), labels, store.subset, stored_in)


def _trains_on_test(store: Store, dataset: SplitOptions, measured: Collection[str]) -> bool:
    """Returns True if the test split was drawn from the training images, and nothing is measured on it."""
    return bool(store.source.get("draws_test")) and dataset.test_fraction is None and "test" not in measured


def _split_by_extension(ids: np.ndarray, edges: list[int]) -> list[np.ndarray]:
    """Splits sorted ids into those of the first store and those that each extension added."""
    return np.split(ids, np.searchsorted(ids, edges[1:-1]))


def _draw_subset(
    parts: list[np.ndarray], count: int | None, rngs: list[np.random.Generator], key: str
) -> list[np.ndarray]:
    """Draws `count` images, the oldest part first, so that the subset is the same after the store is extended."""
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


def _draw_held_out(
    parts: list[np.ndarray], labels: np.ndarray, fraction: float, rngs: list[np.random.Generator]
) -> np.ndarray:
    """Draws `fraction` of each class over all `parts`. No image changes sides when a part is added."""
    held_out, seen = [parts[0][:0]], Counter[int]()
    for ids, rng in zip(parts, rngs, strict=True):
        for label in np.unique(labels[ids]).tolist():
            members = rng.permutation(ids[labels[ids] == label])
            before, seen[label] = round(fraction * seen[label]), seen[label] + len(members)
            held_out.append(members[: round(fraction * seen[label]) - before])
    return np.sort(np.concatenate(held_out))


def select_evenly_spaced(ids: np.ndarray, count: int) -> np.ndarray:
    """Returns up to `count` of `ids`, in their order, evenly spaced from the first to the last."""
    return np.asarray(ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)])
