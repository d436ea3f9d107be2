"""Classification by a square loss: outputs on the unit sphere, drawn to the basis vector of their class (NAT, table 1, after Tygert et al. 2017)."""

import torch.nn.functional as F
from torch import Tensor

from firstlight.tasks.downstream.classify import Classify
from firstlight.tasks.learner import Batch


def square_loss(outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """(B, C) outputs on the unit sphere, (B,) labels -> 1/(2B) || outputs - Y ||^2, the rows of Y the basis vectors of the labels (NAT, eq. 2);
    `smoothing` of each goes in equal parts to all classes.
    """
    wanted = F.one_hot(labels, outputs.shape[1]).to(outputs.dtype) * (1 - smoothing) + smoothing / outputs.shape[1]
    return (outputs - wanted).square().sum(1).mean() / 2


class ClassifySquare(Classify):
    """As `Classify`, with the loss of Noise As Targets in the place of the softmax's. The paper does not say which vectors stand for the classes of
    ImageNet; these are those of its section 4.1.
    """

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes), on the unit sphere."""
        return F.normalize(super().logits(images), dim=1)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (cosines,) = outputs
        accuracy = (cosines.argmax(1) == batch.labels).float().mean()
        return {"loss": square_loss(cosines, batch.labels, self.label_smoothing), "accuracy": accuracy}
