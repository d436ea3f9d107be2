"""FixMatch (Sohn et al. 2020, arXiv 2001.07685), with the thresholds of FlexMatch and FreeMatch.

A classifier learns from few labels, and from its own confident predictions of the other images: the prediction of a
weakly augmented view is the label of a strongly augmented view of the same image. With B labelled and mu B unlabelled
images in a batch, weak views a(.) and strong views A(.),

    L = L_s + lambda L_u                                                                     (section 2.2)
    L_s = 1/B sum_b H(label of x_b, p(a(x_b)))                                               (eq. 3)
    L_u = 1/(mu B) sum_b 1(max p(a(u_b)) >= T) H(argmax p(a(u_b)), p(A(u_b)))                (eq. 4)

No gradient flows through the pseudo-label. T is one number in FixMatch; FlexMatch (Zhang et al. 2021, arXiv 2110.08263)
and FreeMatch (Wang et al. 2023, arXiv 2205.07246) have one for each class, which follows the training
(`tasks/pseudo_labels.py`), and FreeMatch adds w_f L_f, which asks the predictions to use all classes.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, MapPooling, pool_maps, pooled_size
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo, ViewGroup
from firstlight.tasks.pseudo_labels import (
    FixedThreshold,
    FlexibleThreshold,
    FreeThreshold,
    ThresholdMapping,
    consistency_loss,
    fairness_loss,
    measure_pseudo_labels,
)
from firstlight.tasks.supervised_loss import labelled_cross_entropy
from firstlight.tasks.visuals import Plot

# The ops that make a weak view a strong one: two of random strength, each with a probability of 1/2, then a grey square
# of half the side (the authors' code for RandAugment; section 2.3 and table 12).
STRONG_OPS: tuple[Mapping[str, Any], ...] = (
    {"op": "rand_augment", "pool": "fixmatch", "magnitudes": "random"},
    {"op": "cutout"},
)


class FixMatch(Method):
    """The method around a linear classifier on the pooled feature.

    The first view of an image is the weak one, by default the data set's augmentations, the second the strong one, by
    default the same, then RandAugment and CutOut. The ratio mu follows from the batch: `batch_size` images of which
    `labelled_per_batch` have a label.

    Logged with the loss are its terms, the accuracy on the labelled images, `mask`, the share of unlabelled images
    whose pseudo-label is taken, `classes_used`, the number of classes among these, and, where the labels are known,
    `pseudo_accuracy`, the share of these that are right: labels that are withheld from the training are looked at for
    this number alone. The mean and the smallest threshold of the classes are logged by `free` and `flexible`.

    `threshold`: the confidence from which a prediction is a pseudo-label: with `fixed` it is `cutoff` (FixMatch,
    section 2.2), with `flexible` a share of `cutoff` for each class, by how many images it is confidently predicted for
    (FlexMatch); with `free` it follows the mean confidence and the mean probability of each class (FreeMatch).
    `cutoff`: the threshold of `fixed`, and the largest one of `flexible` (0.95 in FixMatch, table 4, and in FlexMatch,
    section 4).
    `consistency_weight`: lambda, the weight of the loss of unlabelled images (1 in all three papers, where it is
    lambda_u).
    `warmup`: of `flexible`: true keeps all thresholds low until most images have been predicted confidently (FlexMatch,
    eq. 11).
    `mapping`: of `flexible`: the function from the learning status of a class to its share of `cutoff` (FlexMatch,
    section 3.3). The paper has `convex` (eq. 12); `linear` and `concave` are its ablations.
    `momentum`: of `free`: the momentum of the moving averages that the thresholds are made of (0.999 in FreeMatch,
    section 5.1).
    `fairness`: of `free`: w_f, the weight of the fairness loss; 0 leaves it out. FreeMatch has 0.05 (section 5.1), but
    0.01 with 10 labels of CIFAR-10, and for SVHN and ImageNet.
    `pool`: the pooling of the feature map: `avg` is the mean over its positions, `flatten` keeps every position (`avg`
    in the authors' code).
    """

    title: ClassVar[str] = "FixMatch (FlexMatch and FreeMatch are thresholds of it)"
    paper: ClassVar[str] = (
        "FixMatch: Sohn et al. 2020, https://arxiv.org/abs/2001.07685; FlexMatch: Zhang et al. 2021, "
        "https://arxiv.org/abs/2110.08263; FreeMatch: Wang et al. 2023, https://arxiv.org/abs/2205.07246"
    )
    reported_metrics: ClassVar[tuple[str, ...]] = ("mask", "pseudo_accuracy")
    keeps_crops: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "The unlabelled images are those without a label; in the authors' code the labelled ones are among them, too.",
        "The strong views of labelled images pass the network with all others, and count in its batch statistics; no "
        "loss is over them. In the authors' code they are not made.",
        "With fewer labelled images than the 64 of the papers' batches, a batch holds each of them once; in the "
        "authors' code some are in it several times.",
        "Strong views are made by RandAugment and CutOut; FixMatch's table 2 has a column for CTAugment, too.",
        "Weak shifts are those of the data set's augmentations, padded with black; in the authors' code they are "
        "reflected.",
        "Shears and rotations of RandAugment are bilinear; in the authors' code they take the nearest pixel.",
        "Weights are averaged for the evaluation where the training has `ema`: over the first steps faster than with "
        "the momentum of the papers, and the running statistics of normalisations as well.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        threshold: Literal["fixed", "flexible", "free"] = "fixed",
        cutoff: Annotated[float, Gt(0.0), Le(1.0)] = 0.95,
        consistency_weight: Annotated[float, Ge(0.0)] = 1.0,
        warmup: bool = True,
        mapping: ThresholdMapping = "convex",
        momentum: Annotated[float, Ge(0.0), Lt(1.0)] = 0.999,
        fairness: Annotated[float, Ge(0.0)] = 0.05,
        pool: MapPooling = "avg",
    ) -> None:
        super().__init__(encoder, info)
        if info.classes < 2:
            raise ValueError(
                f"threshold: {threshold!r} is of classes, and the data set has {info.classes}; valid: 2 up"
            )
        self.consistency_weight, self.fairness, self.pool = consistency_weight, fairness, pool
        self.classifier = nn.Linear(pooled_size(encoder, pool), info.classes)
        # The authors' code.
        nn.init.xavier_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.threshold: FixedThreshold | FlexibleThreshold | FreeThreshold
        if threshold == "fixed":
            self.threshold = FixedThreshold(cutoff)
        elif threshold == "flexible":
            self.threshold = FlexibleThreshold(cutoff, info.classes, info.size, warmup, mapping)
        else:
            self.threshold = FreeThreshold(momentum, info.classes)
        self.tables |= self.threshold.tables
        # No buffer: it is no state, and would be sent to all workers in every step.
        self.truth = info.labels

    @classmethod
    def requirements(cls, parameters: Mapping[str, Any]) -> BatchRequirements:
        return BatchRequirements(views=2, labels=True)

    @classmethod
    def default_views(
        cls, augment: tuple[Mapping[str, Any], ...], image_size: int, parameters: Mapping[str, Any]
    ) -> tuple[ViewGroup, ...]:
        return (ViewGroup(1, image_size, augment), ViewGroup(1, image_size, (*augment, *STRONG_OPS)))

    @classmethod
    def plots(cls, epochs: int, parameters: Mapping[str, Any]) -> tuple[Plot, ...]:
        shares = "share of unlabelled images with a pseudo-label (mask), and of these that are right"
        return (
            Plot("pseudo_labels", shares, ("mask", "pseudo_accuracy"), 1, "epoch"),
            Plot("pseudo_classes", "number of classes among the pseudo-labels", ("classes_used",), 1, "epoch"),
        )

    def move_to_device(self, device: torch.device) -> None:
        super().move_to_device(device)
        self.truth = None if self.truth is None else self.truth.to(device)

    def classify(self, images: Tensor) -> Tensor:
        """Returns the (B, C) logits of images, in float32 or wider."""
        logits: Tensor = self.classifier(pool_maps(self.encoder(images), self.pool))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the (B, C) logits of the weak and of the strong views, which pass the network together."""
        weak, strong = batch.views
        if weak.shape != strong.shape:
            return self.classify(weak), self.classify(strong)
        return self.classify(torch.cat((weak, strong))).chunk(2)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        weak, strong = outputs
        unlabelled = batch.labels < 0
        with torch.autocast(weak.device.type, enabled=False):
            cross_entropy, accuracy = labelled_cross_entropy(weak, batch.labels)
            probabilities = weak.detach().softmax(1)
            targets = probabilities.argmax(1)
            taken = self.threshold(probabilities, unlabelled, batch.rows)
            consistency = consistency_loss(strong, targets, taken, unlabelled)
            terms = {"cross_entropy": cross_entropy, "consistency": consistency}
            total = cross_entropy + self.consistency_weight * consistency
            if isinstance(self.threshold, FreeThreshold) and self.fairness:
                averages = self.threshold.expected, self.threshold.histogram
                terms["fairness"] = fairness_loss(strong, taken, *averages)
                total = total + self.fairness * terms["fairness"]
        truth = None if self.truth is None else self.truth[batch.rows]
        measured = measure_pseudo_labels(targets, taken, unlabelled, truth, weak.shape[1])
        thresholds = self.threshold.class_thresholds
        if thresholds is not None:
            measured |= {"threshold_mean": thresholds.mean(), "threshold_min": thresholds.min()}
        return {"loss": total, **terms, "accuracy": accuracy, **measured}

    def predict(self, images: Tensor) -> Tensor | None:
        return self.classify(images).argmax(1)
