"""Classification on top of an encoder: fine-tuned as a whole, or a head on frozen features (NAT, section 4: an MLP on the last convolution)."""

from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor

from tasks.downstream.task import Task
from tasks.encoders import Encoder, pooled, pooled_size
from tasks.heads import mlp
from tasks.learner import Batch
from tasks.norms import Norm


class Classify(Task):
    """`train: head` freezes the encoder, its batch statistics included. `hidden: ()` is a linear head."""

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        train: Literal["all", "head"] = "all",
        hidden: tuple[Annotated[int, Ge(1)], ...] = (),
        dropout: Annotated[float, Ge(0.0), Lt(1.0)] = 0.0,
        pool: Literal["avg", "flatten"] = "avg",
        norm: Norm = "batch",
        label_smoothing: Annotated[float, Ge(0.0), Lt(1.0)] = 0.0,
    ) -> None:
        super().__init__(encoder, classes)
        self.pool, self.frozen, self.label_smoothing = pool, train == "head", label_smoothing
        self.head = mlp(pooled_size(encoder, pool), hidden, classes, dropout=dropout, norm=norm)
        if self.frozen:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "Classify":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        return self.head(pooled(self.encoder(images), self.pool)).float()  # type: ignore[no-any-return]

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.logits(batch.views[0]),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (logits,) = outputs
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == batch.labels).float().mean()}

    def predict(self, images: Tensor) -> Tensor:
        return self.logits(images).argmax(1)
