"""LeJEPA (Balestriero and LeCun 2025, arXiv 2511.08544).

The embeddings z_v of the V views of an image are drawn to the mean mu of those of its V_g large views, while the
embeddings of all images are kept standard normal, which also prevents their collapse. There is neither a teacher nor a
stop-gradient, and one coefficient lambda (section 5.1, algorithm 2):

    L = (1 - lambda) 1/V sum_v || mu - z_v ||^2  +  lambda 1/V sum_v SIGReg(z_v)
    SIGReg(z) = mean over random unit vectors a of T(a^T z)                                      (section 4, def. 2)

T is the test of Epps and Pulley (`firstlight.tasks.joint_embedding.sigreg`), over the images of all workers. The
vectors a are drawn in every step.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from firstlight.tasks.joint_embedding.pair_ops import BYOL_JITTER, SMALL_IMAGE_SIDE, compose_pair_ops
from firstlight.tasks.joint_embedding.projector import ProjectorPooling, choose_pooling
from firstlight.tasks.joint_embedding.sigreg import draw_directions, measure_normality
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.heads import HeadNorm, build_mlp
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo, ViewGroup
from firstlight.tasks.self_distillation.multi_crop import SMALL_LOCAL_SCALE, choose_local_side
from firstlight.tasks.self_distillation.view_embedding import embed_views

# The shares of the image's area that large and small views have, and the probabilities of a blur and of solarisation
# (authors' README).
LARGE_VIEW_SCALE, SMALL_VIEW_SCALE = (0.3, 1.0), (0.05, 0.3)
LEJEPA_BLUR, LEJEPA_SOLARIZE = 0.5, 0.2


class LeJepa(Method):
    """The method with its projector. The encoder's features, not the embeddings, are handed on.

    The first views of an image are large, the others small. Views of one size pass the encoder as one batch, and all
    of them the projector.

    `coefficient`: the weight lambda of SIGReg; that of the distance of the views is 1 - lambda (0.05 in the authors'
    README, 0.01 to 0.1 in the paper).
    `global_views`: the number of large views, whose mean the embeddings of an image are drawn to (2 in the authors'
    README).
    `local_views`: the number of small views (6 in the authors' README, on ImageNet). The authors have none for
    convolutional networks.
    `directions`: the number of random directions of a step, along which each view is tested.
    `knots`: the number of points at which the test is integrated, from 0 to `t_max` (17 in the authors' code). 9 points
    to 5 are the paper's algorithm 1, which has 17 from -5 to 5.
    `t_max`: the bound of that integral (3 in the authors' code).
    `distance`: `mean` divides the squared distance of the views by the dimension of the embeddings (algorithm 2 and the
    authors' code), `sum` does not (the equation of section 5.1).
    `dim`: the dimension of the embeddings (16 in the authors' minimal example).
    `hidden`: the widths of the projector's hidden layers (two of 2048 in the authors' minimal example).
    `norm`: the normalisation of the hidden layers; `sync` is for several workers.
    `pool`: the pooling of the feature map. null: `cls` if the encoder has a class token, otherwise `avg`.
    """

    title: ClassVar[str] = "LeJEPA"
    paper: ClassVar[str] = (
        "Balestriero and LeCun 2025, LeJEPA: provable and scalable self-supervised learning without the heuristics, "
        "https://arxiv.org/abs/2511.08544"
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "Where a recipe gives no views and there are small ones, images below 64 pixels are neither blurred nor "
        "solarised, and their small views cover 0.2 to 0.4 of the area (in the paper 0.05 to 0.3).",
        "Without small views, crops are those of the data set's augmentations.",
        "There is no stochastic depth (`drop_path` 0.1 in the authors' example), and no average of weights over steps.",
        "Batch normalisation has the statistics of a worker with `norm: batch`, and of all workers with `norm: sync`.",
        "Directions are drawn by the seed of the training and the step; the authors draw them by the step alone.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        coefficient: Annotated[float, Ge(0.0), Le(1.0)] = 0.05,
        global_views: Annotated[int, Ge(1), Le(30)] = 2,
        local_views: Annotated[int, Ge(0), Le(30)] = 6,
        directions: Annotated[int, Ge(1)] = 1024,
        knots: Annotated[int, Ge(2)] = 17,
        t_max: Annotated[float, Gt(0.0)] = 3.0,
        distance: Literal["mean", "sum"] = "mean",
        dim: Annotated[int, Ge(1)] = 16,
        hidden: tuple[Annotated[int, Ge(1)], ...] = (2048, 2048),
        norm: HeadNorm = "batch",
        pool: ProjectorPooling | None = None,
    ) -> None:
        super().__init__(encoder, info)
        if global_views + local_views < 2:
            raise ValueError("local_views: 0 is not valid with global_views: 1, which leaves one view; valid: 1 to 30")
        self.coefficient, self.distance = coefficient, distance
        self.num_global, self.num_views = global_views, global_views + local_views
        self.directions, self.knots, self.t_max = directions, knots, t_max
        self.pool = choose_pooling(encoder, pool)
        # The last layer has a bias, unlike that of methods whose loss takes it away.
        self.projector = build_mlp(pooled_size(encoder, self.pool), hidden, dim, dropout=0.0, norm=norm)
        self.begin_step(0)

    @classmethod
    def requirements(cls, parameters: Mapping[str, Any]) -> BatchRequirements:
        return BatchRequirements(views=parameters["global_views"] + parameters["local_views"])

    @classmethod
    def default_views(
        cls, augment: tuple[Mapping[str, Any], ...], image_size: int, parameters: Mapping[str, Any]
    ) -> tuple[ViewGroup, ...]:
        """Adds to `augment` what it lacks of the authors' augmentations, which all views have."""
        blur, solarize = (LEJEPA_BLUR, LEJEPA_BLUR), (LEJEPA_SOLARIZE, LEJEPA_SOLARIZE)
        ops, _ = compose_pair_ops(augment, image_size, BYOL_JITTER, blur, solarize)
        if not parameters["local_views"]:
            return (ViewGroup(parameters["global_views"], image_size, ops),)
        base = ops[0] if ops[0]["op"] == "random_resized_crop" else {"op": "random_resized_crop"}
        small_scale = SMALL_LOCAL_SCALE if image_size < SMALL_IMAGE_SIDE else SMALL_VIEW_SCALE
        large, small = ({**base, "scale": scale} for scale in (LARGE_VIEW_SCALE, small_scale))
        return (
            ViewGroup(parameters["global_views"], image_size, (large, *ops[1:])),
            ViewGroup(parameters["local_views"], choose_local_side(image_size), (small, *ops[1:])),
        )

    @classmethod
    def list_warnings(cls, parameters: Mapping[str, Any]) -> tuple[str, ...]:
        if parameters["coefficient"] > 0.0:
            return ()
        return ("coefficient: 0 leaves SIGReg out, without which all images get the same embedding",)

    def begin_step(self, step: int) -> None:
        self.step = step

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns (B, V, dim) embeddings of the views, in float32 or wider."""
        embedded = embed_views(self.encoder, batch.views[: self.num_views], self.pool)
        projected = self.projector(torch.cat([view.pooled for view in embedded]))
        full = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return (torch.stack(full.chunk(self.num_views), 1),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Returns the weighted sum of the two terms, and each of them without its weight."""
        (embeddings,) = outputs
        with torch.autocast(embeddings.device.type, enabled=False):
            centre = embeddings[:, : self.num_global].mean(1, keepdim=True)
            squares = (embeddings - centre).square()
            # The mean over this worker's images: over workers, its average is that over all images.
            invariance = squares.mean() if self.distance == "mean" else squares.sum(2).mean()
            # Each worker has the statistic of all images: see `all_sum` for its gradient.
            directions = draw_directions(self.info.seed, self.step, self.directions, embeddings)
            sigreg = measure_normality(embeddings @ directions, self.knots, self.t_max).mean()
            total = (1.0 - self.coefficient) * invariance + self.coefficient * sigreg
        return {"loss": total, "invariance": invariance, "sigreg": sigreg}
