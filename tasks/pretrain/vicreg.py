"""VICReg, variance-invariance-covariance regularisation (Bardes, Ponce and LeCun 2022, arXiv 2105.04906).

The embeddings Z and Z' of two views of n images are made alike, while each of their d dimensions keeps a standard
deviation of at least 1 over the images, and pairs of dimensions are decorrelated:

    v(Z) = 1/d sum_j max(0, 1 - sqrt(Var(Z_j) + eps))                                                (eqs. 1 and 2)
    c(Z) = 1/d sum_{i != j} Cov(Z)_ij^2                                                             (eqs. 3 and 4)
    s(Z, Z') = 1/n sum_b || z_b - z'_b ||^2                                                                (eq. 5)
    L = lambda s(Z, Z') + mu (v(Z) + v(Z')) + nu (c(Z) + c(Z'))                                            (eq. 6)

Variances and covariances divide by n - 1. They are over the images of all workers.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from firstlight.tasks.collective import gather_over_workers
from firstlight.tasks.joint_embedding.pair_ops import compose_byol_ops
from firstlight.tasks.joint_embedding.projector import Projector, ProjectorPooling, choose_pooling
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.feature_maps import pool_maps
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo, ViewGroup

VICRegVariant = Literal["reference", "paper"]
# The eps of eq. 2 (section 4.2).
VARIANCE_EPS = 1e-4
# The smallest standard deviation that costs nothing: gamma of eq. 1 (section 4.2).
DEVIATION_HINGE = 1.0


def penalise_variance(embeddings: Tensor) -> Tensor:
    """Returns v(Z) of (n, d) embeddings (eqs. 1 and 2)."""
    return (DEVIATION_HINGE - (embeddings.var(0) + VARIANCE_EPS).sqrt()).relu().mean()


def penalise_covariance(embeddings: Tensor) -> Tensor:
    """Returns c(Z) of (n, d) embeddings (eqs. 3 and 4)."""
    centred = embeddings - embeddings.mean(0)
    covariance = centred.T @ centred / (len(centred) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / covariance.shape[0]


class VicReg(Method):
    """The method with its expander. The encoder's features, not the embeddings, are handed on.

    The views pass the networks one after the other, as in the authors' code: each has batch statistics of its own.

    The paper's equations and the authors' code differ; `variant` says which is followed:

                            variant: paper                  variant: reference
        invariance          the squared distance (eq. 5)    divided by d
        variance            v(Z) + v(Z') (eq. 6)            its half

    `invariance`: the weight lambda of the distance of the views (25 in section 4.2).
    `variance`: the weight mu of the variance (25 in section 4.2).
    `covariance`: the weight nu of the covariance (1 in section 4.2).
    `dim`: the dimension d of the embeddings (8,192 in section 4.2, for ImageNet).
    `hidden`: the widths of the expander's hidden layers. null: two layers as wide as the embeddings (section 4.2).
    `norm`: the normalisation of the hidden layers (`batch` in section 4.2); `sync` is for several workers.
    `variant`: `paper` follows the equations (5 and 6 as printed), `reference` the authors' code, for which the weights
    were chosen.
    `pool`: the pooling of the feature map. null: `cls` if the encoder has a class token, otherwise `avg`.
    """

    title: ClassVar[str] = "VICReg"
    paper: ClassVar[str] = (
        "Bardes, Ponce and LeCun 2022, VICReg: variance-invariance-covariance regularization for self-supervised "
        "learning, https://arxiv.org/abs/2105.04906"
    )
    keeps_crops: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "The equations and the authors' code differ in the scale of two terms; `variant` says which was followed.",
        "Where a recipe gives no views, crops are those of the data set's augmentations (in the paper 0.08 to 1 of the "
        "area), and images below 64 pixels are neither blurred nor solarised.",
        "Larger images have the blur and solarisation of the authors' code, which differ between the two views.",
        "Batch normalisation has the statistics of a worker with `norm: batch`, and of all workers, as in the authors' "
        "code, with `norm: sync`.",
        "The recipes train with SGD; the paper trains with LARS, which leaves out biases and normalisations.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        invariance: Annotated[float, Ge(0.0)] = 25.0,
        variance: Annotated[float, Ge(0.0)] = 25.0,
        covariance: Annotated[float, Ge(0.0)] = 1.0,
        dim: Annotated[int, Ge(2)] = 2048,
        hidden: tuple[Annotated[int, Ge(1)], ...] | None = None,
        norm: Norm = "batch",
        variant: VICRegVariant = "reference",
        pool: ProjectorPooling | None = None,
    ) -> None:
        super().__init__(encoder, info)
        self.weights, self.variant = (invariance, variance, covariance), variant
        self.pool = choose_pooling(encoder, pool)
        widths = (dim, dim) if hidden is None else hidden
        self.expander = Projector(pooled_size(encoder, self.pool), widths, dim, norm=norm)

    @classmethod
    def requirements(cls, parameters: Mapping[str, Any]) -> BatchRequirements:
        return BatchRequirements(views=2)

    @classmethod
    def default_views(
        cls, augment: tuple[Mapping[str, Any], ...], image_size: int, parameters: Mapping[str, Any]
    ) -> tuple[ViewGroup, ...]:
        """Adds to `augment` what it lacks of the authors' augmentations, which are BYOL's."""
        return tuple(ViewGroup(1, image_size, ops) for ops in compose_byol_ops(augment, image_size))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns (B, dim) embeddings of the two views."""
        return tuple(self.expander(pool_maps(self.encoder(view), self.pool)) for view in batch.views[:2])

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Returns the weighted sum of the three terms, and each of them without its weight."""
        with torch.autocast(outputs[0].device.type, enabled=False):
            # Each worker has the loss of all images: the gradient of its own, averaged over workers, is the whole one.
            first, second = gather_over_workers(torch.stack(outputs, 1)).unbind(1)
            invariance = (first - second).square().sum(1).mean()
            variance = penalise_variance(first) + penalise_variance(second)
            covariance = penalise_covariance(first) + penalise_covariance(second)
            if self.variant == "reference":
                invariance, variance = invariance / first.shape[1], variance / 2.0
            terms = (invariance, variance, covariance)
            total = torch.stack([weight * term for weight, term in zip(self.weights, terms, strict=True)]).sum()
        return {"loss": total, **dict(zip(("invariance", "variance", "covariance"), terms, strict=True))}
