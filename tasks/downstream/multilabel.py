"""Classification of images that show several classes at once: PASCAL VOC 2007 (NAT, table 4; the denoising auto-encoder, tables 4 and 7)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.collective import shared_count
from firstlight.tasks.downstream.classify import Classify
from firstlight.tasks.downstream.task import Scores
from firstlight.tasks.learner import Batch


class Multilabel(Classify):
    """A sigmoid for each class; what is not known of an image (VOC: all objects of the class are difficult) is neither learned nor counted."""

    target = "present"
    measure = "map"
    by_class = "ap"

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (logits,) = outputs
        present = batch.targets["present"]
        wanted = present * (1 - self.label_smoothing) + self.label_smoothing / 2
        known = present >= 0
        each = F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none")
        return {"loss": (each * known).sum() / shared_count(known, each.dtype)}

    def observe(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits (B, C), and which classes are present (B, C)."""
        return self.mean_logits(batch), batch.targets["present"]

    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        logits, present = (row.detach().cpu() for row in rows)
        both = [average_precisions(logits[:, c], present[:, c]) for c in range(self.classes)]
        exact, eleven = (list(column) for column in zip(*both, strict=True))
        return {"map": mean_known(exact), "map_11point": mean_known(eleven), "ap": exact, "ap_11point": eleven}


def average_precisions(scores: Tensor, present: Tensor) -> tuple[float, float]:
    """(n,) scores of one class, (n,) 1 present, 0 absent, -1 not known -> the area under precision over recall (scikit-learn's), and the mean of
    the best precision at recalls of at least 0, 0.1 .. 1 (VOC 2007, Everingham et al. 2010, section 4.2). NaN where the class is nowhere present.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    known = present >= 0
    truth, known_scores = present[known].numpy(), scores[known].double().numpy()
    if not truth.any():
        return math.nan, math.nan
    precision, recall, _ = precision_recall_curve(truth, known_scores)
    return float(average_precision_score(truth, known_scores)), eleven_point(
        precision[:-1], recall[:-1]
    )  # the last is a precision of 1 at recall 0


def eleven_point(precision: Any, recall: Any) -> float:
    """(n,) precisions and recalls -> the mean over t = 0, 0.1 .. 1 of the best precision at a recall of at least t; 0 where there is none."""
    return sum(float(max(precision[recall >= k / 10 - 1e-9], default=0.0)) for k in range(11)) / 11


def mean_known(values: list[float]) -> float:
    """The mean of what is not NaN; 0 of nothing."""
    known = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    return float(known.mean()) if len(known) else 0.0
