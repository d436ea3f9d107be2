"""Permutations of rows that follow from a key."""

import numpy as np

from firstlight.pipeline.data.order.row_orders import derive_order_key, derive_row_keys, draw_row_orders


def test_every_row_is_a_permutation_of_its_own() -> None:
    orders = draw_row_orders(derive_row_keys(5, np.arange(100)), 17)
    assert (np.sort(orders, axis=1) == np.arange(17)).all()
    assert len({tuple(order) for order in orders.tolist()}) == 100


def test_every_number_is_as_often_at_every_place() -> None:
    orders = draw_row_orders(derive_row_keys(1, np.arange(20_000)), 4)
    counts = np.stack([np.bincount(orders[:, place], minlength=4) for place in range(4)])
    # Four standard deviations of a binomial number.
    assert abs(counts - 5000).max() < 4 * np.sqrt(20_000 * 0.25 * 0.75)


def test_keys_follow_from_all_parts_and_their_order() -> None:
    keys = {derive_order_key(*parts) for parts in [(1, 2, 3), (2, 1, 3), (1, 2, 4), (1, 2), (0, 1, 2, 3)]}
    assert len(keys) == 5
    assert derive_order_key(1, 2, 3) == derive_order_key(1, 2, 3)
    assert len(np.unique(np.concatenate([derive_row_keys(key, np.arange(1000)) for key in keys]))) == 5000
