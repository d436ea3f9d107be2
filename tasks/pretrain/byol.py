"""BYOL, Bootstrap Your Own Latent (Grill et al. 2020, arXiv 2006.07733).

An online network predicts what a target network, whose weights follow it, makes of another view of the image. With the
online prediction q = q(g(f(v))) of a view v, the target's projection z' = g'(f'(v')) of the other, both of length 1:

    L = || q(v) - z'(v') ||^2 + || q(v') - z'(v) ||^2  =  4 - 2 q(v).z'(v') - 2 q(v').z'(v)          (eq. 2)

No gradient reaches the target: after each step its weights are momentum * own + (1 - momentum) * the online network's,
and the momentum rises to 1 by a cosine (section 3.3). Nothing is contrasted with other images.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from firstlight.tasks.collective import gather_over_workers
from firstlight.tasks.joint_embedding.pair_ops import compose_byol_ops
from firstlight.tasks.joint_embedding.projector import Projector, ProjectorPooling, choose_pooling
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.feature_maps import pool_maps
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo, ViewGroup
from firstlight.tasks.teacher import Teacher, raise_momentum


def regress_views(predictions: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the mean over images of the symmetric loss of (B, d) predictions and targets, both of any length.

    Each is of the first view and of the second. A prediction is compared with the target of the other view.
    """
    first, second = (F.cosine_similarity(predictions[k], targets[1 - k], dim=1) for k in (0, 1))
    return (4.0 - 2.0 * first - 2.0 * second).mean()


@torch.no_grad()
def measure_spread(projections: Tensor) -> Tensor:
    """Returns how far (B, d) projections are spread over the sphere, over the images of all workers.

    It is the mean over dimensions of the standard deviation of the unit vectors, times sqrt(d): 1 for directions that
    are uniform, 0 if all images have one projection (Chen and He 2021, SimSiam, section 4.1).
    """
    everyone = gather_over_workers(F.normalize(projections.detach(), dim=1))
    return everyone.std(0, correction=0).mean() * math.sqrt(everyone.shape[1])


class Byol(Method):
    """The method with an online network, of encoder, projector and predictor, and a target of encoder and projector.

    The views pass the networks one after the other, as in the authors' code: each has batch statistics of its own.

    `dim`: the dimension of the projections (256 in section 3.3).
    `hidden`: the widths of the hidden layers of projector and predictor (one of 4096 in section 3.3).
    `norm`: the normalisation of these layers (`batch` in section 3.3); `sync` is for several workers.
    `momentum`: the momentum of the target's weights in the first step (0.996 in section 3.3; 0.99 in trainings of 300
    epochs and less, by the appendix, and on CIFAR-10, in lightly).
    `momentum_end`: the momentum that the target's weights approach by a cosine (1 in section 3.3).
    `exported`: the encoder that later stages receive: of the `online` network (section 3.1), or of the `target`.
    `pool`: the pooling of the feature map. null: `cls` if the encoder has a class token, otherwise `avg`.
    """

    title: ClassVar[str] = "BYOL"
    paper: ClassVar[str] = (
        "Grill et al. 2020, Bootstrap your own latent: a new approach to self-supervised learning, "
        "https://arxiv.org/abs/2006.07733"
    )
    keeps_crops: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "Where a recipe gives no views, crops are those of the data set's augmentations (in the paper 0.08 to 1 of the "
        "area), and images below 64 pixels are neither blurred nor solarised, so that both views are alike.",
        "Hidden layers have no bias before their normalisation, which would take it away.",
        "Batch normalisation has the statistics of a worker with `norm: batch`, and of all workers with `norm: sync`.",
        "The recipes train with SGD; the paper trains with LARS, which leaves out biases and normalisations.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        dim: Annotated[int, Ge(2)] = 256,
        hidden: tuple[Annotated[int, Ge(1)], ...] = (4096,),
        norm: Norm = "batch",
        momentum: Annotated[float, Ge(0.0), Le(1.0)] = 0.996,
        momentum_end: Annotated[float, Ge(0.0), Le(1.0)] = 1.0,
        exported: Literal["online", "target"] = "online",
        pool: ProjectorPooling | None = None,
    ) -> None:
        super().__init__(encoder, info)
        if momentum_end < momentum:
            raise ValueError(
                f"momentum_end: {momentum_end:g} is below momentum: {momentum:g}; valid: {momentum:g} to 1"
            )
        self.momenta, self.exported = (momentum, momentum_end), exported
        self.pool = choose_pooling(encoder, pool)
        self.projector = Projector(pooled_size(encoder, self.pool), hidden, dim, norm=norm)
        self.predictor = Projector(dim, hidden, dim, norm=norm)
        self.target_encoder, self.target_projector = Teacher(encoder), Teacher(self.projector)
        self.begin_step(0)

    @classmethod
    def requirements(cls, parameters: Mapping[str, Any]) -> BatchRequirements:
        return BatchRequirements(views=2)

    @classmethod
    def default_views(
        cls, augment: tuple[Mapping[str, Any], ...], image_size: int, parameters: Mapping[str, Any]
    ) -> tuple[ViewGroup, ...]:
        """Adds to `augment` what it lacks of the paper's table 6, which differs between the two views."""
        return tuple(ViewGroup(1, image_size, ops) for ops in compose_byol_ops(augment, image_size))

    def exported_encoder(self) -> Encoder:
        return self.encoder if self.exported == "online" else self.target_encoder.network  # type: ignore[return-value]

    def begin_step(self, step: int) -> None:
        """Sets the momentum: from the first to the last value by a cosine over all steps."""
        start, end = self.momenta
        self.momentum = raise_momentum(start, step, self.info.steps, end)

    def end_step(self) -> None:
        """Moves the target towards the online network."""
        super().end_step()
        self.target_encoder.follow(self.encoder, self.momentum)
        self.target_projector.follow(self.projector, self.momentum)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns (B, dim) predictions of the two views, then (B, dim) targets of them, of any length."""
        views = batch.views[:2]
        projected = [self.projector(pool_maps(self.encoder(view), self.pool)) for view in views]
        targets = [self.target_projector(pool_maps(self.target_encoder(view), self.pool)) for view in views]
        return (*(self.predictor(projection) for projection in projected), *targets)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Returns the loss, and the spread of the targets (`measure_spread`), which is 0 after a collapse."""
        first, second, *targets = outputs
        with torch.autocast(first.device.type, enabled=False):
            loss = regress_views((first, second), (targets[0].detach(), targets[1].detach()))
            return {"loss": loss, "spread": measure_spread(targets[0])}
