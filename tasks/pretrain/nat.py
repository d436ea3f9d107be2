"""Noise As Targets (Bojanowski and Joulin 2017, arXiv 1704.05310).

Every image is given one fixed vector of noise, and the network learns to map the image to it:

    min over theta, P of  1/(2n) sum_i || f_theta(x_i) - (P C)_i ||^2           (eqs. 2 and 5)

f is normalised to the unit sphere, C holds n targets drawn uniformly from it, and P, a permutation (eq. 6), says which image has which.
Since the targets never move and each has one image, the features cannot collapse. P is improved a batch at a time: the images of a batch
exchange their targets among each other, optimally, before the step is taken (Algorithm 1), every `permutation_period` epochs (section 3.3).
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from firstlight.tasks.collective import all_sum, from_rank_zero, gather, mine, world
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.heads import Projection
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.pretrain.method import Method, Setting
from firstlight.tasks.sample_table import SampleTable
from firstlight.tasks.timer import part
from firstlight.tasks.visuals import Curve

CHUNK = 4096  # targets drawn from one generator: any worker can draw any of them


def square_loss(features: Tensor, targets: Tensor, reduction: Literal["paper", "reference"]) -> Tensor:
    """Squared distances of this worker's (B, d) features to their (B, d) targets.

    paper: 1/(2n) times the sum over the n images of the global batch (eq. 2). reference: the sum, without 1/2 (the authors' code:
    `MSECriterion`, `sizeAverage = false`); 2n times larger, so its learning rate is 2n times smaller for the same step.
    """
    distances = (features - targets).square().sum(1)
    return distances.mean() / 2 if reduction == "paper" else distances.sum() * world()


def best_assignment(features: Tensor, targets: Tensor) -> Tensor:
    """(G, d) unit features and the (G, d) targets they hold -> the permutation p (G,) that minimises sum_i ||f_i - t_p(i)||^2 (eq. 6).

    On the unit sphere that is maximising sum_i <f_i, t_p(i)>. Subtracting row and column means leaves the optimum where it is and removes what
    collapsed features have in common, on which scipy's solver is otherwise 7-15 times slower.
    """
    cost = -(features.double() @ targets.double().T)
    cost = cost - cost.mean(1, keepdim=True) - cost.mean(0, keepdim=True)
    # A diverged network's features are not numbers. Any assignment will do then: the loop stops at the loss, on all workers, and says why.
    with part("assignment"):
        _, columns = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
        return torch.from_numpy(columns).to(features.device)


def sphere_targets(indices: Tensor, dim: int, seed: int) -> Tensor:
    """(k,) target indices -> (k, dim) float32 unit vectors, uniform on the sphere; target i is the same whichever are asked together."""
    rows = torch.empty(len(indices), dim)
    for chunk in torch.unique(indices // CHUNK).tolist():
        noise = torch.randn(CHUNK, dim, generator=torch.Generator().manual_seed((seed * 1_000_003 + chunk) % 2**63))
        here = indices // CHUNK == chunk
        rows[here] = F.normalize(noise[indices[here] % CHUNK], dim=1)
    return rows


def initial_permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


class NoiseAsTargets(Method):
    """`dim`: d, the dimension of the targets (2048 in the authors' code; the paper does not say).

    `targets: one_hot`: the ablation of section 4.1, the `dim` basis vectors, each n / dim times.
    `assign: local` exchanges targets within each worker's part of the batch only; `global` within the whole batch, as on one worker.

    Logged beside the loss: `moved`, of the images of the batch those that changed their target in this step; `changed`, of all images seen in the
    last epoch that exchanges targets.
    """

    title: ClassVar[str] = "Noise As Targets"
    paper: ClassVar[str] = (
        "Bojanowski and Joulin 2017, Unsupervised Learning by Predicting Noise, https://arxiv.org/abs/1704.05310"
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "The dimension of the targets is a setting; the paper does not give it (its authors' code: 2048).",
        "Dropout follows the first hidden layer of the head only, and the initial assignment is a random permutation: as in the authors' code, "
        "the paper does not say.",
        "Targets are exchanged within the global batch of all workers (assign: global); the authors' code runs on one machine.",
        "The assignment costs are not rounded to integers, as they are in the authors' code.",
        "The gradients of the Sobel input have no bias; in the authors' code it stays at its random initialisation.",
    )

    exchanges: Tensor
    period: Tensor

    def __init__(
        self,
        encoder: Encoder,
        setting: Setting,
        *,
        dim: Annotated[int, Ge(2)] = 2048,
        permutation_period: Annotated[int, Ge(1)] = 3,
        reduction: Literal["paper", "reference"] = "paper",
        targets: Literal["sphere", "one_hot"] = "sphere",
        assign: Literal["global", "local"] = "global",
        hidden: tuple[Annotated[int, Ge(1)], ...] = (4096, 4096),
        dropout: Annotated[float, Ge(0.0), Lt(1.0)] = 0.5,
        pool: Literal["avg", "flatten"] = "flatten",
        norm: Norm = "batch",
    ) -> None:
        super().__init__(encoder, setting)
        self.dim, self.permutation_period = dim, permutation_period
        self.reduction, self.targets, self.assign = reduction, targets, assign
        self.head = Projection(pooled_size(encoder, pool), hidden, dim, dropout=dropout, norm=norm, pool=pool)
        self.permuting = True
        self.register_buffer(
            "exchanges", torch.zeros(2, dtype=torch.int64)
        )  # in this period, on all workers: images with another target, all seen
        self.register_buffer("period", torch.tensor(-1))  # the epoch in which the period began
        # P: the index of the target that each image holds. The targets themselves are a function of (seed, index): no checkpoint carries them.
        size, seed = setting.size, setting.seed
        start = initial_permutation(size, seed)
        self.tables["assignment"] = SampleTable(size, (), torch.int64, lambda ids: start[ids])
        self.noise = (
            SampleTable(size, (dim,), torch.float32, lambda k: sphere_targets(k, dim, seed))
            if targets == "sphere"
            else None
        )

    @classmethod
    def curves(cls, epochs: int, *, permutation_period: int = 3, **parameters: Any) -> tuple[Curve, ...]:
        return (
            Curve("targets", "share of images that changed their target", ("changed",), permutation_period, "period"),
        )

    def begin_epoch(self, epoch: int) -> None:
        self.permuting = epoch % self.permutation_period == 0
        if (
            self.permuting and int(self.period) != epoch
        ):  # an epoch that is resumed in its middle has counted what came before
            self.exchanges.zero_()
            self.period.fill_(epoch)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """(B, d) on the unit sphere."""
        return (self.head(self.encoder(batch.views[0])),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (features,) = outputs
        held = self.tables["assignment"].read(batch.rows)
        chosen, vectors = self._exchanged(features.detach(), held)
        loss = square_loss(features, vectors, self.reduction)
        moved = chosen != held
        if self.permuting:
            self.tables["assignment"].write(batch.rows, chosen)
            self.exchanges[0] += all_sum(moved.sum())
            self.exchanges[1] += len(moved) * world()
        changed = self.exchanges[0] / self.exchanges[1].clamp_min(1)
        return {"loss": loss, "moved": moved.float().mean(), "changed": changed.to(loss.dtype)}

    def handed_on(self) -> dict[str, nn.Module]:
        return {"head": self.head}

    def place(self, device: torch.device) -> None:
        super().place(device)
        if self.noise is not None:
            self.noise.to(device)

    def _exchanged(self, features: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """The (B,) target indices that this worker's images hold after the exchange, and those (B, d) targets."""
        vectors = self._vectors(held)
        if not self.permuting:
            return held, vectors
        if self.assign == "local":
            order = best_assignment(features, vectors)
            return held[order], vectors[order]
        everyone = gather(vectors)
        # Solved once: two machines whose arithmetic differs in the last bit could break a tie differently, and P would be no permutation.
        order = mine(from_rank_zero(best_assignment, gather(features), everyone))
        return gather(held)[order], everyone[order]

    def _vectors(self, indices: Tensor) -> Tensor:
        """(B,) target indices -> (B, d)."""
        if self.noise is not None:
            return self.noise.read(indices)
        return F.one_hot(indices % self.dim, self.dim).float()
