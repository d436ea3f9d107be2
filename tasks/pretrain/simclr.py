"""SimCLR (Chen et al. 2020, arXiv 2002.05709), with decoupled contrastive learning (Yeh et al. 2021, arXiv 2110.06848).

Two views of an image should be nearer to each other than to the views of other images. With z_1 .. z_2N the projections
of the two views of N images, on the unit sphere, and j(i) the other view of the image of i:

    L = -1/(2N) sum_i log  exp(z_i.z_j(i) / tau)  /  sum_{k != i} exp(z_i.z_k / tau)                       (eq. 1)

which is named NT-Xent. Every view is an anchor once: both directions are in the sum. The batch is that of all workers.
With `decoupled` the sum over k is without the positive k = j(i), too (2110.06848, eq. 6): small batches then have a
gradient where the positive is near already.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from firstlight.tasks.collective import gather_over_workers, rank
from firstlight.tasks.joint_embedding.pair_ops import SIMCLR_BLUR, compose_pair_ops
from firstlight.tasks.joint_embedding.projector import Projector, ProjectorPooling, choose_pooling
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo, ViewGroup
from firstlight.tasks.self_distillation.view_embedding import embed_views

# The colour jitter of strength 1 on images of at least LARGE_JITTER_SIDE pixels (appendix A), and of strength 0.5 on
# smaller ones (appendix B.9).
SIMCLR_JITTER: dict[str, float] = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
LARGE_JITTER_SIDE = 64


def contrast_views(first: Tensor, second: Tensor, temperature: float, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Returns the mean of eq. 1's terms, and the share of views whose nearest view is the other one of their image.

    Both are over this worker's views, which are contrasted with those of all workers.

    Args:
        first: (B, d) unit vectors of the first views of this worker's images.
        second: (B, d) unit vectors of their second views.
        temperature: the temperature tau.
        decoupled: True leaves the positive out of the sum.
    """
    everyone = gather_over_workers(torch.stack((first, second), 1))
    logits = torch.cat((first, second)) @ everyone.transpose(0, 1).flatten(0, 1).T / temperature
    image = torch.arange(len(first), device=first.device) + rank() * len(first)
    itself = torch.cat((image, image + len(everyone)))[:, None]
    positive = torch.cat((image + len(everyone), image))[:, None]
    near = logits.gather(1, positive)[:, 0]
    logits = logits.scatter(1, itself, -torch.inf)
    hits = (logits.argmax(1) == positive[:, 0]).float().mean()
    if decoupled:
        logits = logits.scatter(1, positive, -torch.inf)
    return (logits.logsumexp(1) - near).mean(), hits


class SimClr(Method):
    """The method with its projector. The encoder's features, not the projections, are handed on.

    Views of one size pass the networks as one batch, as in the authors' code.

    `dim`: the dimension of the projections (128 in section 2.3).
    `hidden`: the widths of the projector's hidden layers. null: one layer as wide as the features (sections 2.1 and
    2.3).
    `norm`: the normalisation of the projector's layers (`batch` in the authors' code); `sync` is for several workers.
    `last_norm`: true normalises the projections, too, before they are brought to length 1 (authors' code).
    `temperature`: the temperature tau of the softmax (eq. 1): 0.5 is best on CIFAR-10 (appendix B.9), 0.1 on ImageNet
    (section 5.1).
    `decoupled`: true leaves the positive pair out of the sum (decoupled contrastive learning, arXiv 2110.06848, eq. 6).
    `pool`: the pooling of the feature map. null: `cls` if the encoder has a class token, otherwise `avg`.
    """

    title: ClassVar[str] = "SimCLR (decoupled contrastive learning is a setting of it)"
    paper: ClassVar[str] = (
        "Chen et al. 2020, A simple framework for contrastive learning of visual representations, "
        "https://arxiv.org/abs/2002.05709; decoupled: Yeh et al. 2021, https://arxiv.org/abs/2110.06848"
    )
    keeps_crops: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "The paper's formula has no normalisation in the projector; as in the authors' code, it has one after each "
        "layer (`last_norm: false`: after the hidden layers only).",
        "Where a recipe gives no views, crops are those of the data set's augmentations; in the paper they cover 0.08 "
        "to 1 of the area.",
        "Batch normalisation has the statistics of a worker with `norm: batch`, and of all workers, as in the paper, "
        "with `norm: sync`.",
        "The decoupled loss is without the weights of pairs (DCLW) of its paper.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        dim: Annotated[int, Ge(2)] = 128,
        hidden: tuple[Annotated[int, Ge(1)], ...] | None = None,
        norm: Norm = "batch",
        last_norm: bool = True,
        temperature: Annotated[float, Gt(0.0)] = 0.5,
        decoupled: bool = False,
        pool: ProjectorPooling | None = None,
    ) -> None:
        super().__init__(encoder, info)
        self.temperature, self.decoupled = temperature, decoupled
        self.pool = choose_pooling(encoder, pool)
        size = pooled_size(encoder, self.pool)
        widths = (size,) if hidden is None else hidden
        self.projector = Projector(size, widths, dim, norm=norm, last_norm=last_norm)

    @classmethod
    def requirements(cls, parameters: Mapping[str, Any]) -> BatchRequirements:
        return BatchRequirements(views=2)

    @classmethod
    def default_views(
        cls, augment: tuple[Mapping[str, Any], ...], image_size: int, parameters: Mapping[str, Any]
    ) -> tuple[ViewGroup, ...]:
        """Adds the paper's jitter, grey images and blur to `augment`, where it lacks them."""
        strength = 1.0 if image_size >= LARGE_JITTER_SIDE else 0.5
        jitter = {name: strength * value for name, value in SIMCLR_JITTER.items()}
        ops, _ = compose_pair_ops(augment, image_size, jitter, SIMCLR_BLUR)
        return (ViewGroup(2, image_size, ops),)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns (B, dim) projections on the unit sphere for each of the two views."""
        views = embed_views(self.encoder, batch.views[:2], self.pool)
        projected = self.projector(torch.cat([view.pooled for view in views]))
        return F.normalize(projected, dim=1).chunk(2)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(outputs[0].device.type, enabled=False):
            loss, hits = contrast_views(outputs[0], outputs[1], self.temperature, self.decoupled)
        return {"loss": loss, "accuracy": hits}
