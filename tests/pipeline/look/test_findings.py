"""Near duplicates, leaks, odd ones out and diverse images of features whose answer is known."""

import numpy as np
import pytest

from firstlight.pipeline.look.findings import choose_diverse, find_all


def turn(*degrees: float) -> np.ndarray:
    """(n, 2) unit vectors at angles."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def split(**ids: list[int]) -> dict[int, str]:
    return {image_id: name for name, found in ids.items() for image_id in found}


def test_findings_are_pairs_leaks_and_redundant_images() -> None:
    # 1, 2 and 3 are alike, 5 is like the test image 7, 6 is alone.
    ids = np.array([1, 2, 3, 5, 6, 7])
    features = turn(0, 2, 4, 90, 180, 91)
    found = find_all(ids, features, split(train=[1, 2, 3, 5, 6], test=[7]), np.cos(np.radians(4.5)), 2, 2)
    assert {(pair.first, pair.second) for pair in found.near_duplicates} == {(1, 2), (2, 3), (1, 3), (5, 7)}
    assert [pair.cosine for pair in found.near_duplicates] == sorted(
        (pair.cosine for pair in found.near_duplicates), reverse=True
    )
    assert [(pair.first, pair.second) for pair in found.leaks] == [(5, 7)]
    assert found.redundant == {2, 3, 5}
    assert found.odd[0][0] == 6


@pytest.mark.parametrize("seed", range(4))
def test_no_pair_is_left_when_the_redundant_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids, features = np.arange(60) * 3, turn(*rng.uniform(0, 360, 60))
    where = {int(image_id): ("test" if rng.random() < 0.2 else "train") for image_id in ids}
    found = find_all(ids, features, where, np.cos(np.radians(1.5)), 5, 5)
    assert all(where[image_id] == "train" for image_id in found.redundant)
    left = {image_id for image_id in where if image_id not in found.redundant}
    pairs = [pair for pair in found.near_duplicates if {pair.first, pair.second} <= left]
    assert all(where[pair.first] == where[pair.second] == "test" for pair in pairs)
    # Nothing is left out without a reason.
    paired = {one for pair in found.near_duplicates for one in (pair.first, pair.second)}
    assert found.redundant <= paired


def test_images_like_no_other_are_odd_in_their_order() -> None:
    found = find_all(np.arange(8), turn(0, 1, 2, 3, 4, 5, 70, 200), split(train=list(range(8))), 0.999, 3, 1)
    assert [image_id for image_id, _ in found.odd[:2]] == [7, 6]
    assert found.odd[0][1] < found.odd[1][1] < found.odd[2][1]


def test_diverse_images_are_the_farthest_from_those_before() -> None:
    ids, features = np.array([10, 11, 12, 13, 14]), turn(0, 1, 2, 90, 181)
    assert set(choose_diverse(ids, features, 3)) in ({12, 13, 14}, {13, 14, 10}, {13, 14, 11})
    assert len(set(choose_diverse(ids, features, 9))) == 5
    assert choose_diverse(ids[:0], features[:0], 3) == ()


def test_held_out_images_are_no_part_of_the_diverse_subset() -> None:
    found = find_all(np.arange(4), turn(0, 90, 180, 270), split(train=[1, 2], test=[0, 3]), 0.99, 1, 4)
    assert set(found.diverse) == {1, 2}
