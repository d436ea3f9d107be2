"""Classification by a square loss: unit outputs are pulled to the basis vector of their class.

NAT uses it in table 1, after Tygert et al. 2017.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.downstream.classify import Classification
from firstlight.tasks.learner import Batch
from firstlight.tasks.supervised_loss import mark_classes


def label_square_loss(outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns 1/(2B) || outputs - Y ||^2, the rows of Y being the basis vectors of the labels (NAT, eq. 2).

    Args:
        outputs: (B, C) unit vectors.
        labels: (B,).
        smoothing: the share of each row of Y that goes in equal parts to all classes.
    """
    wanted = mark_classes(labels, outputs.shape[1]).to(outputs.dtype) * (1 - smoothing) + smoothing / outputs.shape[1]
    return (outputs - wanted).square().sum(1).mean() / 2


class SquareLossClassification(Classification):
    """The task `classify` with the square loss of Noise As Targets instead of the cross-entropy.

    The paper does not say which vectors stand for the classes of ImageNet; these are those of its section 4.1.
    """

    def compute_logits(self, images: Tensor) -> Tensor:
        """Returns the (B, classes) outputs of (B, 3, H, W) images, on the unit sphere."""
        return F.normalize(super().compute_logits(images), dim=1)

    def compute_probabilities(self, logits: Tensor) -> Tensor:
        """Returns the (B, classes) outputs above 0, divided by their sum.

        The outputs that minimise the square loss are the probabilities of the classes. Where none is above 0, the class
        of the largest output has all.
        """
        positive = logits.clamp_min(0)
        largest = mark_classes(logits.argmax(1), logits.shape[1]).to(logits.dtype)
        chosen = torch.where((positive > 0).any(1, keepdim=True), positive, largest)
        return chosen / chosen.sum(1, keepdim=True)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (cosines,) = outputs
        accuracy = (cosines.argmax(1) == batch.labels).float().mean()
        return {"loss": label_square_loss(cosines, batch.labels, self.label_smoothing), "accuracy": accuracy}
