"""Classification on an encoder: fine-tuned as a whole, or a head on frozen features.

NAT (section 4) trains an MLP on the last convolution.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from firstlight.tasks.downstream.task import LayerDecay, Scores, TargetKind, Task, TrainedPart, at_least_float32
from firstlight.tasks.downstream.whole_images import ImageViews
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, MapPooling, pool_maps, pooled_size
from firstlight.tasks.nn.heads import DropoutLayers, HeadNorm, build_mlp
from firstlight.tasks.nn.weight_init import Init, initialize_weights, set_biases

Hidden = tuple[Annotated[int, Ge(1)], ...]
ShareBelowOne = Annotated[float, Ge(0.0), Lt(1.0)]


class Classification(Task):
    """Classification of images into one class each, by cross-entropy.

    `layer`: the index of the feature map that is classified; -1 is the deepest.
    `hidden`: the widths of the head's hidden layers; `()` is a linear head.
    `pool`: the vector of a map: `avg` its mean over positions, `flatten` all its values, `cls` the class token of a
    ViT, `cls_avg` the class token and the mean.
    `dropout`: the probability of dropout after the hidden layers that `dropout_layers` names.
    `dropout_layers`: the hidden layers that dropout follows: `first` as in NAT's code, or `all` as in AlexNet
    (Krizhevsky et al. 2012) and VGG.
    `norm`: the normalisation after each hidden layer: `batch` over each worker's images, as in NAT's code, `sync` over
    the images of all workers, `group`, or `none`, as in AlexNet and VGG.
    `init`: the initialisation of the head's weights.
    `bias`: the first biases of the head (0.1 in voc-classification, train_cls.py); None leaves them as `init` draws
    them.
    """

    target: ClassVar[TargetKind] = "label"
    measure: ClassVar[str] = "accuracy"

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
    ) -> None:
        super().__init__(encoder, classes, train=train, layer=layer, layer_decay=layer_decay)
        self.pool, self.label_smoothing = pool, label_smoothing
        self.head = build_mlp(
            pooled_size(encoder, pool, self.layer),
            hidden,
            classes,
            dropout=dropout,
            norm=norm,
            dropout_layers=dropout_layers,
        )
        initialize_weights(self.head, init)
        set_biases(self.head, bias)

    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.head[-1],)

    def compute_logits(self, images: Tensor) -> Tensor:
        """Returns the (B, classes) logits of (B, 3, H, W) images."""
        return at_least_float32(self.head(pool_maps(self.encoder(images, depth=self.layer + 1), self.pool)))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.compute_logits(batch.views[0]),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (logits,) = outputs
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == batch.labels).float().mean()}

    def mean_logits(self, batch: Batch) -> Tensor:
        """Returns the (B, classes) logits of a batch, averaged over its views."""
        return self.average_logits(batch.views)

    def average_logits(self, views: Sequence[Tensor]) -> Tensor:
        """Returns the (B, classes) logits, averaged over the views, each (B, 3, H, W).

        Ten crops of an image have one answer (Krizhevsky et al. 2012); NAT's code sums them.
        """
        return torch.stack([self.compute_logits(view) for view in views]).mean(0)

    def compute_probabilities(self, logits: Tensor) -> Tensor:
        """Returns the (B, classes) probabilities of the classes, of which an image has one."""
        return logits.softmax(1)

    def predict_images(self, images: Sequence[ImageViews]) -> list[dict[str, Tensor]]:
        """Returns the (classes,) `probabilities` of each image."""
        views = torch.stack([image.views for image in images], 1)
        probabilities = self.compute_probabilities(self.average_logits(views.unbind()))
        return [{"probabilities": row} for row in probabilities]

    def observe(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the predicted classes, the true ones, and the numbers of classes with a logit above the true one."""
        logits = self.mean_logits(batch)
        return logits.argmax(1), batch.labels, (logits > logits.gather(1, batch.labels[:, None])).sum(1)

    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        predicted, labels, num_above = rows
        scores = {"accuracy": float((predicted == labels).double().mean())}
        return scores | ({"top5": float((num_above < 5).double().mean())} if self.classes > 5 else {})
