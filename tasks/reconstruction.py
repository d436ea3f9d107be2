"""Reconstructions of corrupted images by an encoder with its decoder: their quality, and figures of them.

An auto-encoder (Dong et al. 2016, arXiv 1611.09119) reconstructs the normalised image. Quality and figures are of the
image in 0..1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from firstlight.tasks.nn.decoder import Decoder
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.input_normalization import InputNormalization
from firstlight.tasks.visuals import ImageGrid, ImageRow

# The number of channels in a grid of features, and the smallest side of the map that they are taken from.
NUM_FEATURE_CHANNELS, MIN_FEATURE_SIDE = 3, 8


def reconstruct_images(encoder: Encoder, decoder: Decoder, corrupted: Tensor) -> Tensor:
    """Returns the reconstructions of (B, 3, S, S) corrupted images, normalised like the encoder's input."""
    reconstructed: Tensor = decoder(encoder(corrupted), encoder.input(corrupted))
    return reconstructed


def squared_errors(reconstructed: Tensor, clean: Tensor) -> Tensor:
    """Returns (B,): the squared errors of (B, C, H, W) images, summed over pixels and channels."""
    full = torch.promote_types(reconstructed.dtype, torch.float32)
    return (reconstructed.to(full) - clean.to(full)).square().sum((1, 2, 3))


def psnr(reconstructed: Tensor, clean: Tensor) -> Tensor:
    """Returns (B,): 10 log10(1 / MSE) in dB of each image (table 6), at most 120 dB, for (B, C, H, W) in 0..1."""
    mean_squares = squared_errors(reconstructed, clean) / clean[0].numel()
    return -10.0 * mean_squares.clamp_min(1e-12).log10()


@torch.no_grad()
def measure_psnr(input: InputNormalization, reconstructed: Tensor, images: Tensor) -> Tensor:
    """Returns (B,): the peak signal-to-noise ratio of normalised reconstructions of (B, 3, S, S) images, in dB."""
    return psnr(undo_normalisation(input, reconstructed), undo_normalisation(input, input(images)))


def undo_normalisation(input: InputNormalization, normalised: Tensor) -> Tensor:
    """Undoes the normalisation of `input` for (B, C, H, W) images. Returns them in 0..1, not clipped.

    The gray image of normalised channels is, up to scale and offset, a gray image whose weights are each channel's
    divided by its standard deviation.
    """
    if input.input == "rgb":
        return normalised * input.std + input.mean
    weights = input.weights / input.std
    return (normalised + (weights * input.mean).sum()) / weights.sum()


def flatten_patches(images: Tensor, side: int) -> Tensor:
    """Returns the patches of (B, C, H, W) images as (B, N, side * side * C), in row order; C runs fastest."""
    b, c, h, w = images.shape
    squares = images.reshape(b, c, h // side, side, w // side, side)
    return squares.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, side * side * c)


def join_patches(patches: Tensor, side: int, rows: int) -> Tensor:
    """Undoes `flatten_patches` for images of `rows` patches from top to bottom."""
    b, count, size = patches.shape
    columns, c = count // rows, size // side**2
    squares = patches.reshape(b, rows, columns, side, side, c)
    return squares.permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * side, columns * side)


def check_reconstructable(encoder: Encoder) -> None:
    """Checks that an encoder's input can be turned back into an image.

    Raises:
        ValueError: it cannot; the message starts with the key.
    """
    kind, normalize = encoder.spec.get("input", "rgb"), encoder.input.normalize
    if kind not in ("rgb", "gray"):
        raise ValueError(f"encoder.input: {kind!r} is not an image that can be reconstructed; valid: rgb, gray")
    if normalize != "dataset":
        raise ValueError(f"encoder.normalize: {normalize!r} cannot be undone without the clean image; valid: dataset")


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
        For each channel, its (B, h, w) maps of clean and of corrupted images, on one scale from 0 to 1.
    """
    deep_enough = [k for k, map_ in enumerate(clean, 1) if min(map_.shape[2:]) >= MIN_FEATURE_SIDE]
    index = (number or max(deep_enough, default=1)) - 1
    pair = [maps[index].float().relu() for maps in (clean, corrupted)]
    chosen = pair[0].var((0, 2, 3)).topk(min(NUM_FEATURE_CHANNELS, pair[0].shape[1])).indices.tolist()
    scale = {channel: max(float(maps[:, channel].amax()) for maps in pair) or 1.0 for channel in chosen}
    return {channel: (pair[0][:, channel] / scale[channel], pair[1][:, channel] / scale[channel]) for channel in chosen}


@torch.no_grad()
def draw_reconstructions(
    encoder: Encoder,
    decoder: Decoder,
    images: Tensor,
    corrupted: Tensor,
    subject: str,
    shown_map: int | None = None,
) -> tuple[ImageGrid, ...]:
    """Returns grids of corrupted and reconstructed images (figures 2, 8-10), and of feature maps (figures 5, 6).

    Args:
        encoder: the encoder, in evaluation mode.
        decoder: its decoder, likewise.
        images: (B, 3, S, S) in 0..1.
        corrupted: the same images, corrupted.
        subject: what the images are, for the titles.
        shown_map: the number of the map, as for `most_varied_channels`.
    """
    input, reconstructed = encoder.input, reconstruct_images(encoder, decoder, corrupted).float()
    given = {"clean": input(images), "corrupted": input(corrupted), "reconstruction": reconstructed}
    pixels = {caption: undo_normalisation(input, image).clamp(0, 1) for caption, image in given.items()}
    features = most_varied_channels(encoder(images), encoder(corrupted), shown_map)
    rows = [ImageRow(caption, pixels[caption]) for caption in ("clean", "corrupted")]
    for channel, pair in features.items():
        rows += [
            ImageRow(f"feature {channel}, {caption}", pixels[caption], maps)
            for caption, maps in zip(("clean", "corrupted"), pair, strict=True)
        ]
    reconstructions = tuple(ImageRow(caption, image) for caption, image in pixels.items())
    return (
        ImageGrid("reconstructions", f"{subject}, corrupted and reconstructed", reconstructions),
        ImageGrid(
            "feature_maps", f"where features are active, in {subject} and in the same images corrupted", tuple(rows)
        ),
    )


def check_shown_map(encoder: Encoder, shown_map: int | None) -> None:
    """Checks the number of the map whose channels are drawn.

    Raises:
        ValueError: the encoder has no such map; the message starts with the parameter's name.
    """
    if shown_map is not None and shown_map > len(encoder.shapes):
        raise ValueError(
            f"shown_map: {shown_map} is none of the encoder's {len(encoder.shapes)} feature maps; "
            f"valid: 1 to {len(encoder.shapes)}"
        )
