"""Semantic segmentation: a class for every pixel, by the denoising auto-encoder's decoder or a head of torchvision."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.collective import mean_count_per_worker
from firstlight.tasks.downstream.multilabel import mean_without_nan
from firstlight.tasks.downstream.task import LayerDecay, Scores, Task, TrainedPart, at_least_float32
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.backbones import replace_batch_norm
from firstlight.tasks.nn.decoder import Decoder, Shortcuts, make_deconvolution
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.nn.weight_init import Init, initialize_weights

# The value of a mask for pixels that are neither learned nor counted.
VOID_CLASS = 255


class MirrorHead(nn.Module):
    """The decoder of the denoising auto-encoder with a last layer that gives classes (Dong et al., section 4.2.4)."""

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

    `head`: the layers on the encoder: `mirror` is the decoder that mirrors the encoder; torchvision's `fcn` (Long et
    al. 2015) and `deeplab` (Chen et al. 2017) take the deepest map.
    `shortcuts`: the shortcuts from the encoder to the `mirror` decoder.
    `init`: the initialisation of the `mirror` decoder.
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

    def compute_logits(self, images: Tensor) -> Tensor:
        """Returns the (B, classes, S, S) logits of (B, 3, S, S) images."""
        return at_least_float32(self.head(self.encoder(images), images.shape[-1]))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.compute_logits(batch.views[0]),)

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
        """Returns (B, C, C) int32: the number of pixels of each image by true and predicted class."""
        predicted = torch.stack([self.compute_logits(view) for view in batch.views]).mean(0).argmax(1)
        return (confusion_counts(predicted, batch.targets["mask"].long(), self.classes),)

    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        """Returns intersection over union over all pixels of the set, as VOC does.

        It is true positives / (true positives + false positives + false negatives).
        """
        counts = rows[0].double().sum(0)
        hits = counts.diagonal()
        # 0 / 0 is NaN: the class neither occurs nor is predicted.
        ious = (hits / (counts.sum(0) + counts.sum(1) - hits)).tolist()
        return {
            "mean_iou": mean_without_nan(ious),
            "pixel_accuracy": float(hits.sum() / counts.sum().clamp_min(1)),
            "iou": ious,
        }

    def draw_predictions(self, batch: Batch) -> dict[str, Tensor]:
        image = batch.views[0]
        return {
            "image": image,
            "truth": overlay_classes(image, batch.targets["mask"].long()),
            "predicted": overlay_classes(image, self.compute_logits(image).argmax(1)),
        }


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
