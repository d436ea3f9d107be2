"""Denoising auto-encoder with symmetric shortcuts (Dong, Mao, Shen and Yang 2016, arXiv 1611.09119).

An image x is corrupted to x~; encoder and decoder together, f, give the clean image back (section 3.2):

    min over f of  1/(2N) sum_i || x_i - f(x~_i) ||^2

The decoder mirrors the encoder, and the shortcuts between the two carry the detail past the middle layers, which learn
the abstract features (section 3.1; `firstlight.tasks.nn.decoder`). The features depend on the corruption (section 3.3;
`firstlight.tasks.corruption`): its removal should need large parts of the image. Images are 0-centred and normalised
(section 3.4); the corruption is applied before, in pixels of 0..255 as in the denoising literature, so sigma = 50 is a
fifth of the range, and "set to 0" is the data set's mean.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from firstlight.tasks import corruption as corrupt
from firstlight.tasks.counter_rng import derive_keys
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.decoder import Decoder, Shortcuts
from firstlight.tasks.nn.encoders import Encoder, InputNormalization
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.nn.weight_init import Init
from firstlight.tasks.pretrain.method import Method, TrainingInfo
from firstlight.tasks.visuals import ImageGrid, ImageRow

Sigma = Annotated[float, Ge(0.0)]
# The number of channels in a grid of features, and the smallest side of the map that they are taken from.
NUM_FEATURE_CHANNELS, MIN_FEATURE_SIDE = 3, 8
# The streams of random numbers: of the noise levels, and of the noise or the blocks.
LEVEL_STREAM, NOISE_STREAM = 0, 1


def squared_errors(reconstructed: Tensor, clean: Tensor) -> Tensor:
    """Returns (B,): the squared errors of (B, C, H, W) images, summed over pixels and channels."""
    full = torch.promote_types(reconstructed.dtype, torch.float32)
    return (reconstructed.to(full) - clean.to(full)).square().sum((1, 2, 3))


def euclidean_loss(reconstructed: Tensor, clean: Tensor) -> Tensor:
    """Returns this worker's part of 1/(2N) sum_i || x_i - f(x~_i) ||^2 (section 3.2).

    N is the number of images of the global batch.
    """
    return squared_errors(reconstructed, clean).mean() / 2


def psnr(reconstructed: Tensor, clean: Tensor) -> Tensor:
    """Returns (B,): 10 log10(1 / MSE) in dB of each image (table 6), at most 120 dB, for (B, C, H, W) in 0..1."""
    mean_squares = squared_errors(reconstructed, clean) / clean[0].numel()
    return -10.0 * mean_squares.clamp_min(1e-12).log10()


def undo_normalisation(input: InputNormalization, normalised: Tensor) -> Tensor:
    """Undoes the normalisation of `input` for (B, C, H, W) images. Returns them in 0..1, not clipped.

    The gray image of normalised channels is, up to scale and offset, a gray image whose weights are each channel's
    divided by its standard deviation.
    """
    if input.input == "rgb":
        return normalised * input.std + input.mean
    weights = input.weights / input.std
    return (normalised + (weights * input.mean).sum()) / weights.sum()


def most_varied_channels(
    clean: Sequence[Tensor], corrupted: Sequence[Tensor], number: int | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Returns the `NUM_FEATURE_CHANNELS` channels of a map that vary most over the clean images.

    Args:
        clean: the encoder's maps of clean images.
        corrupted: the encoder's maps of the same images, corrupted.
        number: the number of the map, from 1. None takes the deepest map with a side of at least `MIN_FEATURE_SIDE`, or
            the first map if none is that large.

    Returns:
        By channel, its (B, h, w) maps of clean and of corrupted images, on one scale from 0 to 1.
    """
    deep_enough = [k for k, map_ in enumerate(clean, 1) if min(map_.shape[2:]) >= MIN_FEATURE_SIDE]
    index = (number or max(deep_enough, default=1)) - 1
    pair = [maps[index].float().relu() for maps in (clean, corrupted)]
    chosen = pair[0].var((0, 2, 3)).topk(min(NUM_FEATURE_CHANNELS, pair[0].shape[1])).indices.tolist()
    scale = {channel: max(float(maps[:, channel].amax()) for maps in pair) or 1.0 for channel in chosen}
    return {channel: (pair[0][:, channel] / scale[channel], pair[1][:, channel] / scale[channel]) for channel in chosen}


class DenoisingAutoEncoder(Method):
    """The method around an encoder and the decoder that mirrors it.

    `corruption`: the corruption of the images (section 3.3): `pixel_gaussian` noise of every pixel, `patch_gaussian`
    noise that the pixels of a square share, one `big_block` or several `small_blocks` set to the mean.
    `sigma`: the bounds of the noise level of an image, in 0..255.
    `patch`: the side in pixels of the squares of `patch_gaussian`, which the paper does not give.
    `blocks`: the number of `small_blocks`; null: 21, or 35 from 100,000 images on (supplement A).
    `shortcuts`: the shortcuts from the encoder to the decoder (table 6): `input_output` adds the input to the output,
    and additionally `full` adds every second map of the encoder.
    `norm`: the normalisation layers of the decoder.
    `init`: the initialisation of the decoder's weights.
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
        "The positions of the shortcuts and the missing normalisation of the last layer follow the paper's figure 1.",
        "Batch size, epochs and weight decay are not given by the paper.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        corruption: Literal["pixel_gaussian", "patch_gaussian", "big_block", "small_blocks"] = "pixel_gaussian",
        sigma: tuple[Sigma, Sigma] = (10.0, 50.0),
        patch: Annotated[int, Ge(1)] = 4,
        blocks: Annotated[int, Ge(1)] | None = None,
        shortcuts: Shortcuts = "full",
        norm: Norm = "batch",
        init: Init = "gaussian",
        shown_map: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        super().__init__(encoder, info)
        _check_parameters(encoder, sigma, shown_map)
        self.shown_map = shown_map
        self.corruption, self.sigma, self.patch = corruption, sigma, patch
        self.blocks = blocks or corrupt.small_block_count(info.size)
        self.decoder = Decoder(
            encoder.shapes, encoder.input.channels, encoder.image_size, shortcuts=shortcuts, norm=norm, init=init
        )

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the reconstructions (B, C, H, W), normalised like the encoder's input."""
        corrupted = self.corrupt_images(batch)
        return (self.decoder(self.encoder(corrupted), self.encoder.input(corrupted)),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (reconstructed,) = outputs
        loss = euclidean_loss(reconstructed, self.encoder.input(batch.views[0]))
        return {"loss": loss, "psnr": self._compute_psnr(reconstructed, batch).mean()}

    @torch.no_grad()
    def measure_images(self, batch: Batch) -> dict[str, Tensor]:
        return {"psnr": self._compute_psnr(self.embed(batch)[0], batch)}

    @torch.no_grad()
    def _compute_psnr(self, reconstructed: Tensor, batch: Batch) -> Tensor:
        input = self.encoder.input
        return psnr(undo_normalisation(input, reconstructed), undo_normalisation(input, input(batch.views[0])))

    def corrupt_images(self, batch: Batch) -> Tensor:
        """Returns the batch's images (B, 3, H, W) with the corruption of this pass (section 3.4)."""
        images = batch.views[0]
        key = derive_keys(self.info.seed, batch.passes, batch.ids, NOISE_STREAM)
        if self.corruption in ("pixel_gaussian", "patch_gaussian"):
            low, high = self.sigma
            levels = corrupt.draw_noise_levels(
                derive_keys(self.info.seed, batch.passes, batch.ids, LEVEL_STREAM), low / 255, high / 255
            )
            if self.corruption == "pixel_gaussian":
                return corrupt.add_pixel_noise(images, levels, key)
            return corrupt.add_patch_noise(images, levels, key, self.patch)
        return torch.where(self._draw_blocks(key, images.shape[-1]), self.encoder.input.mean.to(images), images)

    def exported_networks(self) -> dict[str, nn.Module]:
        return {"decoder": self.decoder}

    @torch.no_grad()
    def image_grids(self, batch: Batch) -> tuple[ImageGrid, ...]:
        """Returns grids of corrupted and reconstructed images (figures 2, 8-10), and of feature maps (figures 5, 6)."""
        input, corrupted, (reconstructed,) = self.encoder.input, self.corrupt_images(batch), self.embed(batch)
        given = {"clean": input(batch.views[0]), "corrupted": input(corrupted), "reconstruction": reconstructed.float()}
        images = {
            caption: undo_normalisation(input, image).clamp(0, 1).expand(-1, 3, -1, -1)
            for caption, image in given.items()
        }
        features = most_varied_channels(self.encoder(batch.views[0]), self.encoder(corrupted), self.shown_map)
        rows = [ImageRow(caption, images[caption]) for caption in ("clean", "corrupted")]
        for channel, pair in features.items():
            rows += [
                ImageRow(f"feature {channel}, {caption}", images[caption], maps)
                for caption, maps in zip(("clean", "corrupted"), pair, strict=True)
            ]
        return (
            ImageGrid(
                "reconstructions",
                "held-out images, corrupted and reconstructed",
                tuple(ImageRow(c, i) for c, i in images.items()),
            ),
            ImageGrid(
                "feature_maps",
                "where features are active, in held-out images and in the same images corrupted",
                tuple(rows),
            ),
        )

    def _draw_blocks(self, key: Tensor, size: int) -> Tensor:
        """Returns (B, 1, size, size) bool for (B,) keys, true where an image is blocked out."""
        if self.corruption == "big_block":
            squares = corrupt.draw_squares(key, 1, corrupt.big_block_sides(size), size)
        else:
            side = corrupt.small_block_side(size)
            squares = corrupt.draw_squares(key, self.blocks, (side, side), size)
        return corrupt.mask_squares(*squares, size)


def _check_parameters(encoder: Encoder, sigma: tuple[float, float], shown_map: int | None) -> None:
    kind, normalize = encoder.spec.get("input", "rgb"), encoder.input.normalize
    if kind not in ("rgb", "gray"):
        raise ValueError(f"encoder.input: {kind!r} is not an image that can be reconstructed; valid: rgb, gray")
    if normalize != "dataset":
        raise ValueError(f"encoder.normalize: {normalize!r} cannot be undone without the clean image; valid: dataset")
    if sigma[0] > sigma[1]:
        raise ValueError(f"sigma: {list(sigma)} is not valid: the lower bound comes first")
    if shown_map is not None and shown_map > len(encoder.shapes):
        raise ValueError(
            f"shown_map: {shown_map} is none of the encoder's {len(encoder.shapes)} feature maps; "
            f"valid: 1 to {len(encoder.shapes)}"
        )
