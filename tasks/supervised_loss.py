"""Cross-entropy over the labelled images of a global batch. Workers may hold different numbers of them, or none."""

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.collective import mean_count_per_worker


def mark_classes(indices: Tensor, count: int) -> Tensor:
    """Returns (..., count) bool for (...) indices: true in the column of each index.

    `torch.nn.functional.one_hot` checks its values on the host first.
    """
    return indices[..., None] == torch.arange(count, device=indices.device)


def labelled_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean cross-entropy and the accuracy over the labelled images of all workers.

    Both are this worker's part: averaged over workers they, and the gradient of the loss, are those of the global
    batch. They are 0 if no image is labelled.

    Args:
        logits: (B, C).
        labels: (B,); -1 is unknown.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = labels >= 0
    count = mean_count_per_worker(known, scores.dtype)
    hits = (scores.argmax(1) == labels) & known
    return F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum") / count, hits.sum() / count
