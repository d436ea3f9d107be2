"""Names of splits: case, suffixes, synonyms, years, and names that only look like one."""

import pytest

from firstlight.pipeline.data.sources.conventions.split_names import (
    describe_split_names,
    find_file_splits,
    find_split_names,
    find_value_splits,
    parse_split_name,
    require_distinct_splits,
)
from firstlight.pipeline.errors import UserError


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            "train Train TRAIN training Training_Set trainset train2017 train_2014 TrainImages images-train trainval",
        ),
        ("val", "val VAL valid Validation validation_set valset val2017 dev devset Dev_Data development"),
        ("test", "test TEST testing Testing-Set testset test2015 TestImages test_data"),
        ("eval", "eval Evaluation hold_out held-out holdout"),
    ],
)
def test_names_of_splits_are_known(split: str, names: str) -> None:
    for name in names.split():
        assert parse_split_name(name) == (split, ()), name


@pytest.mark.parametrize(
    "name",
    ["airplane", "contest", "devkit", "protest", "tested", "train-test", "unlabeled", "vali", "0", "data", "trains"],
)
def test_other_names_are_no_splits(name: str) -> None:
    assert parse_split_name(name) is None


def test_other_words_count_only_beside_another_split_with_them() -> None:
    assert find_split_names(["seg_train", "seg_test", "seg_pred"]) == {"seg_train": "train", "seg_test": "test"}
    assert find_split_names(["crash_test", "bus", "train"]) == {"train": "train"}
    assert find_split_names(["train_224", "val_224"]) == {"train_224": "train", "val_224": "val"}


def test_eval_is_the_missing_split() -> None:
    assert find_split_names(["train", "eval"]) == {"train": "train", "eval": "test"}
    assert find_split_names(["train", "eval", "test"]) == {"train": "train", "eval": "val", "test": "test"}


def test_values_of_columns_are_splits_without_other_words() -> None:
    assert find_value_splits(["Train", "valid", "Test set", "fold1"]) == {
        "Train": "train",
        "valid": "val",
        "Test set": "test",
    }


def test_words_that_all_files_share_are_no_splits() -> None:
    names = ["test-set/train-0.tar", "test-set/dev-0.tar", "test-set/x.tar"]
    assert find_file_splits(names) == {names[0]: "train", names[1]: "val"}
    with pytest.raises(ValueError, match=r"^train-test\.tar$"):
        find_file_splits(["train-test.tar", "train.tar", "val.tar"])


def test_two_names_of_one_split_ask_for_the_key() -> None:
    require_distinct_splits({"train": "train", "val": "val"}, "the root")
    with pytest.raises(
        UserError, match=r"'train2014', 'train2017' in the root all name the training split; valid: dataset\."
    ):
        require_distinct_splits({"train2014": "train", "train2017": "train"}, "the root")


def test_description_lists_five_names_a_split() -> None:
    found = {**{f"train-{k}": "train" for k in range(7)}, "Test": "test"}
    assert describe_split_names(found) == (
        "splits: training = train-0, train-1, train-2, train-3, train-4 and 2 more; test = Test"
    )
