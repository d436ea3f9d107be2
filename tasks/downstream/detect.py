"""Object detection: torchvision's Faster R-CNN (Ren et al. 2015) or Fast R-CNN (Girshick 2015) around an encoder.

Fast R-CNN takes windows that slide over the image as proposals. Self-supervised networks are compared so on PASCAL VOC.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, MinLen
from torch import Tensor, nn

from firstlight.tasks.downstream.classify import ShareBelowOne
from firstlight.tasks.downstream.multilabel import eleven_point_precision, mean_without_nan
from firstlight.tasks.downstream.roi_head import BoxHead, build_roi_pooling, draw_head_weights
from firstlight.tasks.downstream.segment import voc_palette
from firstlight.tasks.downstream.task import LayerDecay, Scores, Task, TrainedPart
from firstlight.tasks.downstream.whole_images import ImageViews, move_boxes_back
from firstlight.tasks.downstream.windows import WINDOW_RATIOS, SlidingWindows
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.timm_backbones import TokenMaps
from firstlight.tasks.nn.weight_init import Init
from firstlight.tasks.visuals import show_channels

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN

# The largest number of detections of an image that are scored.
MAX_DETECTIONS = 100
# The number of images whose objects are detected at a time.
DETECTION_BLOCK = 8
Positive = Annotated[int, Ge(1)]


class DetectionBackbone(nn.Module):
    """The encoder as a backbone of torchvision: its deepest map, or a pyramid over its maps (Lin et al. 2017).

    It takes images that the encoder has normalised.
    """

    def __init__(self, encoder: Encoder, levels: list[int], pyramid: int) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.encoder, self.levels = encoder, levels
        widths = [encoder.shapes[level][0] for level in levels]
        self.pyramid = FeaturePyramidNetwork(widths, pyramid) if pyramid else None
        self.out_channels = pyramid or widths[-1]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.encoder.forward_normalized(x)
        chosen = OrderedDict((str(level), maps[level]) for level in self.levels)
        return chosen if self.pyramid is None else self.pyramid(chosen)


class Detection(Task):
    """Detection of objects by boxes and classes.

    `anchors`: the sides of the proposed boxes in pixels of the network's input; with a pyramid, one for each of its
    levels, shallow to deep.
    `pyramid`: the channels of a feature pyramid over the deepest map of each of the last four resolutions; 0 takes the
    deepest map alone.
    `hidden`: the width of the two layers of the box head.
    `overlap`: the overlap from which only the better one of two boxes of a class is kept.
    `sampled`: the number of proposals of an image that the box head learns from at a step, up to a quarter of them of
    objects (64 in Girshick 2015, 512 in torchvision). With a small network they take most of the time.
    `proposals`: the source of possible boxes: a `network` that is trained with the rest (Faster R-CNN), or all windows
    with the anchors' sides, `windows` (Fast R-CNN on dense boxes, Girshick 2015, section 5.5). NAT's paper takes the
    windows of selective search.
    `last_pool`: the pooling that ends the encoder: `keep`, or `drop` for the map before it, whose positions are half as
    far apart, since pooling by box replaces it (Fast R-CNN, Girshick 2015, section 2.2). `drop` is for encoders that
    end with max-pooling (alexnet, vgg16).
    `roi_pooling`: the pooling of the map in a box: `align` (He et al. 2017) or `max` (Girshick 2015, section 2.1).
    `roi_size`: its positions along each side of a box (Fast R-CNN has 6 with AlexNet, 7 with VGG-16).
    `dropout`: the probability of dropout after both layers of the box head (0.5 in Fast R-CNN).
    `init`: the first weights of all layers but the encoder's; with `gaussian`, as in Fast R-CNN, those that give the
    boxes are N(0, 0.001^2) (Girshick 2015, section 2.3).
    """

    target = "boxes"
    measure = "map_11point"
    by_class = "ap_11point"

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        train: TrainedPart = "all",
        layer_decay: LayerDecay = 1.0,
        anchors: Annotated[tuple[Positive, ...], MinLen(1)] = (32, 64, 128, 256),
        pyramid: Annotated[int, Ge(0)] = 0,
        hidden: Positive = 1024,
        overlap: Annotated[float, Ge(0.0)] = 0.5,
        sampled: Positive = 512,
        proposals: Literal["network", "windows"] = "network",
        last_pool: Literal["keep", "drop"] = "keep",
        roi_pooling: Literal["align", "max"] = "align",
        roi_size: Positive = 7,
        dropout: ShareBelowOne = 0.0,
        init: Init = "default",
    ) -> None:
        if last_pool == "drop":
            encoder.drop_last_pool()
        super().__init__(encoder, classes, train=train, layer_decay=layer_decay)
        _check_spacing(encoder)
        levels = _pyramid_levels(encoder) if pyramid else [len(encoder.shapes) - 1]
        if pyramid and len(anchors) != len(levels):
            raise ValueError(
                f"anchors: {list(anchors)} are {len(anchors)} for the {len(levels)} levels of the pyramid; "
                "valid: one for each level"
            )
        if pyramid and roi_pooling == "max":
            raise ValueError("roi_pooling: 'max' takes boxes from one map, not from a pyramid; valid: align")
        self.anchors = anchors
        backbone = DetectionBackbone(encoder, levels, pyramid)
        self.detector = _build_detector(
            backbone,
            anchors,
            box_head=BoxHead(backbone.out_channels * roi_size**2, hidden, dropout),
            hidden=hidden,
            classes=classes,
            box_nms_thresh=overlap,
            box_batch_size_per_image=sampled,
        )
        # The constructor takes no pooling but its own.
        self.detector.roi_heads.box_roi_pool = build_roi_pooling([str(k) for k in levels], roi_pooling, roi_size)
        if proposals == "windows":
            self.detector.rpn = SlidingWindows(anchors)  # type: ignore[assignment]
        others = (backbone.pyramid, self.detector.rpn, self.detector.roi_heads)
        draw_head_weights([part for part in others if part is not None], self.detector.roi_heads.box_predictor, init)

    def output_layers(self) -> tuple[nn.Module, ...]:
        predictor = self.detector.roi_heads.box_predictor
        return (predictor.cls_score, predictor.bbox_pred)

    def list_networks(self) -> list[nn.Module]:
        """Returns the encoder: the layers on it have results whose sizes depend on values."""
        return [self.encoder]

    def probe_outputs(self, batch: Batch) -> None:
        """Takes windows as proposals: those of a network would change with the layers that it shares."""
        network, self.detector.rpn = self.detector.rpn, SlidingWindows(self.anchors)  # type: ignore[assignment]
        try:
            self.embed(batch)
        finally:
            self.detector.rpn = network

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the losses of torchvision's network, each the mean over this worker's images as (B,) equal rows."""
        truth = [_without_difficult(*found) for found in _split_targets(batch)]
        losses = self.detector(self._list_inputs(batch.views[0], batch.targets.get("region")), truth)
        return tuple(losses[name].expand(len(batch.ids)) for name in sorted(losses))

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        # The last two are Faster R-CNN's.
        names = ("loss_box_reg", "loss_classifier", "loss_objectness", "loss_rpn_box_reg")[: len(outputs)]
        parts = {name: output.mean() for name, output in zip(names, outputs, strict=True)}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def observe(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns (B, MAX_DETECTIONS, 6) detections: box, score, class; and (B, K, 6) truth: box, class, difficult.

        Unused rows have class -1.
        """
        found = torch.full((len(batch.ids), MAX_DETECTIONS, 6), -1.0, device=batch.ids.device)
        for row, seen in enumerate(self.detect_objects(batch.views[0], batch.targets.get("region"))):
            n = len(seen["scores"])
            found[row, :n] = torch.cat((seen["boxes"], seen["scores"][:, None], seen["labels"][:, None] - 1), 1)
        columns = [
            batch.targets["boxes"],
            batch.targets["box_classes"][..., None],
            batch.targets["difficult"][..., None],
        ]
        return found, torch.cat([column.float() for column in columns], 2)

    def _list_inputs(self, images: Tensor, region: Tensor | None) -> list[Tensor]:
        """Returns the images as torchvision's network takes them, normalised by the encoder."""
        return list(self.encoder.normalize_images(images, region))

    def detect_objects(self, images: Tensor, region: Tensor | None = None) -> list[dict[str, Tensor]]:
        """Returns the detections of torchvision's network in each image: `boxes`, `scores`, `labels` (0: background).

        It takes a block of images at a time, since it evaluates all proposals of an image. `region`: (B, 4), the part
        of each view that shows the image (`InputNormalization.forward`); None is all of it.
        """
        inputs = self._list_inputs(images, region)
        blocks = (inputs[start : start + DETECTION_BLOCK] for start in range(0, len(inputs), DETECTION_BLOCK))
        return [seen for block in blocks for seen in self.detector(block)]

    def predict_images(self, images: Sequence[ImageViews]) -> list[dict[str, Tensor]]:
        """Returns the detected objects of each image, the surest first.

        They are `boxes` (k, 4) float64 in pixels of the image, cut at its edges, `scores` (k,) and `labels` (k,), the
        indices of their classes. Every image has one view.
        """
        views, regions = (torch.cat(parts) for parts in zip(*((i.views, i.regions) for i in images), strict=True))
        found = self.detect_objects(views, regions)
        return [
            {"boxes": move_boxes_back(seen["boxes"], image), "scores": seen["scores"], "labels": seen["labels"] - 1}
            for seen, image in zip(found, images, strict=True)
        ]

    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        """Returns mean average precision by VOC's two definitions and by COCO's, and that of each class (2007)."""
        found, truth = (row.cpu() for row in rows)
        both = [detection_average_precisions(found, truth, c) for c in range(self.classes)]
        exact, eleven = (list(column) for column in zip(*both, strict=True))
        return {
            "map_11point": mean_without_nan(eleven),
            "map_50": mean_without_nan(exact),
            "map_coco": coco_average_precision(found, truth),
            "ap_11point": eleven,
        }

    def draw_predictions(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the images with the true boxes, and with the detections of a score above 0.5."""
        images = batch.views[0]
        drawn = show_channels(images)
        truth = [(boxes, classes) for boxes, classes, _ in _split_targets(batch)]
        seen = [
            (d["boxes"][d["scores"] > 0.5], d["labels"][d["scores"] > 0.5] - 1)
            for d in self.detect_objects(images, batch.targets.get("region"))
        ]
        return {"truth": _draw_boxes(drawn, truth), "predicted": _draw_boxes(drawn, seen)}


def _check_spacing(encoder: Encoder) -> None:
    """Checks that the tokens of a ViT are a power of two pixels apart, as torchvision's pooling of boxes takes them.

    The maps of other networks are, up to the rounding of their sizes.

    Raises:
        ValueError: they are not.
    """
    spacing = encoder.image_size / encoder.shapes[-1][1]
    if isinstance(encoder.stages, TokenMaps) and not math.log2(spacing).is_integer():
        raise ValueError(
            f"encoder.patch_size: maps {spacing:g} pixels apart cannot be pooled by boxes; valid: 1, 2, 4, 8, 16 or 32"
        )


def _pyramid_levels(encoder: Encoder) -> list[int]:
    """Returns the index of the deepest map of each of the last four resolutions."""
    deepest = {shape[1]: level for level, shape in enumerate(encoder.shapes)}
    return sorted(deepest.values())[-4:]


def _build_detector(
    backbone: DetectionBackbone, anchors: tuple[int, ...], *, hidden: int, classes: int, **options: Any
) -> "FasterRCNN":
    """Returns torchvision's network; `options` are its own."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    sizes = tuple((side,) for side in anchors) if backbone.pyramid else (anchors,)
    size, channels = backbone.encoder.image_size, backbone.encoder.input_channels
    return FasterRCNN(
        backbone,
        min_size=size,
        max_size=size,
        # Images have the size of the network, and the encoder has normalised them.
        fixed_size=(size, size),
        size_divisible=1,
        image_mean=[0.0] * channels,
        image_std=[1.0] * channels,
        rpn_anchor_generator=AnchorGenerator(sizes, (WINDOW_RATIOS,) * len(sizes)),
        box_predictor=FastRCNNPredictor(hidden, classes + 1),
        box_detections_per_img=MAX_DETECTIONS,
        **options,
    )


def _split_targets(batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns the boxes (k, 4), classes (k,) and difficult (k,) of each image."""
    targets = zip(batch.targets["boxes"], batch.targets["box_classes"], batch.targets["difficult"], strict=True)
    return [
        (boxes[classes >= 0], classes[classes >= 0], difficult[classes >= 0]) for boxes, classes, difficult in targets
    ]


def _without_difficult(boxes: Tensor, classes: Tensor, difficult: Tensor) -> dict[str, Tensor]:
    """Returns the targets of torchvision's network, whose class 0 is the background, without difficult objects."""
    return {"boxes": boxes[~difficult].float(), "labels": classes[~difficult] + 1}


def detection_average_precisions(found: Tensor, truth: Tensor, kind: int) -> tuple[float, float]:
    """Returns two average precisions of one class, by VOC's rules (Everingham et al. 2010, section 4.4).

    They are the area under the precision envelope (since 2010), and the mean over eleven recalls (2007), at an overlap
    of at least 0.5. A second detection of an object is false; a detection of a difficult object is not counted. Both
    are NaN if the set has no object of the class that is not difficult.

    Args:
        found: detections, as `Detection.observe` returns them.
        truth: objects, as `Detection.observe` returns them.
        kind: the class.
    """
    wanted = int(((truth[..., 4] == kind) & (truth[..., 5] == 0)).sum())
    if not wanted:
        return math.nan, math.nan
    scores, right = _match_detections(found, truth, kind)
    order = np.argsort(-scores, kind="stable")
    hits = right[order].cumsum()
    recall, precision = hits / wanted, hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum()), eleven_point_precision(precision, recall)


def _match_detections(found: Tensor, truth: Tensor, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (m,) scores of the detections of a class that count, and (m,) bool, true if a detection is right."""
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


def coco_average_precision(found: Tensor, truth: Tensor) -> float:
    """Returns mean average precision over overlaps 0.5 .. 0.95 and classes, by pycocotools.

    Difficult objects are not counted. It is NaN if there are no others.
    """
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision()
    for seen, real in zip(found, truth, strict=True):
        seen, real = seen[seen[:, 5] >= 0], real[real[:, 4] >= 0]
        objects = {"boxes": real[:, :4], "labels": real[:, 4].long(), "iscrowd": real[:, 5].long()}
        metric.update([{"boxes": seen[:, :4], "scores": seen[:, 4], "labels": seen[:, 5].long()}], [objects])
    # The metric is -1 if there are no objects.
    score = float(metric.compute()["map"])
    return score if score >= 0.0 else math.nan


def _draw_boxes(images: Tensor, found: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Draws boxes (k, 4) of classes (k,) on (B, 3, H, W) images in 0..1, with a colour for each class."""
    from torchvision.utils import draw_bounding_boxes

    colours = (voc_palette(256) * 255).int().tolist()
    drawn = []
    for image, (boxes, classes) in zip(images.cpu(), found, strict=True):
        outlines = [tuple(colours[1 + c % 255]) for c in classes.tolist()]
        drawn.append(draw_bounding_boxes(image, boxes.cpu(), colors=outlines) if len(boxes) else image)
    return torch.stack(drawn)
