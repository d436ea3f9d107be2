"""Ray Data: prefetch reaches its actors, answers come in order, and jobs leave its settings as they were."""

from typing import Any

import numpy as np
import pytest

from firstlight.pipeline.data import ray_data
from firstlight.pipeline.data.ray_data import ActorPool, TaskPool, predict_on_actors, run_jobs

POOL = ActorPool(count=1, cpus=0.5, gpus=0.0, decoding=TaskPool(count=2, cpus=0.25))


@pytest.mark.parametrize("prefetch", [1, 4])
def test_prefetch_is_the_number_of_batches_that_wait_at_an_actor(prefetch: int) -> None:
    strategy = ray_data.actor_strategy(3, prefetch)
    assert (strategy.min_size, strategy.max_size) == (3, 3)
    assert strategy.max_tasks_in_flight_per_actor == prefetch + 1


def test_no_jobs_start_nothing() -> None:
    assert list(run_jobs(lambda job: job, [])) == []


@pytest.mark.ray
def test_answers_come_in_order_for_any_prefetch(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions are pickled by value, as the tasks do not know this file."""
    asked: list[int] = []
    strategy = ray_data.actor_strategy

    def watched(num_actors: int, prefetch: int) -> Any:
        asked.append(prefetch)
        return strategy(num_actors, prefetch)

    monkeypatch.setattr(ray_data, "actor_strategy", watched)

    def load(index: int) -> np.ndarray:
        return np.full((index + 1, 2, 2, 3), index, np.uint8)

    def build() -> Any:
        return lambda pixels: pixels.reshape(len(pixels), -1).sum(1, keepdims=True).astype(np.float32)

    for prefetch in (1, 3):
        answers = list(predict_on_actors(load, 5, build, POOL, batch_bytes=60, prefetch=prefetch))
        assert [answer.shape for answer in answers] == [(k + 1, 1) for k in range(5)]
        assert [answer[0, 0] for answer in answers] == [12.0 * k for k in range(5)]
    assert asked == [1, 3]


@pytest.mark.ray
def test_jobs_return_their_results_and_restore_the_settings(ray_local: None) -> None:
    from ray.data import DataContext

    before = DataContext.get_current().enable_progress_bars

    def work(job: dict[str, int]) -> dict[str, int]:
        return {"square": job["k"] ** 2}

    assert sorted(result["square"] for result in run_jobs(work, [{"k": k} for k in range(4)])) == [0, 1, 4, 9]
    assert DataContext.get_current().enable_progress_bars == before
