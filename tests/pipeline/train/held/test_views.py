"""Views outside of trainings are made once in a process, and are those of the stream."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from firstlight.pipeline.data.loader import Arrays, Loader
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import EvalOrder, stream_batches
from firstlight.pipeline.train.held.views import HeldViews
from tests.support.augmentations import PIPELINES
from tests.support.digit_batches import LOCAL_LOADING, digit_loader
from tests.support.loaded_ids import record_loaded_ids

ROOM = replace(LOCAL_LOADING, held_view_bytes=10**7)
IDS = np.arange(5, 105)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of all images that are decoded."""
    return record_loaded_ids(monkeypatch, Loader)


def assert_same_batches(found: Iterator[Arrays], loader: Loader, ids: np.ndarray, size: int) -> None:
    expected = list(stream_batches(loader, EvalOrder(ids, size, 0, 1), size, LOCAL_LOADING))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name].dtype == theirs[name].dtype
            assert np.array_equal(ours[name], theirs[name])


def test_batches_are_those_of_the_stream(digits: Store) -> None:
    loader = replace(digit_loader(digits), ops=(tuple(PIPELINES["cifar"]),) * 3, view_sizes=(8, 8, 5))
    views = HeldViews()
    for ids, size in ((IDS, 32), (IDS, 7), (IDS[::-3], 16), (np.arange(90, 140), 32), (IDS[:0], 8)):
        assert_same_batches(views.iterate_batches(loader, ids, size, ROOM), loader, ids, size)


def test_each_image_is_decoded_once(digits: Store, loaded: list[int]) -> None:
    views, loader = HeldViews(), digit_loader(digits)
    for ids, size in ((IDS, 32), (IDS[50:], 8), (np.arange(80, 120), 16)):
        assert len(list(views.iterate_batches(loader, ids, size, ROOM))) == -(-len(ids) // size)
    assert loaded == np.arange(5, 120).tolist()
    list(views.iterate_batches(replace(loader, seed=3), IDS[:4], 8, ROOM))
    list(views.iterate_batches(loader, IDS[:4], 8, ROOM))
    assert loaded[115:] == IDS[:4].tolist(), "other pixels, which are kept beside the first ones"


def test_a_pass_that_ends_early_keeps_what_it_has(digits: Store, loaded: list[int]) -> None:
    views, loader = HeldViews(), digit_loader(digits)
    next(views.iterate_batches(loader, IDS, 8, replace(ROOM, prefetch=1)))
    assert_same_batches(views.iterate_batches(loader, IDS, 8, ROOM), loader, IDS, 8)


def test_views_without_room_are_streamed(digits: Store, loaded: list[int]) -> None:
    views, loader = HeldViews(), digit_loader(digits)
    enough = 100 * loader.row_bytes
    for limit, times in ((0, 2), (enough - 1, 2), (enough, 1)):
        loaded.clear()
        for _ in range(2):
            list(views.iterate_batches(loader, IDS, 32, replace(ROOM, held_view_bytes=limit)))
        assert loaded == IDS.tolist() * times
    list(views.iterate_batches(replace(loader, seed=3), IDS, 32, replace(ROOM, held_view_bytes=enough)))
    loaded.clear()
    list(views.iterate_batches(loader, IDS, 32, replace(ROOM, held_view_bytes=enough)))
    assert loaded == IDS.tolist(), "the views of the other loader took their room"
