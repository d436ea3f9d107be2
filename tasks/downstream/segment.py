"""Semantic segmentation: a class for every pixel, on the mirrored decoder of the denoising auto-encoder or on a head of torchvision's."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlight.tasks.collective import shared_count
from firstlight.tasks.downstream.multilabel import mean_known
from firstlight.tasks.downstream.task import Decay, Scores, Task, Train, in_full
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.backbones import with_norm
from firstlight.tasks.nn.decoder import Decoder, Shortcuts, deconvolution
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.nn.weight_init import Init, initialize

VOID = 255  # of a mask: counts for nothing


class Mirror(nn.Module):
    """The decoder of the denoising auto-encoder with its last layer replaced by one that gives classes (Dong et al., section 4.2.4)."""

    def __init__(self, encoder: Encoder, classes: int, *, shortcuts: Shortcuts, norm: Norm, init: Init) -> None:
        super().__init__()
        self.decoder = Decoder(
            encoder.shapes, encoder.input.channels, encoder.image_size, shortcuts=shortcuts, norm=norm, init=init
        )
        self.decoder.last = deconvolution(encoder.shapes[0], (classes, encoder.image_size), bias=True)
        initialize(self.decoder.last, init)

    def forward(self, maps: list[Tensor], size: int) -> Tensor:
        return self.decoder.last(self.decoder.features(maps))  # type: ignore[no-any-return]

    def start_from(self, decoder: Decoder) -> None:
        """All but the last layer of a pretrained decoder.

        Raises:
            ValueError: it is another network.
        """
        mine, theirs = self.decoder.spec, decoder.spec
        for key in ("shapes", "shortcuts", "norm"):
            if mine[key] != theirs[key]:
                raise ValueError(f"{key}: {mine[key]} differs from {theirs[key]} of the pretrained decoder")
        kept = {name: tensor for name, tensor in decoder.state_dict().items() if not name.startswith("last.")}
        self.decoder.load_state_dict(kept, strict=False)


class OnDeepest(nn.Module):
    """A head of torchvision's on the deepest map, scaled up to the image."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, maps: list[Tensor], size: int) -> Tensor:
        return F.interpolate(self.head(maps[-1]), (size, size), mode="bilinear", align_corners=False)


class Segment(Task):
    """`head`: `mirror` the decoder that mirrors the encoder, `fcn` (Long et al. 2015) or `deeplab` (Chen et al. 2017) torchvision's on the deepest
    map. `shortcuts`, `init`: of `mirror`.
    """

    target = "mask"
    measure = "mean_iou"
    by_class = "iou"

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        train: Train = "all",
        layer_decay: Decay = 1.0,
        head: Literal["mirror", "fcn", "deeplab"] = "mirror",
        shortcuts: Literal["none", "full"] = "full",
        norm: Norm = "batch",
        init: Init = "default",
    ) -> None:
        super().__init__(encoder, classes, train=train, layer_decay=layer_decay)
        if head == "mirror":
            self.head: nn.Module = Mirror(encoder, classes, shortcuts=shortcuts, norm=norm, init=init)
        else:
            self.head = OnDeepest(with_norm(_of_torchvision(head, encoder.shapes[-1][0], classes), norm))

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, classes, S, S)."""
        return in_full(self.head(self.encoder(images), images.shape[-1]))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.logits(batch.views[0]),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy over the pixels of the global batch that are not void."""
        (logits,) = outputs
        mask = batch.targets["mask"].long()
        known = mask != VOID
        count = shared_count(known, logits.dtype)
        loss = F.cross_entropy(logits, mask, ignore_index=VOID, reduction="sum") / count
        return {"loss": loss, "pixel_accuracy": ((logits.argmax(1) == mask) & known).sum() / count}

    def start_from(self, networks: Mapping[str, nn.Module]) -> None:
        decoder = networks.get("decoder")
        if not isinstance(self.head, Mirror) or not isinstance(decoder, Decoder):
            raise ValueError(
                "head: only 'mirror' starts from a pretrained decoder" if decoder else "there is no pretrained decoder"
            )
        self.head.start_from(decoder)

    def observe(self, batch: Batch) -> tuple[Tensor, ...]:
        """(B, C, C) int32: pixels of each image by their true and their predicted class."""
        predicted = torch.stack([self.logits(view) for view in batch.views]).mean(0).argmax(1)
        return (confusion(predicted, batch.targets["mask"].long(), self.classes),)

    def score(self, rows: tuple[Tensor, ...]) -> Scores:
        """Intersection over union over all pixels of the set (VOC): true positives / (true + false positives + false negatives)."""
        counts = rows[0].double().sum(0)
        hits = counts.diagonal()
        ious = (
            hits / (counts.sum(0) + counts.sum(1) - hits)
        ).tolist()  # 0 / 0 is NaN: a class that is neither there nor predicted
        return {
            "mean_iou": mean_known(ious),
            "pixel_accuracy": float(hits.sum() / counts.sum().clamp_min(1)),
            "iou": ious,
        }

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        image = batch.views[0]
        return {
            "image": image,
            "truth": overlaid(image, batch.targets["mask"].long()),
            "predicted": overlaid(image, self.logits(image).argmax(1)),
        }


def confusion(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Two (B, H, W) -> (B, classes, classes) int32, by true and predicted class, without void."""
    known = mask != VOID
    images = torch.arange(len(mask), device=mask.device)[:, None, None].expand_as(mask)
    places = (images * classes + mask) * classes + predicted
    return places[known].bincount(minlength=len(mask) * classes**2).view(-1, classes, classes).int()


def overlaid(images: Tensor, mask: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 and (B, H, W) classes -> the images with a colour laid over each class; void stays bare."""
    colours = palette(VOID + 1).to(images)[mask].permute(0, 3, 1, 2)
    return torch.where((mask == VOID)[:, None], images, 0.4 * images + 0.6 * colours)


def palette(count: int) -> Tensor:
    """(count, 3) in 0..1: VOC's colours, the bits of the class dealt out to red, green and blue."""
    index = torch.arange(count)
    bits = [sum(((index >> (3 * k + channel)) & 1) << (7 - k) for k in range(3)) for channel in range(3)]
    return torch.stack([torch.as_tensor(channel) for channel in bits], 1) / 255.0


def _of_torchvision(head: str, channels: int, classes: int) -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead

    kind: type[nn.Module] = FCNHead if head == "fcn" else DeepLabHead
    return kind(channels, classes)
