"""Pixels are a function of seed, pass, id and view; stored images come back as they are."""

from dataclasses import replace

import numpy as np
import pytest

from firstlight.pipeline.data import loader as loader_module
from firstlight.pipeline.data.images import decode_rgb
from firstlight.pipeline.data.loader import Loader, StoredImages, list_view_columns
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.data.stream import EvalOrder, stream_batches
from tests.support.digit_batches import DIGIT_OPS as OPS
from tests.support.digit_batches import LOCAL_LOADING as OPTIONS
from tests.support.digit_batches import digit_loader as loader


def pixels(its: Loader, ids: list[int], epoch: int) -> dict[int, np.ndarray]:
    array = np.array(ids)
    return dict(zip(ids, its.load(array, np.full_like(array, epoch), its.read_encoded(array))["views"], strict=True))


def test_pixels_are_a_function_of_seed_pass_id_and_view(digits: Store) -> None:
    its = loader(digits)
    base = pixels(its, [4, 5, 6, 7], 1)
    for others in (pixels(its, [7, 100, 5], 1), pixels(loader(digits, views=3), [5, 4], 1), pixels(its, [6], 1)):
        for image_id, views in others.items():
            if image_id in base:
                assert np.array_equal(views[:2], base[image_id])
    for changed in (pixels(its, [4, 5, 6, 7], 2), pixels(loader(digits, seed=1), [4, 5, 6, 7], 1)):
        assert not any(np.array_equal(changed[i], base[i]) for i in base)
    assert not any(np.array_equal(*views) for views in base.values()), "both views are the same"


def test_large_images_are_decoded_in_chunks(digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    its = loader(digits)
    ids, passes = np.arange(4, 17), np.ones(13, np.int64)
    expected = its.load(ids, passes, its.read_encoded(ids))["views"]
    for pixels in (1, 3 * 64 - 1, 3 * 64, 13 * 64):
        monkeypatch.setattr(loader_module, "MAX_OPEN_PIXELS", pixels)
        assert max(len(opened) for _, opened in its._open_in_chunks(ids, its.read_encoded(ids))) <= -(-pixels // 64)
        assert np.array_equal(its.load(ids, passes, its.read_encoded(ids))["views"], expected)


def test_each_view_has_its_own_augmentation(digits: Store) -> None:
    its, plain = loader(digits), ({"op": "center_crop"},)
    mixed, alone = replace(its, ops=(plain, OPS)), replace(its, ops=(plain,))
    for i, views in pixels(mixed, [4, 5], 1).items():
        assert np.array_equal(views[0], pixels(alone, [i], 7)[i][0]), "the plain view is the same in every epoch"
        assert np.array_equal(views[1], pixels(its, [i], 1)[i][1])


def test_repeated_id_is_loaded_twice(digits: Store) -> None:
    its = replace(loader(digits), ops=(({"op": "center_crop"},),))
    rows = its.load(np.array([9, 2, 9]), np.zeros(3, np.int64), its.read_encoded(np.array([9, 2, 9])))
    assert np.array_equal(rows["views"][0], rows["views"][2])
    assert not np.array_equal(rows["views"][0], rows["views"][1])


def test_stored_images_are_returned_unchanged(digits: Store) -> None:
    its, ids = StoredImages(digits, 8, 8, 1_000_000), np.array([9, 2, 1430])
    found = list(stream_batches(its, EvalOrder(ids, 2, 0, 1), 2, OPTIONS))
    encoded, labels = digits.read(ids)
    assert [batch["views"].shape for batch in found] == [(2, 1, 8, 8, 3), (1, 1, 8, 8, 3)]
    assert np.array_equal(
        np.concatenate([batch["views"][:, 0] for batch in found]), [decode_rgb(data) for data in encoded]
    )
    assert np.array_equal(np.concatenate([batch["label"] for batch in found]), labels)


def test_groups_of_views_have_the_pixels_of_loaders_of_their_size(digits: Store) -> None:
    """A view's pixels depend on its number and size, not on the sizes of the views beside it."""
    its = replace(loader(digits), ops=(OPS,) * 4, view_sizes=(8, 8, 5, 8))
    ids, passes = np.array([9, 4, 77]), np.array([2, 0, 1])
    encoded = its.read_encoded(ids)
    found = its.load(ids, passes, encoded)
    assert list_view_columns(found) == ["views", "views_1", "views_2"]
    assert [found[name].shape for name in list_view_columns(found)] == [
        (3, n, s, s, 3) for n, s in ((2, 8), (1, 5), (1, 8))
    ]
    of_size = {size: replace(its, size=size, view_sizes=()).load(ids, passes, encoded)["views"] for size in (5, 8)}
    assert np.array_equal(found["views"], of_size[8][:, :2])
    assert np.array_equal(found["views_1"], of_size[5][:, 2:3])
    assert np.array_equal(found["views_2"], of_size[8][:, 3:])
    assert its.row_bytes == (3 * 64 + 25) * 3
