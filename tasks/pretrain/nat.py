"""Noise As Targets (Bojanowski and Joulin 2017, arXiv 1704.05310).

Every image gets one fixed vector of noise, and the network learns to map the image to it:

    min over theta, P of  1/(2n) sum_i || f_theta(x_i) - (P C)_i ||^2           (eqs. 2 and 5)

f is normalised to the unit sphere, C holds n targets drawn uniformly from it, and the permutation P (eq. 6) assigns a
target to each image. The targets never move and each has one image, so the features cannot collapse. P is improved a
batch at a time: the images of a batch exchange their targets among each other, optimally, before the step is taken
(Algorithm 1), every `permutation_period` epochs (section 3.3).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from firstlight.tasks.assignment import best_assignment, sparse_assignment
from firstlight.tasks.collective import all_sum, compute_on_rank_zero, gather_over_workers, select_own_rows, world_size
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, MapPooling, pooled_size
from firstlight.tasks.nn.heads import Projection
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.pretrain.method import Method, TrainingInfo
from firstlight.tasks.sample_table import SampleTable
from firstlight.tasks.supervised_loss import mark_classes
from firstlight.tasks.visuals import Plot

# The number of targets drawn from one generator. Any worker can draw any of them.
TARGET_CHUNK = 4096
ASSIGNMENT_SOLVERS = {"exact": best_assignment, "sparse": sparse_assignment}
# Every target competes with every other in fewer dimensions, and the candidates of `sparse` would be most pairs.
MIN_SPARSE_DIM = 8


def target_square_loss(features: Tensor, targets: Tensor, reduction: Literal["paper", "reference"]) -> Tensor:
    """Reduces the squared distances of this worker's (B, d) features to their (B, d) targets.

    Args:
        reduction: paper is 1/(2n) times the sum over the n images of the global batch (eq. 2). reference is the sum,
            without 1/2 (the authors' code: `MSECriterion`, `sizeAverage = false`). It is 2n times larger, so its
            learning rate is 2n times smaller for the same step.
    """
    distances = (features - targets).square().sum(1)
    return distances.mean() / 2 if reduction == "paper" else distances.sum() * world_size()


def sphere_targets(indices: Tensor, dim: int, seed: int) -> Tensor:
    """Draws the (k, dim) float32 unit vectors of (k,) target indices, uniformly on the sphere.

    Target i is the same whichever targets are drawn together.
    """
    rows = torch.empty(len(indices), dim)
    for chunk in torch.unique(indices // TARGET_CHUNK).tolist():
        noise = torch.randn(
            TARGET_CHUNK, dim, generator=torch.Generator().manual_seed((seed * 1_000_003 + chunk) % 2**63)
        )
        here = indices // TARGET_CHUNK == chunk
        rows[here] = F.normalize(noise[indices[here] % TARGET_CHUNK], dim=1)
    return rows


def initial_permutation(size: int, seed: int) -> Tensor:
    """Returns the (size,) index of the target that each image holds at first."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


class NoiseAsTargets(Method):
    """The method with a projection head on the encoder.

    Logged with the loss are `moved`, the share of the batch's images that changed their target in this step, and the
    same share of all images seen in the last epoch that exchanges targets, `changed`.

    `dim`: d, the dimension of the targets (2048 in the authors' code; the paper does not say).
    `permutation_period`: the number of epochs between two epochs in which images exchange their targets (3 in section
    3.3 and figure 2).
    `reduction`: `paper` is the mean of eq. 2, with its 1/(2n), `reference` the sum without 1/2, as in the authors'
    code.
    `targets`: `sphere` are uniform unit vectors (section 3); `one_hot` is the ablation of section 4.1: the `dim` basis
    vectors, each n / dim times.
    `assign`: `global` exchanges targets within the whole batch, as on one worker; `local` within each worker's part of
    the batch only.
    `solver`: `exact` finds the best exchange, which is the Hungarian algorithm's (section 3.2); `sparse` is faster for
    batches of 1,000 images and more: it looks for it among each image's nearest targets, and proves that the mean cost
    is at most 0.01 above the optimum, in units of the standard deviation of the costs.
    `hidden`: the widths of the head's hidden layers (two of 4096: AlexNet's fc6 and fc7).
    `dropout`: the probability of dropout after the head's first hidden layer (0.5 in the authors' code, after fc6
    only).
    `pool`: the pooling of the feature map: `avg` is the mean over its positions, `flatten` keeps every position
    (AlexNet's conv5, 256 x 6 x 6).
    """

    title: ClassVar[str] = "Noise As Targets"
    paper: ClassVar[str] = (
        "Bojanowski and Joulin 2017, Unsupervised Learning by Predicting Noise, https://arxiv.org/abs/1704.05310"
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "The dimension of the targets is a setting; the paper does not give it (its authors' code: 2048).",
        "Dropout follows the first hidden layer of the head only, and the initial assignment is a random permutation, "
        "as in the authors' code; the paper does not say.",
        "Targets are exchanged within the global batch of all workers (assign: global); the authors' code runs on one "
        "machine.",
        "The assignment costs are not rounded to integers, as they are in the authors' code.",
        "The exchange of targets is exact, as with the Hungarian algorithm of the paper, unless `solver: sparse`.",
        "The gradients are those of the authors' code with encoder.gray: mean and encoder.padding: zeros, as in NAT's "
        "recipes. They have no bias; in the authors' code it stays at its random initialisation.",
        "Batch normalisation takes the statistics of each worker's images, and its scales start at 1; in the authors' "
        "code a batch is on two GPUs, 128 images each, and Torch 7 draws the scales uniformly from 0 to 1.",
        "The paper does not give the constants of its schedule; those of the recipes are ours (its authors' code: a "
        "constant rate).",
        "In the recipes, 2 % of ImageNet's and 10 % of VOC's training images are held out to choose settings on; the "
        "paper trains on all.",
        "Table 4's detection takes sliding windows or learned proposals instead of those of selective search; the "
        "recipe nat/table4_detection has all differences from Fast R-CNN.",
    )

    exchanges: Tensor
    period: Tensor

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        dim: Annotated[int, Ge(2)] = 2048,
        permutation_period: Annotated[int, Ge(1)] = 3,
        reduction: Literal["paper", "reference"] = "paper",
        targets: Literal["sphere", "one_hot"] = "sphere",
        assign: Literal["global", "local"] = "global",
        solver: Literal["exact", "sparse"] = "exact",
        hidden: tuple[Annotated[int, Ge(1)], ...] = (4096, 4096),
        dropout: Annotated[float, Ge(0.0), Lt(1.0)] = 0.5,
        pool: MapPooling = "flatten",
        norm: Norm = "batch",
    ) -> None:
        super().__init__(encoder, info)
        self.dim, self.permutation_period = dim, permutation_period
        self.reduction, self.targets, self.assign = reduction, targets, assign
        if solver == "sparse" and dim < MIN_SPARSE_DIM:
            raise ValueError(
                f"solver: 'sparse' is not valid with dim: {dim}; valid: exact, or dim: {MIN_SPARSE_DIM} or more"
            )
        self.solve = ASSIGNMENT_SOLVERS[solver]
        self.head = Projection(pooled_size(encoder, pool), hidden, dim, dropout=dropout, norm=norm, pool=pool)
        self.permuting = True
        # The images of this period on all workers: those with another target, and all.
        self.register_buffer("exchanges", torch.zeros(2, dtype=torch.int64))
        # The epoch in which the period began.
        self.register_buffer("period", torch.tensor(-1))
        # P: the index of the target that each image holds. The targets themselves are a function of (seed, index), so
        # no checkpoint contains them.
        size, seed = info.size, info.seed
        start = initial_permutation(size, seed)
        self.tables["assignment"] = SampleTable(size, (), torch.int64, lambda rows: start[rows])
        self.noise = (
            SampleTable(size, (dim,), torch.float32, lambda k: sphere_targets(k, dim, seed))
            if targets == "sphere"
            else None
        )

    @classmethod
    def plots(cls, epochs: int, parameters: Mapping[str, Any]) -> tuple[Plot, ...]:
        period = parameters["permutation_period"]
        return (Plot("targets", "share of images that changed their target", ("changed",), period, "period"),)

    def begin_epoch(self, epoch: int) -> None:
        self.permuting = epoch % self.permutation_period == 0
        # An epoch that is resumed in its middle keeps its counts.
        if self.permuting:
            self.exchanges *= self.period == epoch
            self.period.fill_(epoch)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns (B, d) features on the unit sphere."""
        return (self.head(self.encoder(batch.views[0])),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Exchanges targets if this epoch does so. Returns the loss to the new targets, and the shares that changed."""
        (features,) = outputs
        held = self.tables["assignment"].read(batch.rows)
        chosen, vectors = self._exchange_targets(features.detach(), held)
        loss = target_square_loss(features, vectors, self.reduction)
        moved = chosen != held
        if self.permuting:
            self.tables["assignment"].write(batch.rows, chosen)
            self.exchanges[0] += all_sum(moved.sum())
            self.exchanges[1] += len(moved) * world_size()
        changed = self.exchanges[0] / self.exchanges[1].clamp_min(1)
        return {"loss": loss, "moved": moved.float().mean(), "changed": changed.to(loss.dtype)}

    def exported_networks(self) -> dict[str, nn.Module]:
        return {"head": self.head}

    def move_to_device(self, device: torch.device) -> None:
        super().move_to_device(device)
        if self.noise is not None:
            self.noise.to(device)

    def _exchange_targets(self, features: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (B,) target indices of this worker's images after the exchange, and the (B, d) targets."""
        vectors = self._read_targets(held)
        if not self.permuting:
            return held, vectors
        if self.assign == "local":
            order = self.solve(features, vectors)
            return held[order], vectors[order]
        everyone = gather_over_workers(vectors)
        # Rank 0 solves it for all: two machines whose arithmetic differs in the last bit could break a tie differently,
        # and P would not be a permutation.
        order = select_own_rows(compute_on_rank_zero(self.solve, gather_over_workers(features), everyone))
        return gather_over_workers(held)[order], everyone[order]

    def _read_targets(self, indices: Tensor) -> Tensor:
        """Returns the (B, d) targets of (B,) target indices."""
        if self.noise is not None:
            return self.noise.read(indices)
        return mark_classes(indices % self.dim, self.dim).float()
