"""Losses on the relations of embeddings to a memory bank (Super-AND, eqs. 2, 10, 13 and 14)."""

from typing import Literal

import torch
from torch import Tensor

from firstlight.tasks.collective import gather_over_workers, rank
from firstlight.tasks.supervised_loss import mark_classes

SuperAndVariant = Literal["paper", "reference"]
# The logit of the image itself in eq. 11 in the authors' code, which does not leave it out.
REFERENCE_OWN_LOGIT = -10.0


def neighbourhood_loss(others: Tensor, own: Tensor, near: Tensor, selected: Tensor, variant: SuperAndVariant) -> Tensor:
    """Returns the mean of eq. 10.

    Args:
        others: (R,) log sum_j exp(logit_j) over j != i.
        own: (R,) logits of i.
        near: (R,) logits of i's neighbour.
        selected: (R,) bool, true if the neighbour counts.
        variant: in the paper a selected image is of its neighbour's class, which eq. 7 says is not its own; in the
            reference it is of its own or its neighbour's class.
    """
    together = near if variant == "paper" else torch.logaddexp(own, near)
    return (torch.logaddexp(others, own) - torch.where(selected, together, own)).mean()


def relation_cosines(left: Tensor, right: Tensor, gram: Tensor) -> Tensor:
    """Returns the (a, b) cosines of the relations of (a, d) and (b, d) embeddings to the bank (eq. 2).

    `gram` is the (d, d) Gram matrix of the bank.
    """

    def length(v: Tensor) -> Tensor:
        return (v @ gram * v).sum(1).clamp_min(1e-30).sqrt()

    return left @ gram @ right.T / (length(left)[:, None] * length(right))


def log_complement(log_p: Tensor) -> Tensor:
    """Returns log(1 - p), which is finite for p = 1."""
    return torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))


def paper_augmentation_loss(across: Tensor, among: Tensor, own: Tensor, temperature: float) -> Tensor:
    """Returns the mean of eqs. 13 and 14 over this worker's b images.

    Args:
        across: (b, B) cos(r^_i, r_k) of the B images k of the global batch.
        among: (b, B) cos(r_i, r_k).
        own: (b,) the column of image i.
    """
    itself = mark_classes(own, across.shape[1])
    found = (across / temperature).log_softmax(1).gather(1, own[:, None])[:, 0]
    mistaken = log_complement((among / temperature).log_softmax(1)).masked_fill(itself, 0.0)
    return -(found + mistaken.sum(1)).mean()


def reference_augmentation_loss(cosines: Tensor, own: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Returns the augmentation loss of the authors' code, the mean over this worker's 2b relations x_i of both views.

    Z_i leaves out k = i. The second factor is a constant, which the caller detaches.

    Args:
        cosines: (2b, 2B) x_i.x_k over all 2B relations.
        own: (2b,) the columns of x_i.
        positive: (2b,) the columns of the other view.
    """
    itself, other = (mark_classes(column, cosines.shape[1]) for column in (own, positive))
    log_p = (cosines / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    mistaken = log_complement(log_p.masked_fill(itself, -1.0)).masked_fill(itself | other, 0.0)
    return -(log_p.gather(1, positive[:, None])[:, 0] + mistaken.sum(1)).mean()


def augmentation_loss(
    first: Tensor, second: Tensor, gram: Tensor, temperature: float, variant: SuperAndVariant
) -> Tensor:
    """Returns the augmentation loss of this worker's images over the images of all workers. It is collective.

    Args:
        first: (b, d) embeddings of the first view.
        second: (b, d) embeddings of the second view.
        gram: (d, d) Gram matrix of the bank. The loss has its type.
    """
    first, second = first.to(gram.dtype), second.to(gram.dtype)
    column = torch.arange(len(first), device=first.device) + rank() * len(first)
    if variant == "paper":
        everyone = gather_over_workers(first)
        across, among = (relation_cosines(view, everyone, gram) for view in (second, first))
        return paper_augmentation_loss(across, among, column, temperature)
    everyone = torch.cat((gather_over_workers(first.detach()), gather_over_workers(second.detach())))
    other_column = column + len(everyone) // 2
    cosines = relation_cosines(torch.cat((first, second)), everyone, gram)
    return reference_augmentation_loss(
        cosines, torch.cat((column, other_column)), torch.cat((other_column, column)), temperature
    )
