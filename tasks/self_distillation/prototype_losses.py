"""Losses of self-distillation, of this worker's images: their mean over workers is that of the global batch."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.collective import gather_over_workers, rank

# Keeps the logarithm of a distance finite (DINOv2's code).
KOLEO_EPSILON = 1e-8


def cross_view_loss(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Returns the mean cross-entropy from each target view to each other view (DINO, eq. 3).

    Args:
        targets: (B, T, K) probabilities that the teacher gives of the first T views.
        logits: (B, V, K) of the student for all V views, the first T of which are the teacher's.
        temperature: that of the student's softmax (eq. 1).
    """
    log_p = F.log_softmax(logits / temperature, dim=-1)
    pairs = [(t, v) for t, v in product(range(targets.shape[1]), range(logits.shape[1])) if t != v]
    terms = [(targets[:, t] * log_p[:, v]).sum(1).mean() for t, v in pairs]
    return -torch.stack(terms).mean()


def masked_patch_loss(targets: Tensor, logits: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Returns the cross-entropy of tokens that the student does not see: a weighted sum per image, and its mean.

    With weights of 1 / (the masked tokens of a view) / (the views) it is iBOT's eq. 2, which every view has a mean of;
    a view without a masked token counts as 0 (authors' code).

    Args:
        targets: (B, P, K) probabilities that the teacher gives of tokens.
        logits: (B, P, K) of the student for the same tokens.
        weights: (B, P).
        temperature: that of the student's softmax.
    """
    terms = (targets * F.log_softmax(logits / temperature, dim=-1)).sum(2)
    return -(weights * terms).sum(1).mean()


def koleo_loss(features: Tensor) -> Tensor:
    """Returns -mean log |x_i - x_nearest|: features repel their nearest neighbour (Kozachenko and Leonenko).

    x are (B, d) features as unit vectors; the neighbours are among those of all workers. Sources: Sablayrolles et al.
    2019, section 3.3; DINOv2, section 4.
    """
    x = F.normalize(features, dim=1, eps=KOLEO_EPSILON)
    everyone = gather_over_workers(x)
    own = torch.arange(len(x), device=x.device) + rank() * len(x)
    cosines = (x.detach() @ everyone.detach().T).scatter(1, own[:, None], -2.0)
    distances = F.pairwise_distance(x, everyone[cosines.argmax(1)], eps=KOLEO_EPSILON)
    return -(distances + KOLEO_EPSILON).log().mean()
