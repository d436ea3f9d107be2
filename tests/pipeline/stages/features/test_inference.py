"""Batches of images through a network, in this process and on a pool of actors."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from firstlight.pipeline.data.ray_data import ActorPool, TaskPool
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.stages.features import inference
from firstlight.pipeline.stages.features.inference import ImageBatches, predict_batches
from tests.support.digit_batches import digit_loader

IDS = [np.array([3, 9, 4]), np.array([3]), np.array([700, 2])]


def build_mean() -> Any:
    return lambda pixels: pixels.reshape(len(pixels), -1).mean(1, keepdims=True)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_answers_are_those_of_the_first_view_batch_by_batch(digits: Store, threads: int) -> None:
    loader = digit_loader(digits)
    found = list(predict_batches(ImageBatches(loader, IDS), build_mean, None, prefetch=2, threads=threads))
    for ids, answer in zip(IDS, found, strict=True):
        assert np.array_equal(answer, build_mean()(loader.load_once(ids)["views"][:, 0]))


def test_no_batches_build_no_network(digits: Store) -> None:
    def build() -> Any:
        raise AssertionError("nothing to predict")

    assert list(predict_batches(ImageBatches(digit_loader(digits), []), build, None, prefetch=2)) == []


def test_prefetch_and_the_largest_batch_reach_the_actors(digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def predict(load: Any, num_batches: int, build: Any, pool: ActorPool, **options: Any) -> Iterator[np.ndarray]:
        given.update(options, num_batches=num_batches, pool=pool)
        return iter([load(index) for index in range(num_batches)])

    monkeypatch.setattr(inference, "predict_on_actors", predict)
    pool = ActorPool(2, 1.0, 0.0, TaskPool(4, 0.5))
    loader = digit_loader(digits, views=1)
    found = list(predict_batches(ImageBatches(loader, IDS), build_mean, pool, prefetch=7))
    assert given == {"batch_bytes": 3 * loader.row_bytes, "prefetch": 7, "num_batches": 3, "pool": pool}
    assert [len(pixels) for pixels in found] == [3, 1, 2]
