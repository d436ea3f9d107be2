"""Answers rank their classes, and build themselves from what a task predicts."""

import numpy as np

from firstlight.pipeline.stages.prediction.answers import ImageClasses, ImageMask, ImageObjects, build_answer

NAMES = ("bee", "cat", "dog")


def test_most_probable_class_comes_first() -> None:
    answer = build_answer("label", NAMES, {"probabilities": np.array([0.2, 0.5, 0.3], np.float32)})
    assert isinstance(answer, ImageClasses)
    assert answer.class_name == "cat"
    assert answer.probability == 0.5
    assert [name for name, _ in answer.rank_classes(5)] == ["cat", "dog", "bee"]
    assert len(answer.rank_classes(2)) == 2


def test_equal_probabilities_keep_the_order_of_the_classes() -> None:
    answer = ImageClasses(NAMES, np.full(3, 1 / 3, np.float32))
    assert [name for name, _ in answer.rank_classes(3)] == list(NAMES)


def test_shares_of_a_mask_leave_out_what_is_not_seen() -> None:
    answer = build_answer("mask", NAMES, {"mask": np.array([[2, 2, 255, 0]], np.uint8)})
    assert isinstance(answer, ImageMask)
    assert answer.measure_shares().tolist() == [0.25, 0.0, 0.5]
    assert answer.rank_classes(3) == [("dog", 0.5), ("bee", 0.25)]


def test_objects_are_named_by_their_labels() -> None:
    values = {"boxes": np.zeros((2, 4)), "scores": np.array([0.75, 0.5], np.float32), "labels": np.array([2, 0])}
    answer = build_answer("boxes", NAMES, values)
    assert isinstance(answer, ImageObjects)
    assert answer.rank_classes(1) == [("dog", 0.75)]
