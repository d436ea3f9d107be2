"""Accuracies of frozen features by weighted kNN, also over a memory bank, and by a linear probe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from firstlight.tasks.downstream.knn import KnnSimilarity, class_scores, is_label_in_top
from firstlight.tasks.downstream.probe import choose_probe
from firstlight.tasks.feature_metrics import compute_feature_metrics

LabelledFeatures = tuple[Tensor, Tensor]  # (n, d) features, (n,) labels
# The splits that features are scored on, in their order.
SCORED_SPLITS = ("val", "test")
# The top-k accuracy that is reported as well, where there are more classes.
TOP_K = 5


@dataclass(frozen=True)
class ScoringOptions:
    """The options of kNN and probe, and the number of classes."""

    knn_k: int
    knn_temperature: float
    probe_weight_decays: tuple[float, ...]
    classes: int


def score_features(sets: Sequence[LabelledFeatures], options: ScoringOptions) -> dict[str, Any]:
    """Computes the accuracies of (training, held-out, test) features, with metrics and confusion matrix of the last
    set. The test features may be left out.
    """
    train, *held_out_sets = sets
    scored_sets = dict(zip(SCORED_SPLITS, held_out_sets, strict=False))
    last, (shown, known) = list(scored_sets.items())[-1]
    probe, decay = choose_probe(train, scored_sets["val"], options.classes, options.probe_weight_decays)
    logits = {part: (probe.compute_scores(x), y) for part, (x, y) in scored_sets.items()}
    predicted = logits[last][0].argmax(1)
    confusion = torch.zeros(options.classes, options.classes, dtype=torch.int64)
    confusion.index_put_((known.cpu(), predicted.cpu()), torch.ones(len(predicted), dtype=torch.int64), accumulate=True)
    return {
        "knn": _score_neighbours(train, scored_sets, options, "cosine"),
        "probe": {**_compute_accuracies(logits), "weight_decay": decay},
        "confusion": confusion.tolist(),
        "signals": {"dimensions": shown.shape[1], **compute_feature_metrics(shown)},
    }


def score_bank(bank: LabelledFeatures, sets: Sequence[LabelledFeatures], options: ScoringOptions) -> dict[str, float]:
    """Computes the accuracies of kNN over the rows of a memory bank M: its weights are exp(v.M / tau) (Wu et al. 2018,
    section 3.4; Super-AND, section 4.1).

    Args:
        sets: (held-out, test) features. The test features may be left out.
    """
    return _score_neighbours(bank, dict(zip(SCORED_SPLITS, sets, strict=False)), options, "product")


def _score_neighbours(
    gallery: LabelledFeatures,
    scored: Mapping[str, LabelledFeatures],
    options: ScoringOptions,
    similarity: KnnSimilarity,
) -> dict[str, float]:
    votes = {}
    for part, (features, labels) in scored.items():
        scores = class_scores(
            features,
            *gallery,
            k=options.knn_k,
            temperature=options.knn_temperature,
            classes=options.classes,
            similarity=similarity,
        )
        votes[part] = (scores, labels)
    return _compute_accuracies(votes)


def _compute_accuracies(scored: Mapping[str, LabelledFeatures]) -> dict[str, float]:
    """Returns the shares of images whose label has the highest score, or one of the five highest, by split.

    `scored`: (n, classes) scores and (n,) labels, by split.
    """
    found = {
        part: float(is_label_in_top(scores, labels, 1).double().mean()) for part, (scores, labels) in scored.items()
    }
    if scored["val"][0].shape[1] > TOP_K:
        found |= {
            f"{part}_top{TOP_K}": float(is_label_in_top(scores, labels, TOP_K).double().mean())
            for part, (scores, labels) in scored.items()
        }
    return found
