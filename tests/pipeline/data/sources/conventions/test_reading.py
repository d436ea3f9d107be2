"""Lines about what was read: counts by reason, classes by name, names that look alike."""

import numpy as np

from firstlight.pipeline.data.sources.conventions.reading import (
    MAX_LISTED_CLASSES,
    count_labels,
    count_things,
    describe_absent_classes,
    describe_classes,
    describe_near_twins,
    describe_read_files,
    drop_refused,
    find_near_twins,
    fold_name,
    join_counts,
    join_names,
    show_name,
)


def test_left_out_files_are_counted_by_reason() -> None:
    assert describe_read_files(1234, {}) == "read 1,234 files, left out 0"
    assert describe_read_files(2, {".txt": 1, "hidden": 3}) == "read 2 files, left out 4: hidden 3, .txt 1"
    assert join_counts({"a": 1, "b": 5, "c": 2}, 2) == "b 5, c 2, others 1"


def test_names_are_shown_without_control_characters() -> None:
    assert show_name("a\x1b[31m\u202eb\n") == "a\\x1b[31m\\u202eb\\n"
    assert show_name("x" * 100) == "x" * 60 + "..."
    assert join_names(["a", "b", "c"], 2) == "a, b and 1 more"
    assert (count_things(1, "image"), count_things(2000, "image")) == ("1 image", "2,000 images")


def test_near_twins_differ_in_case_spaces_or_composition() -> None:
    assert fold_name(" Big  CAT ") == fold_name("big cat")
    assert find_near_twins(["cat", "Cat", "dog", "cafe\u0301", "caf\u00e9"]) == [
        ["cat", "Cat"],
        ["cafe\u0301", "caf\u00e9"],
    ]
    assert describe_near_twins(["cat", "dog"], {}) == []
    (note,) = describe_near_twins(["cat", "Cat"], {0: 7})
    assert "'cat' (7) and 'Cat' (0)" in note


def test_classes_are_listed_with_training_images() -> None:
    labels, rows = np.array([0, 0, 1, -1, 1]), {"train": np.array([0, 1, 2, 3]), "test": np.array([4])}
    assert describe_classes(("cat", "dog"), labels, rows) == ["classes, 2 with their training images: cat 2, dog 1"]
    assert describe_classes((), labels, rows) == ["no labels"]
    many = tuple(map(str, range(MAX_LISTED_CLASSES + 3)))
    assert describe_classes(many, labels, rows)[0].endswith("19 0 and 3 more")
    assert count_labels(labels) == {0: 2, 1: 2}


def test_absent_classes_are_reported() -> None:
    labels, rows = np.array([0, 0, 1]), {"train": np.array([0]), "test": np.array([1, 2])}
    assert describe_absent_classes(("cat", "dog", "emu"), labels, rows) == [
        "classes without an image: emu",
        "classes without an image to train on: dog",
    ]
    rows = {"train": np.array([0, 2]), "test": np.array([1])}
    assert describe_absent_classes(("cat", "dog"), labels, rows) == ["classes without an image to test on: dog"]


def test_rows_that_hold_no_image_are_dropped_for_counts() -> None:
    rows = {"train": np.array([0, 1, 2, 5]), "test": np.array([3, 4])}
    kept = drop_refused(rows, {5: "a reason", 3: "another"})
    assert {split: indices.tolist() for split, indices in kept.items()} == {"train": [0, 1, 2], "test": [4]}
    assert drop_refused(rows, {})["train"].tolist() == [0, 1, 2, 5]
