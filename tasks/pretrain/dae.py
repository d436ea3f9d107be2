"""Denoising auto-encoder with symmetric shortcuts (Dong, Mao, Shen and Yang 2016, arXiv 1611.09119).

An image x is corrupted to x~; encoder and decoder together, f, give the clean image back (section 3.2):

    min over f of  1/(2N) sum_i || x_i - f(x~_i) ||^2

The decoder mirrors the encoder, and the shortcuts between the two carry the detail past its middle, which is left to learn what is abstract
(section 3.1; `firstlight.tasks.nn.decoder`). What is learned depends on the corruption (section 3.3; `firstlight.tasks.corruption`): it should need large parts of
the image to be undone. Images are 0-centred and normalised (section 3.4); the corruption is applied before, in pixels of 0..255 as in the
denoising literature, so sigma = 50 is a fifth of the range, and "set to 0" is the data set's mean.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from firstlight.tasks import corruption as corrupt
from firstlight.tasks.counter_rng import keys
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.decoder import Decoder, Shortcuts
from firstlight.tasks.nn.encoders import Encoder, Input
from firstlight.tasks.nn.norms import Norm
from firstlight.tasks.nn.weight_init import Init
from firstlight.tasks.pretrain.method import Method, Setting
from firstlight.tasks.visuals import Picture, Row

Sigma = Annotated[float, Ge(0.0)]
SHOWN, PLACES_SHOWN = 3, 8  # features in a picture, and places a side of the map that they are of
LEVELS, PLACES = 0, 1  # the streams of random numbers: of the noise levels, and of the noise or the blocks


def squared_errors(reconstructed: Tensor, clean: Tensor) -> Tensor:
    """Two (B, C, H, W) -> (B,), the sum over pixels and channels."""
    full = torch.promote_types(reconstructed.dtype, torch.float32)
    return (reconstructed.to(full) - clean.to(full)).square().sum((1, 2, 3))


def euclidean_loss(reconstructed: Tensor, clean: Tensor) -> Tensor:
    """This worker's part of 1/(2N) sum_i || x_i - f(x~_i) ||^2, N the images of the global batch (section 3.2)."""
    return squared_errors(reconstructed, clean).mean() / 2


def psnr(reconstructed: Tensor, clean: Tensor) -> Tensor:
    """Two (B, C, H, W) in 0..1 -> (B,), 10 log10(1 / MSE) in dB of each image (table 6). At most 120 dB."""
    mean_squares = squared_errors(reconstructed, clean) / clean[0].numel()
    return -10.0 * mean_squares.clamp_min(1e-12).log10()


def pixels(input: Input, normalised: Tensor) -> Tensor:
    """What `input` made of an image, back in 0..1: (B, C, H, W) -> the same shape. Not clipped.

    The gray of normalised channels is, up to scale and offset, a gray image whose weights are each channel's divided by its deviation.
    """
    if input.input == "rgb":
        return normalised * input.std + input.mean
    weights = input.weights / input.std
    return (normalised + (weights * input.mean).sum()) / weights.sum()


def most_varied(
    clean: Sequence[Tensor], corrupted: Sequence[Tensor], number: int | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """By channel, its (B, h, w) maps of clean and of corrupted images, on one scale from 0 to 1: the `SHOWN` channels that vary most over the clean
    images, of map `number`, from 1; None: of the deepest map with at least `PLACES_SHOWN` places a side, or else of the first."""
    deep_enough = [k for k, map_ in enumerate(clean, 1) if min(map_.shape[2:]) >= PLACES_SHOWN]
    place = (number or max(deep_enough, default=1)) - 1
    pair = [maps[place].float().relu() for maps in (clean, corrupted)]
    chosen = pair[0].var((0, 2, 3)).topk(min(SHOWN, pair[0].shape[1])).indices.tolist()
    scale = {channel: max(float(maps[:, channel].amax()) for maps in pair) or 1.0 for channel in chosen}
    return {channel: (pair[0][:, channel] / scale[channel], pair[1][:, channel] / scale[channel]) for channel in chosen}


class DenoisingAutoEncoder(Method):
    """`sigma`: bounds of the noise level of an image, in 0..255. `patch`: side in pixels of the regions of `patch_gaussian`, which the paper does
    not give. `blocks`: of `small_blocks`; None: 21, or 35 from 100,000 images on. `norm`, `init`: of the decoder. `shown_map`: number, from 1, of
    the encoder's map that pictures show some channels of (figures 5 and 6).
    """

    title: ClassVar[str] = "Denoising auto-encoder with symmetric shortcuts"
    paper: ClassVar[str] = "Dong, Mao, Shen and Yang 2016, https://arxiv.org/abs/1611.09119"
    judged: ClassVar[tuple[str, ...]] = ("psnr",)
    deviations: ClassVar[tuple[str, ...]] = (
        "The noise level is read in units of 0..255 and applied before the normalisation; the paper does not give its scale.",
        "The side of the regions of `patch_gaussian` is a setting; the paper does not give it.",
        "Where the shortcuts are added and whether the last layer is normalised is read from the paper's figure 1.",
        "Batch size, epochs and weight decay are not given by the paper.",
    )

    def __init__(
        self,
        encoder: Encoder,
        setting: Setting,
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
        super().__init__(encoder, setting)
        _check(encoder, sigma, shown_map)
        self.shown_map = shown_map
        self.corruption, self.sigma, self.patch = corruption, sigma, patch
        self.blocks = blocks or corrupt.small_block_count(setting.size)
        self.decoder = Decoder(
            encoder.shapes, encoder.input.channels, encoder.image_size, shortcuts=shortcuts, norm=norm, init=init
        )

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The reconstructions (B, C, H, W), normalised as the encoder's input is."""
        corrupted = self.corrupted(batch)
        return (self.decoder(self.encoder(corrupted), self.encoder.input(corrupted)),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (reconstructed,) = outputs
        loss = euclidean_loss(reconstructed, self.encoder.input(batch.views[0]))
        return {"loss": loss, "psnr": self._decibels(reconstructed, batch).mean()}

    @torch.no_grad()
    def judge(self, batch: Batch) -> dict[str, Tensor]:
        return {"psnr": self._decibels(self.embed(batch)[0], batch)}

    @torch.no_grad()
    def _decibels(self, reconstructed: Tensor, batch: Batch) -> Tensor:
        input = self.encoder.input
        return psnr(pixels(input, reconstructed), pixels(input, input(batch.views[0])))

    def corrupted(self, batch: Batch) -> Tensor:
        """The batch's images (B, 3, H, W), corrupted anew in each of their passes (section 3.4)."""
        images = batch.views[0]
        places = keys(self.setting.seed, batch.passes, batch.ids, PLACES)
        if self.corruption in ("pixel_gaussian", "patch_gaussian"):
            low, high = self.sigma
            levels = corrupt.noise_levels(
                keys(self.setting.seed, batch.passes, batch.ids, LEVELS), low / 255, high / 255
            )
            if self.corruption == "pixel_gaussian":
                return corrupt.pixel_gaussian(images, levels, places)
            return corrupt.patch_gaussian(images, levels, places, self.patch)
        return torch.where(self._holes(places, images.shape[-1]), self.encoder.input.mean.to(images), images)

    def handed_on(self) -> dict[str, nn.Module]:
        return {"decoder": self.decoder}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> tuple[Picture, ...]:
        """Images, corrupted and reconstructed (figures 2 and 8-10), and what single features see in both (figures 5 and 6)."""
        input, corrupted, (reconstructed,) = self.encoder.input, self.corrupted(batch), self.embed(batch)
        given = {"clean": input(batch.views[0]), "corrupted": input(corrupted), "reconstruction": reconstructed.float()}
        images = {caption: pixels(input, image).clamp(0, 1).expand(-1, 3, -1, -1) for caption, image in given.items()}
        features = most_varied(self.encoder(batch.views[0]), self.encoder(corrupted), self.shown_map)
        rows = [Row(caption, images[caption]) for caption in ("clean", "corrupted")]
        for channel, pair in features.items():
            rows += [
                Row(f"feature {channel}, {caption}", images[caption], maps)
                for caption, maps in zip(("clean", "corrupted"), pair, strict=True)
            ]
        return (
            Picture(
                "reconstructions",
                "held-out images, corrupted and reconstructed",
                tuple(Row(c, i) for c, i in images.items()),
            ),
            Picture(
                "feature_maps",
                "where features are active, in held-out images and in the same images corrupted",
                tuple(rows),
            ),
        )

    def _holes(self, key: Tensor, size: int) -> Tensor:
        """(B,) keys -> (B, 1, size, size) bool, true where an image is blocked out."""
        if self.corruption == "big_block":
            squares = corrupt.random_squares(key, 1, corrupt.big_block_sides(size), size)
        else:
            side = corrupt.small_block_side(size)
            squares = corrupt.random_squares(key, self.blocks, (side, side), size)
        return corrupt.covered(*squares, size)


def _check(encoder: Encoder, sigma: tuple[float, float], shown_map: int | None) -> None:
    kind, normalize = encoder.spec.get("input", "rgb"), encoder.input.normalize
    if kind not in ("rgb", "gray"):
        raise ValueError(f"encoder.input: is {kind!r}, which is no image to give back; rgb or gray")
    if normalize != "dataset":
        raise ValueError(
            f"encoder.normalize: is {normalize!r}, which cannot be undone without the clean image; dataset"
        )
    if sigma[0] > sigma[1]:
        raise ValueError(f"sigma: is {list(sigma)}; the lower bound comes first")
    if shown_map is not None and shown_map > len(encoder.shapes):
        raise ValueError(
            f"shown_map: {shown_map} is none of the encoder's {len(encoder.shapes)} feature maps; valid: 1 to {len(encoder.shapes)}"
        )
