"""MAE, masked auto-encoder (He, Chen, Xie, Li, Dollar and Girshick 2021, arXiv 2111.06377).

The encoder f sees only the visible patches V of the N patches of an image x. A small decoder g gets their tokens, and
one learned token in place of each masked patch, and gives the pixels of the masked patches M (section 3):

    L = 1/|M| sum_{i in M}  1/P || g(f(x_V))_i - y_i ||^2

y_i has the P values of patch i. With `normalize_pixels` the mean of y_i is subtracted, and it is divided by its
standard deviation ("Reconstruction target" in section 3). M is a random 75 % of the patches, another one in every pass.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from firstlight.tasks.corruption import split_patches
from firstlight.tasks.counter_rng import derive_keys
from firstlight.tasks.learner import Batch
from firstlight.tasks.nn.decoder import TokenDecoder, encode_positions
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.timm_backbones import TokenMaps, explain_masking
from firstlight.tasks.pretrain.method import Method, TrainingInfo
from firstlight.tasks.reconstruction import check_reconstructable, flatten_patches, join_patches, undo_normalisation
from firstlight.tasks.visuals import ImageGrid, ImageRow

MASKED_PATCH_STREAM = 0x3AE0
# The number that is added to the variance of a patch (authors' code).
PATCH_VARIANCE_EPS = 1e-6
# The encoders from this width on have the paper's decoder where a recipe does not say which.
LARGE_ENCODER_WIDTH = 384
PAPER_DECODER, SMALL_DECODER = (512, 8), (128, 2)
# The width of an attention head of the paper's decoder, which has 16.
DECODER_HEAD_WIDTH = 32


class MaskedAutoEncoder(Method):
    """The method around a ViT of timm and its decoder, which is not handed on.

    The prefix tokens of a ViT (the class token, registers) are never masked. The pixels are those that the encoder's
    input gives: `encoder.input` is `rgb` or `gray`.

    `mask_ratio`: the share of an image's patches that is masked (0.75 in section 4.1).
    `normalize_pixels`: true takes each patch's mean from its pixels and divides them by its standard deviation (section
    3, and table 1d).
    `positions`: `fixed` gives the encoder the paper's position embeddings (appendix A.1), sines that are not trained,
    in place of its own; it is for encoders without weights. `learned` trains those that it has, as an encoder with
    weights needs. The decoder's are fixed.
    `decoder_dim`: the width of the decoder. null: 512 as in the paper (table 1b) for encoders as wide as 384 or more,
    else 128; the paper has no narrower ones.
    `decoder_depth`: the number of the decoder's blocks. null: 8 as in the paper (table 1a) for encoders as wide as 384
    or more, else 2.
    `decoder_heads`: the number of attention heads in each. null: one for 32 of the decoder's dimensions, as in the
    authors' code, which has 16 for 512.
    """

    title: ClassVar[str] = "Masked auto-encoder (MAE)"
    paper: ClassVar[str] = (
        "He, Chen, Xie, Li, Dollar and Girshick 2021, Masked autoencoders are scalable vision learners, "
        "https://arxiv.org/abs/2111.06377"
    )
    image_metrics: ClassVar[tuple[str, ...]] = ("psnr",)
    deviations: ClassVar[tuple[str, ...]] = (
        "The encoder's weights are drawn as timm draws them; the authors draw the linear layers by Glorot's rule. With "
        "`positions: learned` its position embeddings are trained; in the paper they are fixed sines.",
        "For encoders narrower than 384, which the paper does not have, the decoder has 2 blocks of width 128 unless a "
        "recipe says otherwise.",
        "Crops are those of the data set's augmentations unless a recipe says otherwise (in the paper 0.2 to 1 of the "
        "area and a flip, resampled bicubically).",
        "PSNR is of masked patches alone, not clipped to 0..1. With normalised pixels, it and the figures take the "
        "mean and the standard deviation of a masked patch, which the network does not predict, from the image.",
    )

    def __init__(
        self,
        encoder: Encoder,
        info: TrainingInfo,
        *,
        mask_ratio: Annotated[float, Gt(0.0), Lt(1.0)] = 0.75,
        normalize_pixels: bool = True,
        positions: Literal["learned", "fixed"] = "learned",
        decoder_dim: Annotated[int, Ge(4)] | None = None,
        decoder_depth: Annotated[int, Ge(1)] | None = None,
        decoder_heads: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        super().__init__(encoder, info)
        _check_encoder(encoder)
        check_reconstructable(encoder)
        self.mask_ratio, self.normalize_pixels = mask_ratio, normalize_pixels
        model = self._tokens.model
        embed: Any = model.patch_embed
        self.side = _find_patch_side(encoder, embed.patch_size)
        if normalize_pixels and self.side**2 * encoder.input.channels == 1:
            raise ValueError("normalize_pixels: true is not valid for patches of one value; valid: false")
        view = info.view_sizes[0] if info.view_sizes else encoder.image_size
        rows = view // self.side
        if not 0 < int(rows**2 * (1.0 - mask_ratio)) < rows**2:
            raise ValueError(
                f"mask_ratio: {mask_ratio:g} leaves no patch of {rows**2} visible, or none masked; valid: shares that "
                "leave both"
            )
        if positions == "fixed":
            _fix_positions(model, embed.grid_size)
        width = encoder.shapes[-1][0]
        default_dim, default_depth = PAPER_DECODER if width >= LARGE_ENCODER_WIDTH else SMALL_DECODER
        dim = decoder_dim or default_dim
        self.decoder = TokenDecoder(
            width,
            int(model.num_prefix_tokens),  # type: ignore[arg-type]
            self.side**2 * encoder.input.channels,
            dim=dim,
            depth=decoder_depth or default_depth,
            heads=_choose_heads(dim, decoder_heads),
        )

    def compile_networks(self) -> None:
        super().compile_networks()
        # The encoder's own forward pass is that of all patches, which the training does not make.
        tokens: Any = self._tokens
        tokens.embed_visible = torch.compile(tokens.embed_visible)

    @property
    def _tokens(self) -> TokenMaps:
        return self.encoder.stages  # type: ignore[return-value]

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the (B, M, P) values that the decoder gives for the masked patches."""
        visible, masked = self.draw_patches(batch)
        tokens = self._tokens.embed_visible(self.encoder.input(batch.views[0]), visible)
        return (self.decoder(tokens, visible, masked, self._find_grid(batch)),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        (predicted,) = outputs
        with torch.autocast(predicted.device.type, enabled=False):
            _, masked = self.draw_patches(batch)
            # They are in float32 or wider, and so is the difference.
            targets = self._cut_input(batch).take_along_dim(masked[..., None], 1)
            if self.normalize_pixels:
                mean, deviation = _measure_patches(targets)
                targets = (targets - mean) / deviation
            # Each image has as many masked patches: the mean over this worker's is its part of that over all.
            loss = (predicted - targets).square().mean()
            return {"loss": loss, "psnr": self._measure_psnr(predicted.detach(), masked, batch).mean()}

    @torch.no_grad()
    def measure_images(self, batch: Batch) -> dict[str, Tensor]:
        (predicted,) = self.embed(batch)
        return {"psnr": self._measure_psnr(predicted, self.draw_patches(batch)[1], batch)}

    @torch.no_grad()
    def image_grids(self, batch: Batch, subject: str = "held-out images") -> tuple[ImageGrid, ...]:
        """Returns a grid like the authors' demonstration: masked patches are grey, then as the network fills them."""
        (predicted,) = self.embed(batch)
        _, masked = self.draw_patches(batch)
        clean = self._cut_input(batch)
        grey = torch.zeros_like(clean.take_along_dim(masked[..., None], 1))
        pixels = {
            "original": clean,
            "masked": _replace_patches(clean, masked, grey),
            "reconstructed": self._fill_patches(predicted, masked, clean),
        }
        rows = tuple(
            ImageRow(caption, self._restore_pixels(patches).clamp(0, 1).float(), None, is_drawn)
            for (caption, patches), is_drawn in zip(pixels.items(), (False, False, True), strict=True)
        )
        given = ", from the true mean and deviation of each patch" if self.normalize_pixels else ""
        return (ImageGrid("masked_patches", f"{subject}, masked and reconstructed{given}", rows),)

    def draw_patches(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the numbers of visible (B, K) and masked (B, M) patches: functions of (seed, pass, id) alone."""
        rows, columns = self._find_grid(batch)
        key = derive_keys(self.info.seed, batch.passes, batch.ids, MASKED_PATCH_STREAM)
        return split_patches(key, rows * columns, self.mask_ratio)

    def _find_grid(self, batch: Batch) -> tuple[int, int]:
        """Returns the rows and columns of patches in an image."""
        height, width = batch.views[0].shape[2:]
        return height // self.side, width // self.side

    def _cut_input(self, batch: Batch) -> Tensor:
        """Returns the (B, N, P) values of all patches of the encoder's input, in float32 or wider."""
        input = self.encoder.input(batch.views[0])
        return flatten_patches(input.to(torch.promote_types(input.dtype, torch.float32)), self.side)

    def _fill_patches(self, predicted: Tensor, masked: Tensor, clean: Tensor) -> Tensor:
        """Returns (B, N, P) patches: those that are predicted in place of masked ones, in the scale of the others."""
        predicted = predicted.to(clean.dtype)
        if self.normalize_pixels:
            mean, deviation = _measure_patches(clean.take_along_dim(masked[..., None], 1))
            predicted = predicted * deviation + mean
        return _replace_patches(clean, masked, predicted)

    def _restore_pixels(self, patches: Tensor) -> Tensor:
        """Returns the (B, C or 1, H, W) images in 0..1, not clipped, of (B, N, P) patches of the encoder's input."""
        rows = round(patches.shape[1] ** 0.5)
        return undo_normalisation(self.encoder.input, join_patches(patches, self.side, rows))

    @torch.no_grad()
    def _measure_psnr(self, predicted: Tensor, masked: Tensor, batch: Batch) -> Tensor:
        """Returns (B,): the peak signal-to-noise ratio of the masked patches of images in 0..1, in dB."""
        clean = self._cut_input(batch)
        both = (clean, self._fill_patches(predicted, masked, clean))
        true, filled = (flatten_patches(self._restore_pixels(patches), self.side) for patches in both)
        errors = (true - filled).take_along_dim(masked[..., None], 1).square().mean((1, 2))
        return -10.0 * errors.clamp_min(1e-12).log10()


def _measure_patches(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the (B, N, 1) means and standard deviations of (B, N, P) patches, as the authors' code has them."""
    return patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + PATCH_VARIANCE_EPS).sqrt()


def _replace_patches(patches: Tensor, places: Tensor, values: Tensor) -> Tensor:
    return patches.scatter(1, places[..., None].expand_as(values), values)


def _choose_heads(dim: int, heads: int | None) -> int:
    """Returns the number of attention heads.

    Raises:
        ValueError: they do not divide the width, or positions cannot be encoded in it.
    """
    if dim % 4:
        raise ValueError(f"decoder_dim: {dim} has no place for sines and cosines of two sides; valid: multiples of 4")
    chosen = heads or max(1, dim // DECODER_HEAD_WIDTH)
    if dim % chosen:
        key = f"decoder_heads: {chosen} does not divide decoder_dim: {dim}"
        raise ValueError(f"{key}; valid: {', '.join(str(k) for k in range(1, dim + 1) if dim % k == 0)}")
    return chosen


def _check_encoder(encoder: Encoder) -> None:
    name = encoder.spec.get("model", encoder.spec["name"])
    if obstacle := explain_masking(encoder.stages):
        raise ValueError(
            f"encoder.model: {name!r} {obstacle}; valid: a ViT of timm with position embeddings, as "
            "vit_tiny_patch16_224"
        )


def _find_patch_side(encoder: Encoder, sides: tuple[int, int]) -> int:
    if sides[0] != sides[1]:
        name = encoder.spec["model"]
        raise ValueError(f"encoder.model: {name!r} has patches of {sides[0]}x{sides[1]} pixels; valid: square patches")
    return sides[0]


@torch.no_grad()
def _fix_positions(model: nn.Module, grid: tuple[int, int]) -> None:
    """Replaces the position embeddings of a ViT by the paper's, which are not trained. Prefix tokens have zeros.

    Raises:
        ValueError: the width of the ViT has no place for them.
    """
    current: Any = model.pos_embed
    width = current.shape[2]
    if width % 4:
        raise ValueError(f"positions: 'fixed' needs a width that is a multiple of 4, not {width}; valid: learned")
    current.zero_()[:, current.shape[1] - grid[0] * grid[1] :] = encode_positions(width, *grid).to(current)
    current.requires_grad_(False)
