"""Semantic segmentation: a class for every pixel, by the denoising auto-encoder's decoder or a head of torchvision."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.collective import mean_count_per_worker
from firstlight.tasks.downstream.multilabel import mean_without_nan
from firstlight.tasks.downstream.task import LayerDecay, Scores, Task, TrainedPart, at_least_float32
from firstlight.tasks.downstream.whole_images import VOID_CLASS, ImageViews, classify_pixels
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.backbones import replace_batch_norm
from firstlight.tasks.nn.decoder import Decoder, Shortcuts, make_deconvolution
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.nn.weight_init import Init, initialize_weights
from firstlight.tasks.visuals import show_channels

# The fewest classes that the mean over classes says something about.
MIN_SCORED_CLASSES = 2


class MirrorHead(nn.Module):
    """The decoder of the denoising auto-encoder with a last layer that gives classes (Dong et al., section 4.2.4).

    The paper replaces the last deconvolution by a convolution. Where the first layer of the encoder keeps the size of
    the image, as in its Network-2, the deconvolution here is a convolution whose kernel is mirrored.
    """

    def __init__(self, encoder: Encoder, classes: int, *, shortcuts: Shortcuts, norm: Norm, init: Init) -> None:
        super().__init__()
        self.decoder = Decoder(
            encoder.shapes, encoder.input.channels, encoder.image_size, shortcuts=shortcuts, norm=norm, init=init
        )
        self.decoder.last = make_deconvolution(encoder.shapes[0], (classes, encoder.image_size), bias=True)
        initialize_weights(self.decoder.last, init)

    def forward(self, maps: list[Tensor], size: int) -> Tensor:
        return self.decoder.last(self.decoder.compute_features(maps))  # type: ignore[no-any-return]

    def start_from(self, decoder: Decoder) -> None:
        """Copies all layers but the last from a pretrained decoder.

        Raises:
            ValueError: the pretrained decoder is another network.
        """
        own, pretrained = self.decoder.spec, decoder.spec
        for key in ("shapes", "shortcuts", "norm"):
            if own[key] != pretrained[key]:
                raise ValueError(f"{key}: {own[key]} differs from {pretrained[key]} of the pretrained decoder")
        kept = {name: tensor for name, tensor in decoder.state_dict().items() if not name.startswith("last.")}
        self.decoder.load_state_dict(kept, strict=False)


class UpsampledHead(nn.Module):
    """A head of torchvision on the deepest map, scaled up to the image."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, maps: list[Tensor], size: int) -> Tensor:
        return F.interpolate(self.head(maps[-1]), (size, size), mode="bilinear", align_corners=False)


class Segmentation(Task):
    """Classification of every pixel.

    `head`: the layers on the encoder: `mirror` is the decoder that mirrors the encoder, with another last layer (the
    denoising auto-encoder, section 4.2.4); torchvision's `fcn` (Long et al. 2015) and `deeplab` (Chen et al. 2017) take
    the deepest map, and work with every encoder.
    `shortcuts`: the shortcuts from the encoder to the `mirror` decoder (section 4.2.4: as pretrained).
    `init`: the initialisation of the head's weights (`gaussian` in the auto-encoder paper's random networks).
    """

    target = "mask"
    measure = "mean_iou"
    by_class = "iou"

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        train: TrainedPart = "all",
        layer_decay: LayerDecay = 1.0,
        head: Literal["mirror", "fcn", "deeplab"] = "mirror",
        shortcuts: Literal["none", "full"] = "full",
        norm: Norm = "batch",
        init: Init = "default",
    ) -> None:
        super().__init__(encoder, classes, train=train, layer_decay=layer_decay)
        if head == "mirror":
            self.head: nn.Module = MirrorHead(encoder, classes, shortcuts=shortcuts, norm=norm, init=init)
        else:
            self.head = UpsampledHead(replace_batch_norm(_torchvision_head(head, encoder.shapes[-1][0], classes), norm))
            initialize_weights(self.head, init)

    def compute_logits(self, images: Tensor, region: Tensor | None = None) -> Tensor:
        """Returns the (B, classes, S, S) logits of (B, 3, S, S) images.

        `region`: (B, 4), the part of each view that shows the image (`InputNormalization.forward`); None is all of it.
        """
        return at_least_float32(self.head(self.encoder(images, region=region), images.shape[-1]))

    def _first_logits(self, batch: Batch) -> Tensor:
        """Returns the logits of the first view, the one that the masks belong to."""
        return self.compute_logits(batch.views[0], batch.targets.get("region"))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self._first_logits(batch),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Returns the mean cross-entropy over the pixels of the global batch that are not void."""
        (logits,) = outputs
        mask = batch.targets["mask"].long()
        known = mask != VOID_CLASS
        count = mean_count_per_worker(known, logits.dtype)
        loss = F.cross_entropy(logits, mask, ignore_index=VOID_CLASS, reduction="sum") / count
        return {"loss": loss, "pixel_accuracy": ((logits.argmax(1) == mask) & known).sum() / count}

    def start_from(self, networks: Mapping[str, nn.Module]) -> None:
        decoder = networks.get("decoder")
        if not isinstance(self.head, MirrorHead) or not isinstance(decoder, Decoder):
            raise ValueError(
                "head: only 'mirror' starts from a pretrained decoder" if decoder else "there is no pretrained decoder"
            )
        self.head.start_from(decoder)

    def observe(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns (B, C, C) int32: the number of pixels of each image by true and predicted class.

        If the batch has whole masks, these are all pixels of the image that have a class.
        """
        if "whole_mask" in batch.targets:
            return (torch.cat([self._count_whole_image(batch, k) for k in range(len(batch.ids))]),)
        logits = [self._first_logits(batch), *(self.compute_logits(view) for view in batch.views[1:])]
        predicted = torch.stack(logits).mean(0).argmax(1)
        return (confusion_counts(predicted, batch.targets["mask"].long(), self.classes),)

    def _count_whole_image(self, batch: Batch, row: int) -> Tensor:
        """Returns (1, C, C): the counts of one image at its own size, whose windows cover it."""
        width, height = batch.targets["whole_size"][row].tolist()
        windows = batch.targets["windows"][row].tolist()
        # An image that needs fewer windows than others has the last one several times.
        first = [k for k, window in enumerate(windows) if window not in windows[:k]]
        logits = self.compute_logits(torch.stack([batch.views[k][row] for k in first]))
        merged = merge_windows(logits, [windows[k] for k in first], (width, height))
        mask = batch.targets["whole_mask"][row, :height, :width].long()
        return confusion_counts(merged.argmax(0)[None], mask[None], self.classes)

    def predict_images(self, images: Sequence[ImageViews]) -> list[dict[str, Tensor]]:
        """Returns the `mask` of each image, (height, width) uint8 at its own size; VOID_CLASS where no view shows it.

        Logits are averaged where views overlap.
        """
        if all(len(image.views) == 1 for image in images):
            views, regions = (torch.cat(parts) for parts in zip(*((i.views, i.regions) for i in images), strict=True))
            logits = list(self.compute_logits(views, regions).split(1))
        else:
            logits = [self._compute_in_blocks(image, len(images)) for image in images]
        return [{"mask": classify_pixels(one, image)} for one, image in zip(logits, images, strict=True)]

    def _compute_in_blocks(self, image: ImageViews, size: int) -> Tensor:
        """Returns the logits of all views of an image, computed for `size` views at a time."""
        blocks = zip(image.views.split(size), image.regions.split(size), strict=True)
        return torch.cat([self.compute_logits(views, regions) for views, regions in blocks])

    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        """Returns intersection over union over all pixels of the set, as VOC does.

        It is true positives / (true positives + false positives + false negatives). A class that no mask shows has
        none, NaN, whether it is predicted or not. The mean is NaN for fewer than two classes: a network that has
        learned nothing would reach 1.
        """
        counts = rows[0].double().sum(0)
        hits, occurs = counts.diagonal(), counts.sum(1) > 0
        ious = torch.where(occurs, hits / (counts.sum(0) + counts.sum(1) - hits), math.nan).tolist()
        return {
            "mean_iou": mean_without_nan(ious) if int(occurs.sum()) >= MIN_SCORED_CLASSES else math.nan,
            "pixel_accuracy": float(hits.sum() / counts.sum()),
            "iou": ious,
        }

    def draw_predictions(self, batch: Batch) -> dict[str, Tensor]:
        image = show_channels(batch.views[0])
        return {
            "image": image,
            "truth": overlay_classes(image, batch.targets["mask"].long()),
            "predicted": overlay_classes(image, self._first_logits(batch).argmax(1)),
        }


def merge_windows(
    logits: Tensor, windows: Sequence[tuple[float, float, float, float]], size: tuple[int, int]
) -> Tensor:
    """Scales the (V, C, S, S) logits of windows of an image to its pixels, and averages them where windows overlap.

    Args:
        logits: those of each window.
        windows: left, top, width and height of each, in pixels of the image. Together they cover it.
        size: width and height of the image.

    Returns:
        (C, height, width): between the centres of two logits it is linear, towards the edge of a window constant.
    """
    width, height = size
    total, count = logits.new_zeros(logits.shape[1], height, width), logits.new_zeros(height, width)
    for one, (left, top, across, down) in zip(logits, windows, strict=True):
        x, y = _find_pixels_inside(left, across, width), _find_pixels_inside(top, down, height)
        if not (len(x) and len(y)):
            continue
        # -1 and 1 are the edges of the window.
        to_x, to_y = (
            ((pixels.double() + 0.5 - start) / extent * 2 - 1).to(logits)
            for pixels, start, extent in ((x, left, across), (y, top, down))
        )
        grid = torch.stack(torch.meshgrid(to_x, to_y, indexing="xy"), -1)
        scaled = F.grid_sample(one[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]
        rows, columns = slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)
        total[:, rows, columns] += scaled
        count[rows, columns] += 1
    assert bool((count > 0).all()), "windows cover the image"
    return total / count


def _find_pixels_inside(start: float, extent: float, pixels: int) -> Tensor:
    """Returns the numbers of the pixels whose centres lie in an interval; rounding excludes none."""
    first, last = math.ceil(start - 0.5 - 1e-6), math.floor(start + extent - 0.5 + 1e-6)
    return torch.arange(max(first, 0), min(last, pixels - 1) + 1)


def confusion_counts(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Counts the pixels of (B, H, W) masks by true and predicted class, without void pixels.

    Returns (B, classes, classes) int32.
    """
    known = mask != VOID_CLASS
    images = torch.arange(len(mask), device=mask.device)[:, None, None].expand_as(mask)
    cells = (images * classes + mask) * classes + predicted
    return cells[known].bincount(minlength=len(mask) * classes**2).view(-1, classes, classes).int()


def overlay_classes(images: Tensor, mask: Tensor) -> Tensor:
    """Lays a colour over each class of (B, 3, H, W) images in 0..1 with (B, H, W) classes, but not over void pixels."""
    colours = voc_palette(VOID_CLASS + 1).to(images)[mask].permute(0, 3, 1, 2)
    return torch.where((mask == VOID_CLASS)[:, None], images, 0.4 * images + 0.6 * colours)


def voc_palette(count: int) -> Tensor:
    """Returns VOC's (count, 3) colours in 0..1: the bits of the class, distributed over red, green and blue."""
    index = torch.arange(count)
    bits = [sum(((index >> (3 * k + channel)) & 1) << (7 - k) for k in range(3)) for channel in range(3)]
    return torch.stack([torch.as_tensor(channel) for channel in bits], 1) / 255.0


def _torchvision_head(head: str, channels: int, classes: int) -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead

    kind: type[nn.Module] = FCNHead if head == "fcn" else DeepLabHead
    return kind(channels, classes)
