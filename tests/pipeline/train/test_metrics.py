"""Metrics of a training: the time that it waits for images, and what remains of them after a stop."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from firstlight.pipeline.data.plan import BatchPlan
from firstlight.pipeline.train import metrics
from firstlight.pipeline.train.metrics import METRICS_FILE, MetricsLogger, read_metrics
from tests.support.gloo import Pool


@pytest.mark.parametrize(("pause", "noted"), [(0.05, True), (None, False)])
def test_waiting_for_images_writes_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float | None, noted: bool
) -> None:
    monkeypatch.setattr(metrics, "WAIT_NOTE_MIN_S", 0.05)
    plan = BatchPlan(np.arange(40), np.array([0]), 4, 0, 8, False)

    def stream() -> Iterator[dict[str, Any]]:
        for _ in range(10):
            if pause:
                time.sleep(pause)
            yield {}

    logger = MetricsLogger(tmp_path, plan, 10, 0, torch.device("cpu"))
    for step, _ in enumerate(logger.time_waits(stream()), 1):
        time.sleep(0.02)
        logger.log_step(step, {"loss": 1.0})
    assert ("waited for images" in (tmp_path / METRICS_FILE).read_text()) == noted


def log_waits_of_this_rank(folder: str) -> None:
    """On rank 0 the step takes as long as rank 1 waits."""
    logger = MetricsLogger(
        Path(folder), BatchPlan(np.arange(40), np.array([0]), 4, 0, 8, False), 10, 0, torch.device("cpu")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "WAIT_NOTE_MIN_S", 0.05)
        for step, _ in enumerate(logger.time_waits(wait_for_batch({}, 0.05 * dist.get_rank()) for _ in range(10)), 1):
            time.sleep(0.05 * (1 - dist.get_rank()))
            logger.log_step(step, {"loss": 1.0})


def wait_for_batch(batch: dict[str, Any], seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return batch


def test_share_of_waiting_is_logged_for_each_worker(pool: Pool, tmp_path: Path) -> None:
    pool.run(log_waits_of_this_rank, str(tmp_path))
    last = read_metrics(tmp_path / METRICS_FILE)[-1]
    assert last["data_wait_worker1"] > 0.5 > last["data_wait_worker0"]
    assert last["data_wait"] == pytest.approx((last["data_wait_worker0"] + last["data_wait_worker1"]) / 2)
    assert "worker 1 waited for images" in (tmp_path / METRICS_FILE).read_text()


@pytest.mark.parametrize(("most", "listed"), [(40, 22), (15, 2)])
def test_ids_after_an_early_end_are_listed_unless_they_are_very_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, listed: int
) -> None:
    """The second of two epochs of 42 images in 10 batches of 4 ends after 5 of them."""
    monkeypatch.setattr(metrics, "MAX_DROPPED_IDS", most)
    plan = BatchPlan(np.arange(42), np.array([0]), 4, 0, 8, False)
    dropped = metrics.DroppedIds(tmp_path, plan, 0, 15)
    dropped.write_epoch(0)
    dropped.write_epoch(1)
    first, second = (json.loads(line) for line in (tmp_path / metrics.DROPPED_IDS_FILE).read_text().splitlines())
    assert first == {"epoch": 0, "ids": plan.tail(0).tolist()}
    assert len(second["ids"]) == listed
    assert second.get("steps") == (None if listed > 2 else 5)
