"""Cross-entropy over the labelled images of a global batch. Workers may hold different numbers of them, or none."""

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.collective import shared_count


def labelled_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C) logits, (B,) labels (-1: unknown) -> the mean cross-entropy over the labelled images of all workers, and the share of hits.

    Both are this worker's part: averaged over workers they, and the loss's gradient, are those of the global batch; 0 where nothing is labelled.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = labels >= 0
    count = shared_count(known, scores.dtype)
    hits = (scores.argmax(1) == labels) & known
    return F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum") / count, hits.sum() / count
