"""The memory for decoded images is divided, and never more than the recipe allows."""

from dataclasses import replace

import numpy as np
import pytest

from firstlight.pipeline.config.scale import StreamOptions
from firstlight.pipeline.data.image_statistics import last_in_bin, side_bin
from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.train.held import budget


def test_the_end_of_a_bin_is_its_last_number() -> None:
    for number in range(9, 60):
        last = last_in_bin(number)
        assert side_bin(last) == number
        assert side_bin(last + 1) == number + 1


def test_images_of_one_size_are_counted_exactly(digits: Store) -> None:
    assert budget.estimate_held_bytes(digits, 100) == 100 * 8 * 8, "gray images are held with one channel"
    for modes in ({"RGB": 1797}, {"L": 1000, "RGB": 797}, {"1": 1797}):
        colours = replace(digits, images={**digits.images, "modes": modes})
        assert budget.estimate_held_bytes(colours, 100) == 100 * 8 * 8 * 3
    assert budget.estimate_held_bytes(replace(digits, images={}), 100) is None


def test_images_of_several_sizes_are_counted_by_the_ends_of_their_bins(digits: Store) -> None:
    images = {"width": [3, 50], "height": [4, 60], "sizes": [[6, 8, 30], [22, 23, 10]]}
    assert budget.estimate_held_bytes(replace(digits, images=images), 80) == 80 * 4 * (30 * 3 * 4 + 10 * 50 * 60) / 40


@pytest.mark.parametrize(("megabytes", "images"), [(1, 0), (1, 100), (1, 15625), (1, 15626), (2, 15626), (512, 10**9)])
def test_the_parts_are_at_most_the_whole(digits: Store, megabytes: int, images: int) -> None:
    found = budget.divide_held_bytes(StreamOptions(resident_mb=megabytes), digits, images)
    assert sum(found) <= megabytes * 10**6
    assert min(found) >= 0
    if images * 64 <= megabytes * 10**6:
        assert found == (images * 64, megabytes * 10**6 - images * 64)
    assert budget.divide_held_bytes(StreamOptions(resident="off"), digits, images) == (0, 0)


def test_few_images_are_distinct(digits: Store) -> None:
    images = {"width": [3, 50], "height": [4, 60], "sizes": [[6, 8, 30]]}
    store = replace(digits, images=images)
    options = budget.LoadingOptions(False, 1, 1, 1.0, held_bytes=10**6)
    plan = BatchPlan(np.array([3, 9]), digits.list_row_groups("train")[:, 2], 2, 0, 128, False)
    assert np.array_equal(budget.choose_held_ids(store, options, plan), [3, 9])
    assert budget.choose_held_ids(store, replace(options, held_bytes=10), plan) is None
