"""Clustering and Locality Penalties for Semi-Supervised Learning (Bansal and Zepeda).

A classifier q = f(X) clusters all images, the labelled images give the clusters their meaning, and the evidence for a
class should lie in a small region of the image. Over a batch of T images, R of them labelled:

    L = J_C + alpha J_M + beta J_B + gamma J_L                          (eq. 8)

    J_C = 1/R sum_t E_t                cross-entropy of the labelled images (eq. 4)
    J_M = 1/T sum_t H(q_t)             mean entropy: each image is classified with certainty (eq. 1)
    J_B = -H(1/T sum_t q_t)            negative batch entropy: all classes are used (eq. 2)
    J_L = 1/T sum_t sum_g || C_g ||    locality of the class activation map C, over nested half-spaces g (eq. 7;
                                       the paper's J_L lacks the sum over t)

The batch is that of all workers. J_B needs a large one: the paper gained nothing from it, and gives its small batches
as the reason (section 3.3).

Without labels (section 3.5) nothing but J_B keeps the clusters apart. A bias that makes one class likelier for all
images lowers both entropies alike, and the loss by (alpha - beta) times that: with alpha > beta all images become one
cluster. With alpha = beta the two terms are the mutual information of image and cluster, times -alpha, which neither
one cluster nor even predictions of all clusters can raise.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from firstlight.tasks.collective import all_sum, gather_over_workers
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, pool_maps, pooled_size
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo
from firstlight.tasks.supervised_loss import labelled_cross_entropy, mark_classes
from firstlight.tasks.visuals import ImageGrid, ImageRow, stretch_contrast


def mean_entropy(logits: Tensor) -> Tensor:
    """Returns J_M (eq. 1): the mean of the entropies H(q_t), in nats, of the softmax of (B, C) logits."""
    log_q = logits.log_softmax(1)
    return -(log_q.exp() * log_q).sum(1).mean()


def batch_entropy(logits: Tensor) -> Tensor:
    """Returns -J_B (eq. 2): the entropy, in nats, of the mean prediction, the mean of q over the images of all workers.

    The mean is computed from logarithms: if a class has probability 0 to all digits, log 0 would make the gradient NaN.

    Args:
        logits: (B, C) of this worker.
    """
    log_sums = gather_over_workers(logits.log_softmax(1).logsumexp(0, keepdim=True)).logsumexp(0)
    # The sums add up to T.
    log_mean = log_sums.log_softmax(0)
    return -(log_mean.exp() * log_mean).sum()


@torch.no_grad()
def count_used_clusters(logits: Tensor) -> Tensor:
    """Returns the number of classes that are the most probable one of an image or more, over the images of all workers.

    It says what an entropy cannot: the mean of even predictions has the largest entropy without any cluster.

    Args:
        logits: (B, C) of this worker.
    """
    images = all_sum(mark_classes(logits.argmax(1), logits.shape[1]).sum(0))
    return (images > 0).sum().to(logits.dtype)


def locality_penalty(maps: Tensor) -> Tensor:
    """Returns (B,): the sum of the l2 norms of the 2 w + 2 h nested half-spaces of each (B, h, w) map (eq. 7).

    The half-spaces from the left are the first 1..w columns, and so on from all four sides; the last of each side is
    the whole map. The maps with a single active position have the smallest sum of all maps with the same l2 norm:
    (w + 1 + h + 1) times the norm. The result is in at least float32.
    """
    full = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return _LocalityPenalty.apply(full)  # type: ignore[no-untyped-call,no-any-return]


class _LocalityPenalty(torch.autograd.Function):
    """Implements `locality_penalty` in O(h w) for an image.

    The square of a half-space's norm is a cumulative sum of its lines' squares, and d||C_g|| / dC = C / ||C_g|| inside
    g. Autograd through the square root would give NaN wherever a half-space is all 0, as at the border of most
    activation maps after a ReLU. Here the gradient of such a norm is 0, a subgradient.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        squares = maps.square()
        from_left, columns = _nested_norms(squares.sum(1))
        from_right, columns_back = _nested_norms(squares.sum(1).flip(1))
        from_top, rows = _nested_norms(squares.sum(2))
        from_bottom, rows_back = _nested_norms(squares.sum(2).flip(1))
        ctx.save_for_backward(maps, columns + columns_back.flip(1), rows + rows_back.flip(1))
        return from_left + from_right + from_top + from_bottom

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        maps, columns, rows = ctx.saved_tensors
        return grads[0][:, None, None] * maps * (columns[:, None, :] + rows[:, :, None])  # type: ignore[no-any-return]


def _nested_norms(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the norms of the half-spaces of the first k lines, for k = 1..n, from (B, n) sums of squares of lines.

    Returns:
        (B,) the sum of the norms over k; and (B, n) for each line the sum of 1 / norm over those k whose half-space
        contains it.
    """
    norms = squares.cumsum(1).sqrt()
    inverse = torch.where(norms > 0, 1.0 / norms, 0.0)
    return norms.sum(1), inverse.flip(1).cumsum(1).flip(1)


def class_activation(features: Tensor, weights: Tensor) -> Tensor:
    """Returns the (B, h, w) class activation maps (Zhou et al. 2016, eq. 2; without the bias).

    Args:
        features: (B, K, h, w).
        weights: (B, K), the weights of a class for each image.
    """
    return torch.einsum("bkhw,bk->bhw", features, weights)


class ClusteringLocality(Method):
    """The method around a linear classifier on the averaged last map, as in DenseNet.

    Class activation maps are then the weighted channels of the last map. The locality loss takes the map of the class
    with the highest probability (section 3.4).

    Logged with the loss are its terms (`batch_entropy` is the entropy of the mean prediction), the accuracy on the
    labelled images, and `clusters_used`, the number of classes that the batch's images are assigned to.

    `alpha`: the weight of the mean entropy J_M (0.8 in section 3.2).
    `beta`: the weight of the batch entropy J_B; without labels at least `alpha`. The paper finds it by cross-validation
    and gives no value; 0, with `gamma` 0, is section 3.2.
    `gamma`: the weight of the locality J_L. The paper gives no value; J_L is a sum of 4 N norms for a map of N x N
    positions, and grows with N and with the logits.
    `clusters`: the number of classes of the classifier; null: as many as the data set has (section 2).
    `cam`: the class activation map: `relu` keeps only the evidence for the class, `raw` keeps all (the paper does not
    say).
    `supervised`: true adds J_C on the labelled images, with a weight of 1 (eq. 8); false needs no labels (section 3.5).
    """

    title: ClassVar[str] = "Clustering and Locality Penalties"
    paper: ClassVar[str] = "Bansal and Zepeda, Clustering and Locality Penalties for Semi-Supervised Learning"
    deviations: ClassVar[tuple[str, ...]] = (
        "The locality loss is the mean over the images of the batch; the paper's eq. 7 lacks the sum over them.",
        "The class activation map is that of the most probable class, not rectified unless `cam: relu`; the paper does "
        "not say.",
        "The paper gives no value for beta and gamma, no optimiser, no length of a training, and not its variant of "
        "DenseNet.",
        "Without labels (section 3.5) beta is to be at least alpha; the paper gives no values, and a smaller beta "
        "makes all images one cluster.",
        "Batch entropy is taken over the images of all workers; the paper has small batches, and gained nothing from "
        "it.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        alpha: Annotated[float, Ge(0.0)] = 0.8,
        beta: Annotated[float, Ge(0.0)] = 0.1,
        gamma: Annotated[float, Ge(0.0)] = 0.01,
        clusters: Annotated[int, Ge(2)] | None = None,
        cam: Literal["raw", "relu"] = "raw",
        supervised: bool = True,
    ) -> None:
        super().__init__(encoder, info)
        self.alpha, self.beta, self.gamma, self.cam, self.supervised = alpha, beta, gamma, cam, supervised
        if not clusters and not info.classes:
            raise ValueError("clusters: null is not valid, since the data set has no classes; valid: 2 or more")
        if supervised and not info.classes:
            raise ValueError("supervised: true needs labels, and the data set has no classes; valid: false")
        if supervised and clusters and clusters < info.classes:
            raise ValueError(
                f"clusters: {clusters} is less than the {info.classes} classes that are learned from labels"
            )
        self.classifier = nn.Linear(pooled_size(encoder, "avg"), clusters or info.classes)

    @classmethod
    def requirements(cls, parameters: Mapping[str, Any]) -> BatchRequirements:
        return BatchRequirements(labels=parameters["supervised"])

    @classmethod
    def list_warnings(cls, parameters: Mapping[str, Any]) -> tuple[str, ...]:
        alpha, beta = parameters["alpha"], parameters["beta"]
        if parameters["supervised"] or alpha <= beta:
            return ()
        return (
            f"beta: {beta:g} is less than alpha: {alpha:g}, and no label is learned from: all images are likely to "
            "become one cluster; advised: a beta of at least alpha",
        )

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the (B, C) logits, and the (B, h, w) activation maps of the classes with the highest probability."""
        maps = self.encoder(batch.views[0])
        logits = self.classifier(pool_maps(maps, "avg"))
        cam = class_activation(maps[-1], self.classifier.weight[logits.argmax(1)])
        cam = cam.relu() if self.cam == "relu" else cam
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), cam

    @torch.no_grad()
    def image_grids(self, batch: Batch, subject: str = "held-out images") -> tuple[ImageGrid, ...]:
        """Returns the class activation maps of each image's most probable class, before and after the training."""
        images = batch.views[0]
        maps = ImageRow(
            "evidence for the most probable class",
            images,
            stretch_contrast(self.embed(batch)[1].float()),
            untrained=True,
        )
        return (
            ImageGrid("class_activation", f"class activation maps of {subject}", (ImageRow("image", images), maps)),
        )

    def predict(self, images: Tensor) -> Tensor | None:
        if not self.supervised:
            return None
        return self.classifier(pool_maps(self.encoder(images), "avg")).argmax(1)  # type: ignore[no-any-return]

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Returns the loss of eq. 8, its terms, the accuracy on the labelled images, and the number of clusters."""
        logits, cam = outputs
        terms = {
            "mean_entropy": mean_entropy(logits),
            "batch_entropy": batch_entropy(logits),
            "locality": locality_penalty(cam).mean(),
        }
        loss = self.alpha * terms["mean_entropy"] - self.beta * terms["batch_entropy"] + self.gamma * terms["locality"]
        if self.supervised:
            terms["cross_entropy"], terms["accuracy"] = labelled_cross_entropy(logits, batch.labels)
            loss = loss + terms["cross_entropy"]
        return {"loss": loss, **terms, "clusters_used": count_used_clusters(logits)}
