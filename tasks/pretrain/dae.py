"""Denoising auto-encoder with symmetric shortcuts (Dong, Mao, Shen and Yang 2016, arXiv 1611.09119).

An image x is corrupted to x~; encoder and decoder together, f, give the clean image back (section 3.2):

    min over f of  1/(2N) sum_i || x_i - f(x~_i) ||^2

The decoder mirrors the encoder, and the shortcuts between the two carry the detail past the middle layers, which learn
the abstract features (section 3.1; `firstlight.tasks.nn.decoder`). The features depend on the corruption (section 3.3;
`firstlight.tasks.corruption`): its removal should need large parts of the image. Images are 0-centred and normalised
(section 3.4); the corruption is applied before, in pixels of 0..255 as in the denoising literature, so sigma = 50 is a
fifth of the range, and "set to 0" is the data set's mean.
"""

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from firstlight.tasks.corruption import Corruption, small_block_count
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn import CorruptionKind, Sigma
from firstlight.tasks.nn.decoder import Decoder, Shortcuts
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.nn.weight_init import Init
from firstlight.tasks.pretrain.method import Method, TrainingInfo
from firstlight.tasks.reconstruction import (
    check_reconstructable,
    check_shown_map,
    draw_reconstructions,
    measure_psnr,
    reconstruct_images,
    squared_errors,
)
from firstlight.tasks.visuals import ImageGrid


def euclidean_loss(reconstructed: Tensor, clean: Tensor) -> Tensor:
    """Returns this worker's part of 1/(2N) sum_i || x_i - f(x~_i) ||^2 (section 3.2).

    N is the number of images of the global batch.
    """
    return squared_errors(reconstructed, clean).mean() / 2


class DenoisingAutoEncoder(Method):
    """The method around an encoder and the decoder that mirrors it.

    `corruption`: the corruption of the images (section 3.3): `pixel_gaussian` noise of every pixel, `patch_gaussian`
    noise that the pixels of a square share, one `big_block` or several `small_blocks` set to the mean. Noise of every
    pixel is good enough for small images (section 4.1); small blocks are better on larger ones (section 4.3).
    `sigma`: the bounds of the noise level of an image, in 0..255 (10 and 50 in supplement A, read in these units).
    `patch`: the side in pixels of the squares of `patch_gaussian`, which the paper does not give.
    `blocks`: the number of `small_blocks`; null: 21, or 35 from 100,000 images trained on (supplement A). STL-10 needs
    35 stated here, as some of its 100,000 images are held out.
    `shortcuts`: the shortcuts from the encoder to the decoder: `full` is section 3.4, `none` and `input_output` are the
    ablation of table 6. `input_output` adds the input to the output, and additionally `full` adds every second map of
    the encoder.
    `norm`: the normalisation layers of the decoder (`batch` in section 3.1).
    `init`: the initialisation of the decoder's weights: `gaussian` is N(0, 0.01^2), as in section 3.4. The encoder has
    its own.
    `shown_map`: the number, from 1, of the encoder's map whose channels are shown in figures (figures 5 and 6); null:
    the deepest map with a side of at least 8.
    """

    title: ClassVar[str] = "Denoising auto-encoder with symmetric shortcuts"
    paper: ClassVar[str] = "Dong, Mao, Shen and Yang 2016, https://arxiv.org/abs/1611.09119"
    image_metrics: ClassVar[tuple[str, ...]] = ("psnr",)
    deviations: ClassVar[tuple[str, ...]] = (
        "The noise level is in units of 0..255 and applied before the normalisation; the paper does not give its "
        "scale.",
        "The side of the regions of `patch_gaussian` is a setting; the paper does not give it.",
        "The positions of the shortcuts and the missing normalisation of the last layer follow the paper's figure 1. "
        "Shortcuts are added before the ReLU, as in RED-Net, which the paper builds on; its figure 1 does not show it.",
        "Batch size, epochs, weight decay, and how long the loss must not drop before the rate does, are not given by "
        "the paper.",
        "PSNR is the mean over images that were not trained on, of reconstructions that are not clipped to 0..1; the "
        "paper does not say of which images its is.",
        "In the recipes, a part of the training images is held out to choose settings on; the paper trains on all. "
        "Crops of 225 pixels are of images with a shorter side of 256, which the paper does not give. Segmentation of "
        "whole images (figure 4) averages the answers of overlapping windows as large as the crops of the training; "
        "the paper does not say how it feeds them.",
        "The classifier on VOC has the dropout of VGG, which the paper's table 1 does not list. The row 'Tiny 0.5M' of "
        "table 3 is not measured, since its images were withdrawn.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        corruption: CorruptionKind = "pixel_gaussian",
        sigma: tuple[Sigma, Sigma] = (10.0, 50.0),
        patch: Annotated[int, Ge(1)] = 4,
        blocks: Annotated[int, Ge(1)] | None = None,
        shortcuts: Shortcuts = "full",
        norm: Norm = "batch",
        init: Init = "gaussian",
        shown_map: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        super().__init__(encoder, info)
        check_reconstructable(encoder)
        if sigma[0] > sigma[1]:
            raise ValueError(f"sigma: {list(sigma)} is not valid: the lower bound comes first")
        check_shown_map(encoder, shown_map)
        self.shown_map = shown_map
        self.corruption = Corruption(corruption, sigma, patch, blocks or small_block_count(info.size), info.seed)
        self.decoder = Decoder(
            encoder.shapes, encoder.input.channels, encoder.image_size, shortcuts=shortcuts, norm=norm, init=init
        )

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the reconstructions (B, C, H, W), normalised like the encoder's input."""
        return (reconstruct_images(self.encoder, self.decoder, self.corrupt_images(batch)),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (reconstructed,) = outputs
        loss = euclidean_loss(reconstructed, self.encoder.input(batch.views[0]))
        return {"loss": loss, "psnr": measure_psnr(self.encoder.input, reconstructed, batch.views[0]).mean()}

    @torch.no_grad()
    def measure_images(self, batch: Batch) -> dict[str, Tensor]:
        return {"psnr": measure_psnr(self.encoder.input, self.embed(batch)[0], batch.views[0])}

    def corrupt_images(self, batch: Batch) -> Tensor:
        """Returns the batch's images (B, 3, H, W) with the corruption of this pass (section 3.4)."""
        return self.corruption.apply_to(batch.views[0], batch.ids, batch.passes, self.encoder.input.mean)

    def exported_networks(self) -> dict[str, nn.Module]:
        return {"decoder": self.decoder}

    def image_grids(self, batch: Batch, subject: str = "held-out images") -> tuple[ImageGrid, ...]:
        corrupted = self.corrupt_images(batch)
        return draw_reconstructions(self.encoder, self.decoder, batch.views[0], corrupted, subject, self.shown_map)
