"""Object detection: torchvision's Faster R-CNN (Ren et al. 2015) around an encoder, or its Fast R-CNN (Girshick 2015) on windows that slide over the
image, as self-supervised networks are compared on PASCAL VOC.
"""

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, MinLen
from torch import Tensor, nn

from firstlight.tasks.downstream.multilabel import eleven_point, mean_known
from firstlight.tasks.downstream.segment import palette
from firstlight.tasks.downstream.task import Decay, Scores, Task, Train
from firstlight.tasks.downstream.windows import RATIOS, Windows
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN

KEPT = 100  # detections of an image that are scored
AT_A_TIME = 8  # images that are looked at
Positive = Annotated[int, Ge(1)]


class Backbone(nn.Module):
    """The encoder as torchvision wants it: its deepest map, or a pyramid over its maps (Lin et al. 2017)."""

    def __init__(self, encoder: Encoder, levels: list[int], pyramid: int) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.encoder, self.levels = encoder, levels
        widths = [encoder.shapes[level][0] for level in levels]
        self.pyramid = FeaturePyramidNetwork(widths, pyramid) if pyramid else None
        self.out_channels = pyramid or widths[-1]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.encoder(x)
        chosen = OrderedDict((str(level), maps[level]) for level in self.levels)
        return chosen if self.pyramid is None else self.pyramid(chosen)


class Detect(Task):
    """`anchors`: sides of the proposed boxes in pixels; with a pyramid they are dealt out to its levels, shallow to deep. `pyramid`: channels of a
    feature pyramid over the deepest map of each of the last four resolutions; 0: the deepest map alone. `hidden`: of the two layers of the box head.
    `overlap`: of boxes of one class of which the better one is kept. `sampled`: proposals of an image that the box head learns from at a step, up to
    a quarter of them of objects (64 in Girshick 2015, 512 in torchvision); with a small network most of the time goes there. `proposals`: where an
    object may be is told by a `network` that is trained with the rest (Faster R-CNN), or is each of the `windows` with the anchors' sides (Fast
    R-CNN on dense boxes, Girshick 2015, section 5.5).
    """

    target = "boxes"
    measure = "map_11point"
    by_class = "ap_11point"

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        train: Train = "all",
        layer_decay: Decay = 1.0,
        anchors: Annotated[tuple[Positive, ...], MinLen(1)] = (32, 64, 128, 256),
        pyramid: Annotated[int, Ge(0)] = 0,
        hidden: Positive = 1024,
        overlap: Annotated[float, Ge(0.0)] = 0.5,
        sampled: Positive = 512,
        proposals: Literal["network", "windows"] = "network",
    ) -> None:
        super().__init__(encoder, classes, train=train, layer_decay=layer_decay)
        levels = _levels(encoder) if pyramid else [len(encoder.shapes) - 1]
        if pyramid and len(anchors) != len(levels):
            raise ValueError(
                f"anchors: {list(anchors)} are {len(anchors)} for the {len(levels)} levels of the pyramid; valid: one a level"
            )
        self.detector = _detector(
            Backbone(encoder, levels, pyramid), encoder.image_size, classes, anchors, hidden, overlap, sampled
        )
        if proposals == "windows":
            self.detector.rpn = Windows(anchors)  # type: ignore[assignment]

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The losses of torchvision's network, means over this worker's images; each as (B,), equal in all rows."""
        losses = self.detector(list(batch.views[0]), [_without_difficult(*truth) for truth in _rows(batch)])
        return tuple(losses[name].expand(len(batch.ids)) for name in sorted(losses))

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        names = ("loss_box_reg", "loss_classifier", "loss_objectness", "loss_rpn_box_reg")[
            : len(outputs)
        ]  # the last two of Faster R-CNN
        parts = {name: output.mean() for name, output in zip(names, outputs, strict=True)}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def observe(self, batch: Batch) -> tuple[Tensor, ...]:
        """(B, KEPT, 6) detections: box, score, class; (B, K, 6) truth: box, class, difficult. Unused rows have class -1."""
        found = torch.full((len(batch.ids), KEPT, 6), -1.0, device=batch.ids.device)
        for row, seen in enumerate(self._seen(batch.views[0])):
            n = len(seen["scores"])
            found[row, :n] = torch.cat((seen["boxes"], seen["scores"][:, None], seen["labels"][:, None] - 1), 1)
        columns = [
            batch.targets["boxes"],
            batch.targets["box_classes"][..., None],
            batch.targets["difficult"][..., None],
        ]
        return found, torch.cat([column.float() for column in columns], 2)

    def _seen(self, images: Tensor) -> list[dict[str, Tensor]]:
        """What torchvision's network finds in each image; a few at a time, as all proposals of an image are looked at."""
        return [seen for few in images.split(AT_A_TIME) for seen in self.detector(list(few))]

    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        found, truth = (row.cpu() for row in rows)
        both = [average_precisions(found, truth, c) for c in range(self.classes)]
        exact, eleven = (list(column) for column in zip(*both, strict=True))
        return {
            "map_11point": mean_known(eleven),
            "map_50": mean_known(exact),
            "map_coco": coco(found, truth),
            "ap_11point": eleven,
        }

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.views[0]
        truth = [(boxes, classes) for boxes, classes, _ in _rows(batch)]
        seen = [(d["boxes"][d["scores"] > 0.5], d["labels"][d["scores"] > 0.5] - 1) for d in self._seen(images)]
        return {"truth": _drawn(images, truth), "predicted": _drawn(images, seen)}


def _levels(encoder: Encoder) -> list[int]:
    """The deepest map of each of the last four resolutions."""
    deepest = {shape[1]: level for level, shape in enumerate(encoder.shapes)}
    return sorted(deepest.values())[-4:]


def _detector(
    backbone: Backbone, size: int, classes: int, anchors: tuple[int, ...], hidden: int, overlap: float, sampled: int
) -> "FasterRCNN":
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    sizes = tuple((side,) for side in anchors) if backbone.pyramid else (anchors,)
    return FasterRCNN(
        backbone,
        min_size=size,
        max_size=size,
        fixed_size=(size, size),  # images come in the network's size
        size_divisible=1,
        image_mean=[0.0, 0.0, 0.0],  # the encoder normalises
        image_std=[1.0, 1.0, 1.0],
        rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign([str(level) for level in backbone.levels], output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(backbone.out_channels * 49, hidden),
        box_predictor=FastRCNNPredictor(hidden, classes + 1),
        box_nms_thresh=overlap,
        box_batch_size_per_image=sampled,
        box_detections_per_img=KEPT,
    )


def _rows(batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes (k, 4), classes (k,) and difficult (k,) of each image."""
    targets = zip(batch.targets["boxes"], batch.targets["box_classes"], batch.targets["difficult"], strict=True)
    return [
        (boxes[classes >= 0], classes[classes >= 0], difficult[classes >= 0]) for boxes, classes, difficult in targets
    ]


def _without_difficult(boxes: Tensor, classes: Tensor, difficult: Tensor) -> dict[str, Tensor]:
    """What torchvision's network learns from: its class 0 is the background."""
    return {"boxes": boxes[~difficult].float(), "labels": classes[~difficult] + 1}


def average_precisions(found: Tensor, truth: Tensor, kind: int) -> tuple[float, float]:
    """Of one class, by VOC's rules at an overlap of at least 0.5 (Everingham et al. 2010, section 4.4): the area under the precision envelope (since
    2010), and the mean over eleven recalls (2007). Rows as `Detect.observe`. A second detection of an object is false; one of a difficult object
    counts for nothing. NaN where the set has no object of the class that is not difficult.
    """
    wanted = int(((truth[..., 4] == kind) & (truth[..., 5] == 0)).sum())
    if not wanted:
        return math.nan, math.nan
    scores, right = _judged(found, truth, kind)
    order = np.argsort(-scores, kind="stable")
    hits = right[order].cumsum()
    recall, precision = hits / wanted, hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum()), eleven_point(precision, recall)


def _judged(found: Tensor, truth: Tensor, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (m,) of the detections of a class that count, and whether each is right (m,) bool."""
    from torchvision.ops import box_iou

    scores, right = [], []
    for seen, real in zip(found, truth, strict=True):
        seen, real = seen[seen[:, 5] == kind], real[real[:, 4] == kind]
        seen = seen[seen[:, 4].argsort(descending=True, stable=True)]
        overlaps = box_iou(seen[:, :4], real[:, :4])
        taken = set[int]()
        for row, score in enumerate(seen[:, 4].tolist()):
            best = int(overlaps[row].argmax()) if len(real) else -1
            hit = best >= 0 and float(overlaps[row, best]) >= 0.5
            if hit and bool(real[best, 5]):
                continue
            scores.append(score)
            right.append(hit and best not in taken)
            taken |= {best} if hit else set()
    return np.array(scores), np.array(right, bool)


def coco(found: Tensor, truth: Tensor) -> float:
    """Mean average precision over overlaps 0.5 .. 0.95 and classes, by pycocotools; difficult objects count for nothing."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision()
    for seen, real in zip(found, truth, strict=True):
        seen, real = seen[seen[:, 5] >= 0], real[real[:, 4] >= 0]
        objects = {"boxes": real[:, :4], "labels": real[:, 4].long(), "iscrowd": real[:, 5].long()}
        metric.update([{"boxes": seen[:, :4], "scores": seen[:, 4], "labels": seen[:, 5].long()}], [objects])
    return max(float(metric.compute()["map"]), 0.0)  # -1: there are no objects


def _drawn(images: Tensor, found: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(B, 3, H, W) in 0..1 with boxes (k, 4) of classes (k,), a colour a class."""
    from torchvision.utils import draw_bounding_boxes

    colours = (palette(256) * 255).int().tolist()
    drawn = []
    for image, (boxes, classes) in zip(images.cpu(), found, strict=True):
        outlines = [tuple(colours[1 + c % 255]) for c in classes.tolist()]
        drawn.append(draw_bounding_boxes(image, boxes.cpu(), colors=outlines) if len(boxes) else image)
    return torch.stack(drawn)
