"""Distillation of features: a network learns to give what a larger one, which stays as it is, gives of the same views.

The teacher is any encoder with weights; no label is used. With the student's deepest map s and the teacher's t of one
view of an image, and a projection P of the student's features to the size of the teacher's,

    L = 1 - cos(P(pool s), pool t) + w (1/n sum over positions g of 1 - cos(Q s_g, t_g))

averaged over images. The second term is of the maps, where both have the same n positions; Q is linear. That features
rather than predictions are matched is of Romero et al. 2015 (FitNets, arXiv 1412.6550), and that student and teacher
see the same augmented view, for a long time, of Beyer et al. 2022 (arXiv 2106.05237).
"""

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder, MapPooling, NetworkSection, build_section, pool_maps, pooled_size
from firstlight.tasks.nn.heads import build_mlp
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.pretrain.method import Method, TrainingInfo


class Distillation(Method):
    """The method with a projection from the student's pooled feature to the teacher's, and one from map to map.

    The teacher is in evaluation mode throughout, in bfloat16 on GPUs, and is no part of checkpoints: a resumed training
    loads it again. Logged with the loss are its terms.

    `teacher`: the network that is learned from: the keys of the section `encoder`, with `weights`.
    `teacher_size`: the side in pixels of the teacher's images; views are resized to it by bilinear interpolation with
    antialiasing. null: views are taken as they are.
    `map_weight`: w, the weight of the maps' term. null: 1 where the deepest maps of both have the same positions, and 0
    elsewhere.
    `hidden`: the widths of the hidden layers of the projection of pooled features. []: it is linear.
    `teacher_pool`: as `pool`, of the teacher.
    """

    title: ClassVar[str] = "Distillation of a frozen network's features"
    paper: ClassVar[str] = (
        "None as it is here; features: Romero et al. 2015, https://arxiv.org/abs/1412.6550; the same views for both: "
        "Beyer et al. 2022, https://arxiv.org/abs/2106.05237"
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "The distance is one minus the cosine; FitNets take the squared distance of maps amid both networks.",
        "Features are matched, without any label; Beyer et al. match the predicted classes.",
        "Views are resized to the teacher's size by interpolation, so that it sees no more detail than the student.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        teacher: NetworkSection,
        teacher_size: Annotated[int, Ge(4)] | None = None,
        map_weight: Annotated[float, Ge(0.0)] | None = None,
        hidden: tuple[Annotated[int, Ge(1)], ...] = (),
        teacher_pool: MapPooling = "avg",
        pool: MapPooling = "avg",
        norm: Norm = "batch",
    ) -> None:
        super().__init__(encoder, info)
        self.teacher_size, self.pool, self.teacher_pool = teacher_size, pool, teacher_pool
        network = info.teacher or build_section(teacher, teacher_size or encoder.image_size, "teacher")
        # The list hides the network from the state of the module: it is neither trained, nor saved, nor sent to
        # workers.
        self._frozen = [network.eval().requires_grad_(False)]
        try:
            size = pooled_size(network, teacher_pool)
        except ValueError as error:
            raise ValueError(f"teacher_{error}") from None
        self.head = build_mlp(pooled_size(encoder, pool), tuple(hidden), size, dropout=0.0, norm=norm)
        own, other = encoder.shapes[-1], network.shapes[-1]
        fits = own[1:] == other[1:]
        if map_weight and not fits:
            raise ValueError(
                f"map_weight: {map_weight:g} is not valid: the deepest map has {own[1]}x{own[2]} positions, and the "
                f"teacher's {other[1]}x{other[2]}; valid: 0, null, or a teacher_size with as many"
            )
        self.map_weight = float(fits) if map_weight is None else map_weight
        self.map_head = nn.Conv2d(own[0], other[0], 1) if self.map_weight else None

    @property
    def teacher(self) -> Encoder:
        """The frozen network."""
        return self._frozen[0]

    def list_networks(self) -> list[nn.Module]:
        return [*super().list_networks(), self.teacher]

    def move_to_device(self, device: torch.device) -> None:
        super().move_to_device(device)
        self.teacher.to(device)

    @torch.no_grad()
    def read_teacher(self, images: Tensor) -> list[Tensor]:
        """Returns the teacher's (B, D) pooled features of images, and its (B, D, h, w) maps if they are learned from.

        They are in float32, or in float64 for a teacher in float64.
        """
        kind = next(self.teacher.parameters()).dtype
        images = images.to(kind)
        if self.teacher_size is not None and images.shape[-1] != self.teacher_size:
            size = (self.teacher_size, self.teacher_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        device = images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            maps = self.teacher(images)
            found = [pool_maps(maps, self.teacher_pool), *([maps[-1]] if self.map_head is not None else [])]
        return [tensor.to(kind) for tensor in found]

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the projected pooled features of the student and those of the teacher; then their maps, if w > 0."""
        images = batch.views[0]
        maps = self.encoder(images)
        own: list[Tensor] = [self.head(pool_maps(maps, self.pool))]
        if self.map_head is not None:
            own.append(self.map_head(maps[-1]))
        pairs = zip(own, self.read_teacher(images), strict=True)
        return tuple(tensor for pair in pairs for tensor in pair)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(outputs[0].device.type, enabled=False):
            terms = {"feature_distance": cosine_distance(outputs[0], outputs[1])}
            total = terms["feature_distance"]
            if self.map_head is not None:
                terms["map_distance"] = cosine_distance(outputs[2], outputs[3])
                total = total + self.map_weight * terms["map_distance"]
        return {"loss": total, **terms}


def cosine_distance(own: Tensor, target: Tensor) -> Tensor:
    """Returns the mean over all but dimension 1 of 1 - cos of (B, D, ...) along it, without gradient in `target`."""
    kind: Any = torch.promote_types(own.dtype, torch.float32)
    return (1.0 - F.cosine_similarity(own.to(kind), target.detach().to(kind), dim=1)).mean()
