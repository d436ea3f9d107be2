"""A check that a batch embedded in parts has the loss and the gradient of the whole, as all methods promise."""

import pytest
import torch

from firstlight.tasks.learner import Batch, Learner


def assert_parts_equal_whole(whole: Learner, parted: Learner, batch: Batch, size: int) -> None:
    """Asserts that a batch embedded in parts of `size` images has the loss and the gradient of the whole batch.

    `whole` and `parted` are the same learner, built twice.
    """
    loss = whole(batch)["loss"]
    loss.backward()
    parts = [parted.embed(batch.select_range(start, start + size)) for start in range(0, len(batch.ids), size)]
    in_parts = parted.loss(tuple(torch.cat(column) for column in zip(*parts, strict=True)), batch)["loss"]
    in_parts.backward()
    assert float(in_parts.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    for parameter, other in zip(whole.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-8, atol=1e-12)
