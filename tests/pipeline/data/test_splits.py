from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.pipeline.config.stages import LabelBudget
from firstlight.pipeline.data.splits import Splits, draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from tests.support import recipes
from tests.support.grey_images import dataset, local, png

WHOLE: dict[str, Any] = {"dataset__max_train": None, "dataset__max_test": None}


def splits(store: Store, **changes: Any) -> Splits:
    return draw_splits(store, recipes.recipe(Path("unused"), **changes).dataset)


def per_class(count: int | None) -> LabelBudget:
    return LabelBudget(labels_per_class=count)


def counts(found: Splits, ids: np.ndarray) -> np.ndarray:
    return np.bincount(found.labels[ids], minlength=10)


@pytest.mark.parametrize("fraction", [0.1, 0.33, 0.5])
def test_train_and_val_partition_the_training_split(digits: Store, fraction: float) -> None:
    found = splits(digits, **WHOLE, dataset__val_fraction=fraction)
    assert sorted([*found.train, *found.val]) == digits.ids("train").tolist()
    assert found.test.tolist() == digits.ids("test").tolist()
    assert np.array_equal(found.train, np.sort(found.train))
    assert np.array_equal(found.val, np.sort(found.val))
    both = counts(found, np.concatenate((found.train, found.val)))
    assert (abs(counts(found, found.val) - fraction * both) <= 1).all()
    assert len(found.val) == pytest.approx(fraction * digits.splits["train"], abs=5)


def test_labels_are_indexed_by_id(digits: Store) -> None:
    found = splits(digits)
    ids = np.concatenate((found.train[:5], found.val[:5], found.test[:5]))
    assert np.array_equal(found.labels[ids], digits.read(ids)[1])
    assert len(found.labels) == sum(digits.splits.values())


def test_splits_depend_only_on_split_seed(digits: Store) -> None:
    first, again, other = splits(digits), splits(digits, seeds=[5], name="other"), splits(digits, dataset__split_seed=1)
    for name in ("train", "val", "test"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    whole, other = splits(digits, **WHOLE), splits(digits, **WHOLE, dataset__split_seed=1)
    assert not np.array_equal(whole.val, other.val), "the held-out part is not drawn"


def test_subset_has_requested_size(digits: Store) -> None:
    found = splits(digits, dataset__max_train=200, dataset__max_test=33)
    assert len(found.train) + len(found.val) == 200
    assert len(found.test) == 33
    assert len({*found.train, *found.val, *found.test}) == 233
    whole = splits(digits, **WHOLE)
    assert {*found.train, *found.val} <= {*whole.train, *whole.val}


@pytest.mark.parametrize("part", ["train", "test"])
def test_subset_larger_than_split_is_refused(digits: Store, part: str) -> None:
    count = digits.splits[part]
    assert splits(digits, **{f"dataset__max_{part}": count})
    with pytest.raises(UserError, match=rf"dataset\.max_{part}: {count + 1} is more than the {count} images"):
        splits(digits, **{f"dataset__max_{part}": count + 1})


@pytest.mark.parametrize("count", [1, 4, 8])
def test_labelled_subset_has_requested_images_per_class(digits: Store, count: int) -> None:
    found = splits(digits, **WHOLE)
    few = found.labelled_subset(per_class(count), 0)
    assert counts(found, few).tolist() == [count] * 10
    assert len(np.unique(few)) == len(few)
    assert set(few) <= set(found.train)
    assert np.array_equal(few, np.sort(few))


def test_labelled_subset_is_a_function_of_seed(digits: Store) -> None:
    found = splits(digits, **WHOLE)
    assert np.array_equal(found.labelled_subset(per_class(4), 0), found.labelled_subset(per_class(4), 0))
    assert len({tuple(found.labelled_subset(per_class(4), seed)) for seed in range(5)}) == 5


def test_more_labels_than_smallest_class_are_refused(digits: Store) -> None:
    found = splits(digits)
    sizes = counts(found, found.train)
    assert len(found.labelled_subset(per_class(int(sizes.min())), 0)) == 10 * sizes.min()
    label = int(np.flatnonzero(sizes < sizes.min() + 1)[0])
    with pytest.raises(
        UserError,
        match=rf"labels_per_class: {sizes.min() + 1} is more than the {sizes.min()} training images of class {label}",
    ):
        found.labelled_subset(per_class(int(sizes.min()) + 1), 0)


@pytest.mark.fault(34, "images without a label")
def test_images_without_label_are_never_in_labelled_subset() -> None:
    labels = np.array([0, 1, -1, 0, 1, -1, 1, 0])
    found = Splits(np.arange(7), np.arange(0), np.array([7]), labels)
    assert found.labelled_subset(per_class(None), 0).tolist() == [0, 1, 3, 4, 6]
    assert found.labelled_subset(per_class(2), 0).tolist() in ([0, 1, 3, 4], [0, 1, 3, 6], [0, 3, 4, 6])


def test_no_budget_selects_all_training_images(digits: Store) -> None:
    found = splits(digits)
    assert np.array_equal(found.labelled_subset(per_class(None), 3), found.train)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=200),
    st.sampled_from([0.01, 0.1, 0.145, 0.29, 0.5, 0.999, 1.0]),
    st.integers(0, 3),
)
def test_fraction_of_each_class_rounds_to_nearest_image(labels: list[int], fraction: float, seed: int) -> None:
    train = np.arange(0, 2 * len(labels), 2)
    found = Splits(train, train[:0], train[:0], np.repeat(np.array(labels), 2))
    few = found.labelled_subset(LabelBudget(labels_fraction=fraction), seed)
    assert set(few) <= set(train)
    assert np.array_equal(few, np.unique(few))
    for label in set(labels):
        there, drawn = labels.count(label), int((found.labels[few] == label).sum())
        assert drawn >= 1
        assert drawn == 1 or -0.5 < drawn - fraction * there <= 0.5 + 1e-9
    assert np.array_equal(few, found.labelled_subset(LabelBudget(labels_fraction=fraction), seed))


def test_halves_round_up_whatever_the_binary_value() -> None:
    train = np.arange(100)
    found = Splits(train, train[:0], train[:0], np.zeros(100, np.int64))
    assert 0.145 * 100 < 14.5, "in binary"
    for fraction, count in ((0.145, 15), (0.144, 14), (0.005, 1), (0.015, 2), (0.29, 29), (0.0001, 1), (1.0, 100)):
        assert len(found.labelled_subset(LabelBudget(labels_fraction=fraction), 0)) == count


FOLDS = {"fold0": [0, 3, 4, 8], "fold1": [1, 2, 9], "empty": [2, 8, 9]}


def folded() -> Splits:
    """Ten ids; 2 has no label, 8 and 9 are held out."""

    def subset(name: str) -> np.ndarray:
        if name not in FOLDS:
            raise UserError(f"{name!r} is unknown; valid: {', '.join(FOLDS)}")
        return np.array(FOLDS[name])

    return Splits(np.arange(8), np.array([8, 9]), np.arange(0), np.array([0, 1, -1, 0, 1, 0, 1, 0, 1, 1]), subset)


def test_named_subset_excludes_held_out_images() -> None:
    assert folded().labelled_subset(LabelBudget(labels_subset="fold0"), 7).tolist() == [0, 3, 4]
    assert folded().count_withheld(LabelBudget(labels_subset="fold0"), 7) == 1
    assert folded().count_withheld(LabelBudget(labels_fraction=0.5), 7) == 0


def test_seed_selects_the_fold() -> None:
    chosen = LabelBudget(labels_subset="fold{seed}")
    assert [folded().labelled_subset(chosen, seed).tolist() for seed in (0, 1)] == [[0, 3, 4], [1]]
    with pytest.raises(UserError, match=r"^labels_subset: 'fold2' is unknown; valid: fold0, fold1, empty$"):
        folded().labelled_subset(chosen, 2)


def test_subset_without_training_label_is_refused() -> None:
    with pytest.raises(UserError, match=r"^labels_subset: 'empty' has no training image with a label$"):
        folded().labelled_subset(LabelBudget(labels_subset="empty"), 0)


def test_data_set_without_subsets_refuses_a_subset() -> None:
    train = np.arange(4)
    with pytest.raises(UserError, match=r"^labels_subset: 'fold0' is unknown: this data set names no subsets$"):
        Splits(train, train[:0], train[:0], np.zeros(4, np.int64)).labelled_subset(
            LabelBudget(labels_subset="fold0"), 0
        )


def store_of(root: Path, *parts: str, **fields: Any) -> tuple[Store, Any]:
    for part in parts:
        for k in range(12):
            file = root / "in" / part / "ab"[k % 2] / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(k))
    data = dataset(root=root / "in", **{"test_fraction": None, **fields})
    return local(data, root / "out"), data


def test_own_held_out_split_takes_the_place_of_a_drawn_one(tmp_path: Path) -> None:
    store, data = store_of(tmp_path, "train", "valid", "test", val_fraction=0.5)
    found = draw_splits(store, data)
    assert [ids.tolist() for ids in (found.train, found.val, found.test)] == [
        store.ids(split).tolist() for split in ("train", "val", "test")
    ]
    assert len(found.val) == 12
    # Held-out and test images of the source are never trained on
    assert draw_splits(store, data, ()).train.tolist() == found.train.tolist()


@pytest.mark.parametrize(
    ("measured", "counts"),
    [(("val", "test"), (9, 1, 2)), (("val",), (11, 1, 0)), (("test",), (10, 0, 2)), ((), (12, 0, 0))],
)
def test_images_are_kept_apart_only_for_measured_splits(
    tmp_path: Path, measured: tuple[str, ...], counts: tuple[int, ...]
) -> None:
    store, data = store_of(tmp_path, "")
    assert store.splits == {"train": 10, "test": 2}
    found = draw_splits(store, data, measured)
    got = (len(found.train), len(found.val), len(found.test))
    # A share of 0.1 of each of two classes of 10 or 12 images in all rounds to 0 or 1
    assert (sum(got), got[2], got[1] > 0) == (12, counts[2], "val" in measured and counts[1] > 0 and got[1] > 0)
    assert got[0] == 12 - got[1] - got[2]
    assert found.stored_in == (("train",) if "test" in measured else ("train", "test"))
    given = dataset(root=tmp_path / "in", test_fraction=0.2, val_fraction=0.2)
    assert len(draw_splits(store, given, measured).train) == 8, "what is given counts, whatever is measured"


def test_numbers_of_images_say_what_is_held_out_of_which() -> None:
    found = Splits(np.arange(1200), np.arange(1200, 1300), np.arange(0), np.zeros(1300, np.int64))
    assert found.describe_counts(False) == "1,200 to train on, 100 held out of these, 0 to test on"
    assert found.describe_counts(True) == "1,200 to train on, 100 held out, 0 to test on"
