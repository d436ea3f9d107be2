"""Pseudo-labels: which predictions are taken for labels, and the losses on them.

A prediction is taken where its confidence, the largest probability, reaches a threshold. The thresholds are those of

    FixMatch    one number (Sohn et al. 2020, arXiv 2001.07685, eq. 4)
    FlexMatch   one of each class, lower for classes that are learned slowly (Zhang et al. 2021, 2110.08263, section 3)
    FreeMatch   one of each class, by the confidence of all predictions so far (Wang et al. 2023, 2205.07246, section 4)

All are over the images without a label of the global batch. Each threshold is a module, called once in a step by all
workers with (B, C) probabilities, (B,) bool `unlabelled` and the (B,) rows of the images. It returns (B,) bool, True
where a prediction is taken.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.collective import all_sum, mean_count_per_worker
from firstlight.tasks.sample_table import SampleTable
from firstlight.tasks.supervised_loss import mark_classes

# The state of an image in the table of `FlexibleThreshold`: no prediction has reached the threshold; it has a label.
UNSELECTED, LABELLED = -1, -2
# The number that is added to a probability before its logarithm (FreeMatch's code).
LOG_EPSILON = 1e-12

ThresholdMapping = Literal["convex", "linear", "concave"]
# FlexMatch, eq. 12 and section 3.3: from the learning status of a class, 0 to 1, to the share of the threshold.
MAPPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "convex": lambda x: x / (2.0 - x),
    "linear": lambda x: x,
    "concave": lambda x: (x + 1.0).log() / math.log(2.0),
}


class FixedThreshold(nn.Module):
    """A prediction is taken if its confidence is at least `cutoff`."""

    # State per image, by name, which a method adds to its tables.
    tables: Mapping[str, SampleTable] = {}
    # The (C,) thresholds of the last step; None where they are one number.
    class_thresholds: Tensor | None = None

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff

    def forward(self, probabilities: Tensor, unlabelled: Tensor, rows: Tensor) -> Tensor:
        return (probabilities.amax(1) >= self.cutoff) & unlabelled


class FlexibleThreshold(nn.Module):
    """FlexMatch: the threshold of class c is M(beta(c)) times `cutoff` (eqs. 5 to 12).

    The learning status sigma(c) is the number of unlabelled images whose last prediction of a confidence of at least
    `cutoff` was c, and beta(c) is sigma(c) over the largest sigma, or, with `warmup`, over the number of images without
    such a prediction while that is larger (eq. 11). A step reads the states as they were before it. An image with a
    label is one of the unlabelled until its first step.

    Args:
        size: the number of images trained on.
    """

    class_thresholds: Tensor | None = None

    def __init__(self, cutoff: float, classes: int, size: int, warmup: bool, mapping: ThresholdMapping) -> None:
        super().__init__()
        self.cutoff, self.classes, self.warmup, self.mapping = cutoff, classes, warmup, MAPPINGS[mapping]
        self.selected = SampleTable(size, (), torch.int64, lambda rows: torch.full_like(rows, UNSELECTED))
        self.tables: Mapping[str, SampleTable] = {"selected": self.selected}

    def forward(self, probabilities: Tensor, unlabelled: Tensor, rows: Tensor) -> Tensor:
        confidence, classes = probabilities.max(1)
        thresholds = self.cutoff * self.mapping(self.measure_learning().to(confidence.dtype))
        self.class_thresholds = thresholds
        held = torch.where(confidence >= self.cutoff, classes, self.selected.read(rows))
        self.selected.write(rows, torch.where(unlabelled, held, LABELLED))
        return (confidence >= thresholds[classes]) & unlabelled

    def measure_learning(self) -> Tensor:
        """Returns beta of each class, (C,) float64. It is collective."""
        # `bincount` would look for the largest value first, for which a GPU waits.
        held = self.selected.values
        bins = torch.zeros(self.classes + 2, dtype=torch.int64, device=held.device)
        counts = all_sum(bins.index_add_(0, held - LABELLED, torch.ones_like(held))).double()
        unselected, sigma = counts[1], counts[2:]
        largest = torch.maximum(sigma.max(), unselected) if self.warmup else sigma.max()
        return sigma / largest.clamp_min(1.0)


class FreeThreshold(nn.Module):
    """FreeMatch: the threshold of class c is MaxNorm(p)(c) times tau (eqs. 5 to 8).

    tau, `level`, is a moving average of the mean confidence of unlabelled images, and p, `expected`, of their mean
    probabilities. Both begin with 1 / C, and take in the predictions of a step before these are judged. `histogram` is
    the same average of the shares of classes that they predict, for `fairness_loss`.
    """

    level: Tensor
    expected: Tensor
    histogram: Tensor
    tables: Mapping[str, SampleTable] = {}
    class_thresholds: Tensor | None = None

    def __init__(self, momentum: float, classes: int) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("level", torch.full((1,), 1.0 / classes))
        self.register_buffer("expected", torch.full((classes,), 1.0 / classes))
        self.register_buffer("histogram", torch.full((classes,), 1.0 / classes))

    @torch.no_grad()
    def forward(self, probabilities: Tensor, unlabelled: Tensor, rows: Tensor) -> Tensor:
        confidence, classes = probabilities.max(1)
        one_hot = mark_classes(classes, probabilities.shape[1]).to(probabilities.dtype)
        facts = torch.cat((confidence[:, None], probabilities, one_hot), 1) * unlabelled[:, None]
        count = all_sum(unlabelled.sum())
        sizes = (1, probabilities.shape[1], probabilities.shape[1])
        means = (all_sum(facts.sum(0)) / count.clamp_min(1)).split(sizes)
        for average, mean in zip((self.level, self.expected, self.histogram), means, strict=True):
            # A batch without unlabelled images says nothing.
            average.copy_(torch.where(count > 0, average.lerp(mean.to(average.dtype), 1.0 - self.momentum), average))
        self.class_thresholds = self.level * self.expected / self.expected.max()
        return (confidence >= self.class_thresholds[classes]) & unlabelled


def consistency_loss(strong: Tensor, targets: Tensor, taken: Tensor, unlabelled: Tensor) -> Tensor:
    """Returns the cross-entropy of predictions to the pseudo-labels that are taken, over all unlabelled images.

    1 / (mu B) sum over unlabelled b of 1(taken) H(q_b, p(strong view of b)) (FixMatch, eq. 4). It is this worker's
    part: averaged over workers it is that of the global batch.

    Args:
        strong: (B, C) logits in float32 or wider.
        targets: (B,) int64 pseudo-labels.
        taken: (B,) bool, true of unlabelled images only.
        unlabelled: (B,) bool.
    """
    losses = F.cross_entropy(strong, targets, reduction="none")
    return (losses * taken).sum() / mean_count_per_worker(unlabelled, losses.dtype)


def fairness_loss(strong: Tensor, taken: Tensor, expected: Tensor, histogram: Tensor) -> Tensor:
    """Returns FreeMatch's self-adaptive fairness (eqs. 9 to 11), the same on all workers.

    -H(SumNorm(p / h), SumNorm(q / g)) = sum over classes of the first times the logarithm of the second. p and h are
    the moving averages `expected` and `histogram`, q the mean probabilities of the strong views whose pseudo-labels are
    taken, and g the shares of the classes that these predict. A class that none of them is predicted as counts as 0 in
    the second (code). 0 if none is taken.

    Args:
        strong: (B, C) logits in float32 or wider.
        taken: (B,) bool.
    """
    q = strong.softmax(1)
    counts = all_sum((mark_classes(q.argmax(1), q.shape[1]) & taken[:, None]).sum(0))
    sums = all_sum((q * taken[:, None]).sum(0))
    modulated = torch.where(counts > 0, sums / counts.clamp_min(1), 0.0)
    is_empty = counts.sum() == 0
    found = modulated / torch.where(is_empty, 1.0, modulated.sum())
    goal = expected / histogram
    goal = (goal / goal.sum()).to(found.dtype)
    loss = (goal * (found + LOG_EPSILON).log()).sum()
    return torch.where(is_empty, torch.zeros_like(loss), loss)


@torch.no_grad()
def measure_pseudo_labels(
    targets: Tensor, taken: Tensor, unlabelled: Tensor, truth: Tensor | None, classes: int
) -> dict[str, Tensor]:
    """Returns what is logged of pseudo-labels: this worker's parts, whose averages are those of the global batch.

    `mask` is the share of the unlabelled images whose pseudo-label is taken, `classes_used` the number of the `classes`
    classes among the taken ones, and, where the truth is known, `pseudo_accuracy` the share of the taken ones that are
    right. It is 0 if none is taken.

    Args:
        targets: (B,) int64 pseudo-labels.
        taken: (B,) bool.
        unlabelled: (B,) bool.
        truth: (B,) int64 labels, -1 where unknown.
    """
    images = all_sum((mark_classes(targets, classes) & taken[:, None]).sum(0))
    found = {
        "mask": taken.sum() / mean_count_per_worker(unlabelled, torch.float32),
        "classes_used": (images > 0).sum().float(),
    }
    if truth is not None:
        known = taken & (truth >= 0)
        found["pseudo_accuracy"] = ((targets == truth) & known).sum() / mean_count_per_worker(known, torch.float32)
    return found
