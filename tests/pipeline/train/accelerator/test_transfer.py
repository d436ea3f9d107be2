"""Copies to the training device."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from firstlight.pipeline.train.accelerator.transfer import BatchFeed, list_batch_tensors
from firstlight.tasks.learner import Batch
from tests.support.batches import mask_batch

CPU = torch.device("cpu")


def test_all_tensors_of_a_batch_are_listed() -> None:
    batch = mask_batch()
    found = {tensor.data_ptr() for tensor in list_batch_tensors(batch)}
    assert found == {t.data_ptr() for t in (batch.ids, batch.rows, batch.labels, *batch.views, batch.passes)} | {
        batch.targets["mask"].data_ptr()
    }


class RecordedStream:
    """A stream of a GPU that only remembers what it was told to wait for."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: "RecordedStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_batches_are_made_beside_the_step_unless_the_step_s_stream_computes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def enter(stream: RecordedStream) -> Iterator[None]:
        log.append(f"in {stream.name}")
        yield
        log.append(f"out of {stream.name}")

    main, side = RecordedStream(log, "main"), RecordedStream(log, "side")
    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(Stream=lambda device: side, current_stream=lambda device: main, stream=enter),
    )
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}"))
    feed = BatchFeed(torch.device("cuda"))

    def make() -> Batch:
        log.append("made")
        return mask_batch()

    feed.make_batch(make, is_on_device=False)
    assert log == ["in side", "made", "out of side", "main waits for side", *["kept for main"] * 6]
    log.clear()
    feed.make_batch(make, is_on_device=True)
    assert log == ["made"]
    assert BatchFeed(CPU).stream is None
