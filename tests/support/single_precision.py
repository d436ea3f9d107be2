"""A check that a loss is in single precision where the networks are in half."""

import torch

from firstlight.tasks.learner import Batch, Learner


def assert_loss_is_single_precision(learner: Learner, batch: Batch) -> None:
    """Asserts that under autocast the embeddings are float32, and the loss of them is that without autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = learner.embed(batch)
        assert all(output.dtype == torch.float32 for output in outputs)
        loss = learner.loss(outputs, batch)["loss"]
    torch.testing.assert_close(loss, learner.loss(outputs, batch)["loss"], rtol=0, atol=0)
