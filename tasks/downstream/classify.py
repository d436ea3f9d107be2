"""Classification on top of an encoder: fine-tuned as a whole, or a head on frozen features (NAT, section 4: an MLP on the last convolution)."""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor

from firstlight.tasks.downstream.task import Decay, Scores, Target, Task, Train, in_full
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, pooled
from firstlight.tasks.nn.heads import mlp
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.nn.weight_init import Init, initialize

Hidden = tuple[Annotated[int, Ge(1)], ...]
Share = Annotated[float, Ge(0.0), Lt(1.0)]


class Classify(Task):
    """`layer`: the feature map that the head stands on, -1 the deepest. `hidden: ()` is a linear head. `init`: of the head's weights."""

    target: ClassVar[Target] = "label"
    measure: ClassVar[str] = "accuracy"

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        train: Train = "all",
        layer: int = -1,
        layer_decay: Decay = 1.0,
        hidden: Hidden = (),
        dropout: Share = 0.0,
        pool: Literal["avg", "flatten"] = "avg",
        norm: Norm = "batch",
        label_smoothing: Share = 0.0,
        init: Init = "default",
    ) -> None:
        super().__init__(encoder, classes, train=train, layer=layer, layer_decay=layer_decay)
        self.pool, self.label_smoothing = pool, label_smoothing
        c, h, w = encoder.shapes[self.layer]
        self.head = mlp(c if pool == "avg" else c * h * w, hidden, classes, dropout=dropout, norm=norm)
        initialize(self.head, init)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        return in_full(self.head(pooled(self.encoder(images, depth=self.layer + 1), self.pool)))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.logits(batch.views[0]),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (logits,) = outputs
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == batch.labels).float().mean()}

    def mean_logits(self, batch: Batch) -> Tensor:
        """(B, classes), averaged over the views: ten crops of an image have one answer (Krizhevsky et al. 2012; NAT's code sums them)."""
        return torch.stack([self.logits(view) for view in batch.views]).mean(0)

    def observe(self, batch: Batch) -> tuple[Tensor, ...]:
        """The predicted classes, the true ones, and how many classes stand before the true one."""
        logits = self.mean_logits(batch)
        return logits.argmax(1), batch.labels, (logits > logits.gather(1, batch.labels[:, None])).sum(1)

    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        predicted, labels, place = rows
        scores = {"accuracy": float((predicted == labels).double().mean())}
        return scores | ({"top5": float((place < 5).double().mean())} if self.classes > 5 else {})
