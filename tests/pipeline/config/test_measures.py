"""The pairs of arms that a measure compares."""

import pytest

from firstlight.pipeline.config.measures import Measure


@pytest.mark.parametrize(
    ("arms", "pairs"),
    [
        ("pretrained", ""),
        ("pretrained random", "pretrained-random"),
        ("given random", "given-random"),
        ("pretrained given", "pretrained-given"),
        ("pretrained given random", "pretrained-given pretrained-random given-random"),
        ("given pretrained scratch", "given-scratch pretrained-given pretrained-scratch"),
        ("pretrained he xavier gaussian", "pretrained-gaussian he-gaussian xavier-gaussian"),
        ("pretrained_decoder pretrained scratch", "pretrained_decoder-scratch pretrained-scratch"),
        (
            "pretrained_decoder pretrained given scratch",
            "pretrained_decoder-given pretrained_decoder-scratch pretrained-given pretrained-scratch given-scratch",
        ),
        ("pretrained he given", "pretrained-given he-given"),
    ],
)
def test_arms_are_compared_with_the_last_and_pretrained_ones_with_the_given_too(arms: str, pairs: str) -> None:
    found = Measure("knn", "kNN", tuple(arms.split())).pairs
    assert " ".join(f"{arm}-{against}" for arm, against in found) == pairs
