"""Classification of images that show several classes at once.

The papers use it for PASCAL VOC 2007 (NAT, table 4; the denoising auto-encoder, tables 4 and 7).
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.collective import mean_count_per_worker
from firstlight.tasks.downstream.classify import Classification, Hidden, ShareBelowOne
from firstlight.tasks.downstream.task import LayerDecay, Scores, TrainedPart
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, MapPooling
from firstlight.tasks.nn.heads import DropoutLayers, HeadNorm
from firstlight.tasks.nn.weight_init import Init


class MultilabelClassification(Classification):
    """Classification of images into any number of classes, with a sigmoid for each class.

    Unknown labels (in VOC: all objects of the class are difficult) are neither learned nor counted.

    `reduction`: how the binary cross-entropies of the known labels become one loss: `mean` over the labels of the
    batch, or `sum` over the classes, divided by the number of images, as in voc-classification (train_cls.py) and
    eval_voc_classif.py of DeepCluster. With 20 classes `sum` and its gradient are about 20 times as large.
    `init`: the initialisation of the head's weights (`gaussian` in both papers).
    """

    target = "present"
    measure = "map"
    by_class = "ap"

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        train: TrainedPart = "all",
        layer: int = -1,
        layer_decay: LayerDecay = 1.0,
        hidden: Hidden = (),
        dropout: ShareBelowOne = 0.0,
        dropout_layers: DropoutLayers = "first",
        pool: MapPooling = "avg",
        norm: HeadNorm = "batch",
        label_smoothing: ShareBelowOne = 0.0,
        init: Init = "default",
        bias: float | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(
            encoder,
            classes,
            train=train,
            layer=layer,
            layer_decay=layer_decay,
            hidden=hidden,
            dropout=dropout,
            dropout_layers=dropout_layers,
            pool=pool,
            norm=norm,
            label_smoothing=label_smoothing,
            init=init,
            bias=bias,
        )
        self.reduction = reduction

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Returns the binary cross-entropy of the known labels of the global batch, reduced as `reduction` says."""
        (logits,) = outputs
        present = batch.targets["present"]
        wanted = present.to(logits.dtype) * (1 - self.label_smoothing) + self.label_smoothing / 2
        known = present >= 0
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        # Every worker has equally many images, but not equally many known labels.
        count = len(present) if self.reduction == "sum" else mean_count_per_worker(known, each.dtype)
        return {"loss": (each * known).sum() / count}

    def compute_probabilities(self, logits: Tensor) -> Tensor:
        """Returns the (B, classes) probability of each class to be present."""
        return logits.sigmoid()

    def observe(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the (B, C) logits, and the (B, C) classes that are present."""
        return self.mean_logits(batch), batch.targets["present"]

    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        """Returns mean average precision, and the average precision of each class, by both definitions."""
        logits, present = (row.detach().cpu() for row in rows)
        both = [label_average_precisions(logits[:, c], present[:, c]) for c in range(self.classes)]
        exact, eleven = (list(column) for column in zip(*both, strict=True))
        return {
            "map": mean_without_nan(exact),
            "map_11point": mean_without_nan(eleven),
            "ap": exact,
            "ap_11point": eleven,
        }


def label_average_precisions(scores: Tensor, present: Tensor) -> tuple[float, float]:
    """Returns two average precisions of one class; NaN if the class is nowhere present, or everywhere.

    In the second case any order of the images would have a precision of 1.

    They are the area under precision over recall (scikit-learn's), and the mean of the best precision at recalls of at
    least 0, 0.1 .. 1 (VOC 2007, Everingham et al. 2010, section 4.2).

    Args:
        scores: (n,).
        present: (n,); 1 is present, 0 absent, -1 unknown.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    known = present >= 0
    truth, known_scores = present[known].numpy(), scores[known].double().numpy()
    if not truth.any() or truth.all():
        return math.nan, math.nan
    precision, recall, _ = precision_recall_curve(truth, known_scores)
    # The last element is a precision of 1 at recall 0.
    eleven_points = eleven_point_precision(precision[:-1], recall[:-1])
    return float(average_precision_score(truth, known_scores)), eleven_points


def eleven_point_precision(precision: Any, recall: Any) -> float:
    """Returns the mean over t = 0, 0.1 .. 1 of the best precision at a recall of at least t; 0 if no recall reaches t.

    Both arguments are (n,).
    """
    return sum(float(max(precision[recall >= k / 10 - 1e-9], default=0.0)) for k in range(11)) / 11


def mean_without_nan(values: list[float]) -> float:
    """Returns the mean of the values that are not NaN; NaN if there are none."""
    known = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    return float(known.mean()) if len(known) else math.nan
