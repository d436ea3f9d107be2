"""DINO (Caron et al. 2021, arXiv 2104.14294), with iBOT's patch loss (2111.07832) and DINOv2's KoLeo (2304.07193).

A student learns the assignments to prototypes that its teacher makes of other crops of the image. With g the logits of
a network's head, P_s = softmax(g_s / T_s) and P_t = softmax((g_t - c) / T_t), the loss is the mean over pairs of views

    L = mean_{x in large crops} mean_{x' in all crops, x' != x}  -sum_k P_t(x)_k log P_s(x')_k          (eqs. 1 and 3)

The teacher's weights follow the student's by an exponential moving average (section 3.1). The centre c is the running
mean of the teacher's logits (eq. 4): together with a low temperature T_t it prevents that all images get one prototype
or all get none. `centering: sinkhorn_knopp` balances the prototypes over the batch instead (SwAV, DINOv2).

The patch loss is the same cross-entropy for the tokens of masked patches, which the student does not see: the teacher
sees the whole crop (iBOT, eq. 2). KoLeo spreads the features of different images (DINOv2, section 4).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from firstlight.tasks.counter_rng import derive_keys
from firstlight.tasks.joint_embedding.projector import ProjectorPooling, choose_pooling
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, pooled_size
from firstlight.tasks.nn.heads import HeadNorm
from firstlight.tasks.pretrain.method import BatchRequirements, Method, TrainingInfo, ViewGroup
from firstlight.tasks.self_distillation.attention_maps import draw_class_attention
from firstlight.tasks.self_distillation.centering import Center, balance_assignments, sharpen_centred
from firstlight.tasks.self_distillation.multi_crop import choose_local_side, compose_crop_ops
from firstlight.tasks.self_distillation.patch_masks import choose_patches, draw_block_masks, gather_patches, is_maskable
from firstlight.tasks.self_distillation.prototype_head import PrototypeHead
from firstlight.tasks.self_distillation.prototype_losses import cross_view_loss, koleo_loss, masked_patch_loss
from firstlight.tasks.self_distillation.view_embedding import EmbeddedView, embed_views
from firstlight.tasks.teacher import Teacher, raise_momentum
from firstlight.tasks.visuals import ImageGrid

# The views that the teacher sees.
GLOBAL_VIEWS = 2
# MASK_STREAM + k is the stream of the mask of view k.
MASK_STREAM = 0xD140


class Dino(Method):
    """The method with a student and its teacher, each an encoder and a head.

    The first two views of an image are large crops, which both networks see; the others are small crops for the
    student. Views of one size pass a network as one batch.

    `local_views`: the number of small crops of an image (8 in the authors' code, 10 in the paper's best models).
    `prototypes`: the number of prototypes (the paper's K; 65,536 in section 3.2, for ImageNet).
    `hidden`: the widths of the hidden layers of the head (two of 2048 in section 3.2).
    `bottleneck`: the number of features that the head compares with the prototypes (256 in section 3.2 and appendix C).
    `norm`: the normalisation of the head's hidden layers. The authors have `none` for ViTs (section 3.2), and batch
    normalisation for convolutional networks that train with SGD (their code).
    `learn_lengths`: true trains the lengths of the prototypes, which are 1 otherwise (false in the authors' code, but
    true for ViT-S).
    `frozen_epochs`: the number of epochs in the beginning in which the prototypes stay as they are (1 in appendix A).
    `student_temperature`: the temperature of the student's softmax (eq. 1; 0.1 in section 3.2).
    `warmup_temperature`: the temperature of the teacher's softmax in the first epoch (0.04 in section 3.2).
    `teacher_temperature`: the temperature of the teacher's softmax after the warm-up (0.07 in section 3.2).
    `warmup_epochs`: the number of epochs in which the teacher's temperature rises linearly, from epoch to epoch (30 in
    section 3.2).
    `momentum`: the momentum of the teacher's weights in the first step (0.996 in section 3.1). It rises by a cosine.
    `momentum_end`: the momentum of the teacher's weights after the last step (1 in section 3.1).
    `centering`: `mean` subtracts the running mean of the teacher's logits (DINO, eq. 4), `sinkhorn_knopp` balances the
    use of the prototypes within the global batch (DINOv2, section 4).
    `center_momentum`: the momentum of that mean (eq. 4; 0.9 in the authors' code).
    `patch_loss`: the weight of the loss of masked patches, which needs a ViT (1 in iBOT and DINOv2). 0: no patch is
    masked.
    `patch_head`: `shared` is one head for class tokens and patches (iBOT, section 4.3), `own` another one for patches
    (DINOv2, section 4).
    `mask_probability`: the probability that patches of a large crop are masked (0.5 in iBOT, section 4.1, and in
    DINOv2).
    `mask_ratio`: the share of masked patches, where some are: uniform between these (0.1 and 0.5 in iBOT, section 4.1).
    `koleo`: the weight of KoLeo on the pooled features of each large crop (DINOv2: 0.1). 0: none.
    `exported`: the network that later stages receive (the teacher in section 3.1).
    `pool`: the pooling of the feature map. null: `cls` if the encoder has a class token, otherwise `avg`.
    """

    title: ClassVar[str] = "DINO (iBOT's patch loss and DINOv2's KoLeo are settings of it)"
    paper: ClassVar[str] = (
        "Caron et al. 2021, Emerging properties in self-supervised vision transformers, "
        "https://arxiv.org/abs/2104.14294; iBOT: https://arxiv.org/abs/2111.07832; DINOv2: "
        "https://arxiv.org/abs/2304.07193"
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "The weight decay is that of the recipe's optimiser: `weight_decay_end: 0.4` lets it rise as in the paper.",
        "If gradients are clipped, it is by their norm over all parameters; the authors clip each parameter's.",
        "While the prototypes are frozen, their gradient is zero: weight decay changes their lengths, which the "
        "normalisation takes away; the authors leave them out of the optimiser's step.",
        "There is no stochastic depth (`drop_path` 0.1 in the authors' code for ViTs).",
        "Crops are resampled bilinearly; the authors resample bicubically.",
        "Where a recipe gives no views, small crops of images below 64 pixels cover 0.2 to 0.4 of the area, and "
        "nothing is blurred; the paper has no such images.",
        "The centre of the patch loss is the mean over masked tokens (DINOv2, lightly); in iBOT's code it is over all.",
        "KoLeo looks for neighbours among the images of all workers; in DINOv2's code among those of one.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        local_views: Annotated[int, Ge(0), Le(30)] = 8,
        prototypes: Annotated[int, Ge(2)] = 4096,
        hidden: tuple[Annotated[int, Ge(1)], ...] = (2048, 2048),
        bottleneck: Annotated[int, Ge(1)] = 256,
        norm: HeadNorm = "none",
        learn_lengths: bool = False,
        frozen_epochs: Annotated[int, Ge(0)] = 1,
        student_temperature: Annotated[float, Gt(0.0)] = 0.1,
        warmup_temperature: Annotated[float, Gt(0.0)] = 0.04,
        teacher_temperature: Annotated[float, Gt(0.0)] = 0.07,
        warmup_epochs: Annotated[int, Ge(0)] = 30,
        momentum: Annotated[float, Ge(0.0), Le(1.0)] = 0.996,
        momentum_end: Annotated[float, Ge(0.0), Le(1.0)] = 1.0,
        centering: Literal["mean", "sinkhorn_knopp"] = "mean",
        center_momentum: Annotated[float, Ge(0.0), Lt(1.0)] = 0.9,
        patch_loss: Annotated[float, Ge(0.0)] = 0.0,
        patch_head: Literal["shared", "own"] = "shared",
        mask_probability: Annotated[float, Ge(0.0), Le(1.0)] = 0.5,
        mask_ratio: tuple[Annotated[float, Gt(0.0), Lt(1.0)], Annotated[float, Gt(0.0), Lt(1.0)]] = (0.1, 0.5),
        koleo: Annotated[float, Ge(0.0)] = 0.0,
        exported: Literal["teacher", "student"] = "teacher",
        pool: ProjectorPooling | None = None,
    ) -> None:
        super().__init__(encoder, info)
        if patch_loss:
            _check_patches(encoder, pool, patch_loss, patch_head)
        self.pool = choose_pooling(encoder, pool)
        if mask_ratio[0] > mask_ratio[1]:
            raise ValueError(f"mask_ratio: {list(mask_ratio)} does not rise; valid: the smaller share first")
        self.num_views = GLOBAL_VIEWS + local_views
        self.student_temperature, self.frozen_epochs = student_temperature, frozen_epochs
        self.warmup = (warmup_temperature, teacher_temperature, warmup_epochs)
        self.momenta, self.centering, self.exported = (momentum, momentum_end), centering, exported
        self.patch_weight, self.koleo_weight = patch_loss, koleo
        self.mask_probability, self.mask_ratio = mask_probability, mask_ratio
        build_head = partial(
            PrototypeHead,
            hidden=hidden,
            bottleneck=bottleneck,
            prototypes=prototypes,
            norm=norm,
            learn_lengths=learn_lengths,
        )
        self.head, self.center = build_head(pooled_size(encoder, self.pool)), Center(prototypes, center_momentum)
        self.teacher_encoder, self.teacher_head = Teacher(encoder), Teacher(self.head)
        self.patch_head: PrototypeHead | None = None
        if patch_loss:
            self.mask_token = nn.Parameter(torch.zeros(encoder.shapes[-1][0]))
            self.patch_center = Center(prototypes, center_momentum)
            if patch_head == "own":
                self.patch_head = build_head(encoder.shapes[-1][0])
                self.teacher_patch_head = Teacher(self.patch_head)
        self.begin_epoch(0)
        self.begin_step(0)

    @classmethod
    def requirements(cls, parameters: Mapping[str, Any]) -> BatchRequirements:
        return BatchRequirements(views=GLOBAL_VIEWS + parameters["local_views"])

    @classmethod
    def default_views(
        cls, augment: tuple[Mapping[str, Any], ...], image_size: int, parameters: Mapping[str, Any]
    ) -> tuple[ViewGroup, ...]:
        first, second, small = compose_crop_ops(augment, image_size)
        groups = [ViewGroup(1, image_size, first), ViewGroup(1, image_size, second)]
        if parameters["local_views"]:
            groups.append(ViewGroup(parameters["local_views"], choose_local_side(image_size), small))
        return tuple(groups)

    def exported_encoder(self) -> Encoder:
        return self.encoder if self.exported == "student" else self._teacher_network

    @property
    def _teacher_network(self) -> Encoder:
        return self.teacher_encoder.network  # type: ignore[return-value]

    def begin_epoch(self, epoch: int) -> None:
        """Sets the teacher's temperature, and freezes the prototypes in the first epochs."""
        first, last, count = self.warmup
        # The last epoch of the warm-up has the last temperature, as numpy's linspace gives it in the authors' code.
        self.temperature = first + (last - first) * epoch / (count - 1) if epoch < count - 1 else last
        if epoch == 0 and count == 1:
            self.temperature = first
        for head in (self.head, self.patch_head):
            if head is not None:
                head.prototypes.is_frozen = epoch < self.frozen_epochs

    def begin_step(self, step: int) -> None:
        start, end = self.momenta
        self.momentum = raise_momentum(start, step, self.info.steps, end)

    def end_step(self) -> None:
        """Moves the teacher towards the student, and takes the batch into the centres."""
        super().end_step()
        self.teacher_encoder.follow(self.encoder, self.momentum)
        self.teacher_head.follow(self.head, self.momentum)
        self.center.commit()
        if self.patch_weight:
            self.patch_center.commit()
        if self.patch_head is not None:
            self.teacher_patch_head.follow(self.patch_head, self.momentum)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns logits (B, views, K) of the student and (B, 2, K) of the teacher.

        With KoLeo, (B, 2, C) features of the student follow; with the patch loss, (B, P, K) logits of the student and
        the teacher for patches of the large crops, and their (B, P) weights in the loss.
        """
        views = batch.views[: self.num_views]
        with torch.no_grad():
            taught = embed_views(self._teacher_network, views[:GLOBAL_VIEWS], self.pool)
            targets = self._assign_prototypes(self.teacher_head, [view.pooled for view in taught])
        masks = self._draw_masks(batch, [view.map for view in taught]) if self.patch_weight else None
        replacement = None if masks is None else (masks, self.mask_token)
        seen = embed_views(self.encoder, views[:GLOBAL_VIEWS], self.pool, replacement)
        rest = embed_views(self.encoder, views[GLOBAL_VIEWS:], self.pool)
        outputs = [self._assign_prototypes(self.head, [view.pooled for view in (*seen, *rest)]), targets]
        if self.koleo_weight:
            features = torch.stack([view.pooled for view in seen], 1)
            outputs.append(features.to(torch.promote_types(features.dtype, torch.float32)))
        if masks is not None:
            outputs += self._embed_patches(seen, taught, masks)
        return tuple(outputs)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(outputs[0].device.type, enabled=False):
            logits, taught, *others = outputs
            targets = self._make_targets(taught.detach(), self.center)
            terms = {"dino_loss": cross_view_loss(targets, logits, self.student_temperature)}
            total = terms["dino_loss"]
            if self.koleo_weight:
                features = others.pop(0)
                terms["koleo_loss"] = torch.stack([koleo_loss(of_view) for of_view in features.unbind(1)]).sum()
                total = total + self.koleo_weight * terms["koleo_loss"]
            if self.patch_weight:
                patches, taught_patches, weights = others
                weights = weights.detach()
                patch_targets = self._make_targets(taught_patches.detach(), self.patch_center, weights > 0)
                terms["patch_loss"] = masked_patch_loss(patch_targets, patches, weights, self.student_temperature)
                total = total + self.patch_weight * terms["patch_loss"]
            entropy = torch.special.entr(targets).sum(-1).mean()
        return {"loss": total, **terms, "target_entropy": entropy}

    def image_grids(self, batch: Batch, subject: str = "held-out images") -> tuple[ImageGrid, ...]:
        """Returns the attention of the class token (figure 1) for a ViT; nothing for other encoders."""
        return draw_class_attention(self.exported_encoder(), batch.views[0], subject)

    def _assign_prototypes(self, head: nn.Module, pooled: Sequence[Tensor]) -> Tensor:
        """Returns (B, views, K) logits of the (B, C) features of views; they pass the head as one batch."""
        logits: Tensor = head(torch.cat(tuple(pooled)))
        return torch.stack(logits.chunk(len(pooled)), 1)

    def _make_targets(self, taught: Tensor, center: Center, counted: Tensor | None = None) -> Tensor:
        """Returns the (B, n, K) probabilities of a teacher's logits, and shows them to the centre.

        `counted`: (B, n) bool, those that count for the centre or the balance; None: all.
        """
        if self.centering == "sinkhorn_knopp":
            flat = None if counted is None else counted.flatten()
            return balance_assignments(taught.flatten(0, 1), self.temperature, flat).view_as(taught)
        targets = sharpen_centred(taught, center.value, self.temperature)
        center.observe(taught, counted)
        return targets

    def _draw_masks(self, batch: Batch, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns a (B, h, w) mask of each large crop, whose (B, C, h, w) maps are given.

        Masks of one size are drawn together: it takes thousands of small operators, however many they are.
        """
        masks: dict[int, Tensor] = {}
        for rows, columns in dict.fromkeys(map_.shape[2:] for map_ in maps):
            views = [view for view, map_ in enumerate(maps) if map_.shape[2:] == (rows, columns)]
            keys = [derive_keys(self.info.seed, batch.passes, batch.ids, MASK_STREAM + view) for view in views]
            drawn = draw_block_masks(torch.cat(keys), rows, columns, self.mask_probability, self.mask_ratio)
            masks |= zip(views, drawn.chunk(len(views)), strict=True)
        return [masks[view] for view in range(len(maps))]

    def _embed_patches(
        self, seen: Sequence[EmbeddedView], taught: Sequence[EmbeddedView], masks: Sequence[Tensor]
    ) -> list[Tensor]:
        """Returns (B, P, K) logits of student and teacher for masked patches, and their (B, P) weights in the loss."""
        places, weights = choose_patches(masks, self.mask_ratio[1])
        own_heads = None if self.patch_head is None else (self.patch_head, self.teacher_patch_head)
        heads = own_heads or (self.head, self.teacher_head)
        tokens = [gather_patches([view.map for view in views], places) for views in (seen, taught)]
        logits = [
            head(of_network.flatten(0, 1)).unflatten(0, of_network.shape[:2])
            for head, of_network in zip(heads, tokens, strict=True)
        ]
        return [*logits, weights.to(logits[0].dtype)]


def _check_patches(encoder: Encoder, pool: ProjectorPooling | None, patch_loss: float, patch_head: str) -> None:
    """Checks that patches of the encoder's images can be masked, and that the head fits them.

    Raises:
        ValueError: names the parameter and the valid value.
    """
    if not is_maskable(encoder):
        name = encoder.spec.get("model", encoder.spec["name"])
        raise ValueError(f"patch_loss: {patch_loss:g} needs one ViT with a class token, which {name} is not; valid: 0")
    if patch_head == "shared" and choose_pooling(encoder, pool) == "cls_avg":
        raise ValueError("patch_head: shared is not valid with pool: cls_avg, which has more features; valid: own")
