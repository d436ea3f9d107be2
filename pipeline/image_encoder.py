"""A pretrained encoder that embeds paths, PIL images, arrays and tensors, as the Python API hands it out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from firstlight.pipeline.data.augment import ops
from firstlight.pipeline.data.augment.random_numbers import derive_view_keys
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.channels.pixel_format import PIXEL_DTYPES, RGB_PIXELS, PixelFormat
from firstlight.pipeline.data.channels.read_channels import open_channels
from firstlight.pipeline.data.images import BadImage, open_rgb
from firstlight.pipeline.data.images.levels import check_depth, check_not_dark, list_depth_ranges
from firstlight.pipeline.errors import UserError, describe_os_error
from firstlight.pipeline.stages.prediction.image_items import ImageLike, convert_given_channels, convert_given_image
from firstlight.tasks.device.pixel_levels import scale_pixels, send_pixels
from firstlight.tasks.nn.encoders import Encoder, pool_maps


class ImageEncoder(Encoder):
    """A pretrained encoder in evaluation mode, which also embeds images that are not tensors yet."""

    @torch.inference_mode()
    def embed(
        self,
        images: Iterable[ImageLike],
        augment: Sequence[Mapping[str, Any]] = ({"op": "center_crop"},),
        batch_size: int = 64,
        depth: int | None = None,
        bits: int | None = None,
    ) -> np.ndarray:
        """Returns the (n, d) float32 means of the deepest map over its positions, as the stage `embed` computes them.

        Args:
            images: paths, PIL images, arrays (H, W, 3) or (H, W) uint8, or tensors (C, H, W), C 1 or 3, uint8 or
                floats in 0..1, which are rounded to 8 bits. All can be mixed, and be of any size.
            augment: what brings an image to `image_size`, as `dataset.eval_augment` of a recipe.
            batch_size: the number of images that the network gets at a time.
            depth: the bits of the data in images of more than 8 bits a sample, as `dataset.depth` of a recipe. None:
                16; then an image of fewer, which would be nearly black, is refused.
            bits: the bits of images that have their channels as they are, as `dataset.bits` of a recipe: `images` are
                paths and arrays (H, W, C) of the network's channels then, uint8 or uint16. None: images become RGB.

        Raises:
            UserError: one of `images` is no image, or has levels beyond `depth`, or other channels or bits; names it.
                Or the network has other channels than RGB, and `bits` is not given.
        """
        pixels = self._find_pixel_format(bits)
        opened, rows = list(images), [np.empty((0, self.shapes[-1][0]), np.float32)]
        for start in range(0, len(opened), batch_size):
            batch = [
                _open_image(image, start + k, depth) if pixels is None else _open_bands(image, start + k, pixels)
                for k, image in enumerate(opened[start : start + batch_size])
            ]
            rows.append(pool_maps(self(self._to_tensor(batch, augment)), "avg").float().cpu().numpy())
        return np.concatenate(rows)

    def _find_pixel_format(self, bits: int | None) -> PixelFormat | None:
        """Returns the format of images with their channels as they are; None if they become RGB."""
        channels = self.image_channels
        if bits is None:
            if channels != RGB_PIXELS.channels:
                raise UserError(f"bits: None is not valid for a network of {channels} channels; valid: 8 or 16")
            return None
        if bits not in PIXEL_DTYPES:
            raise UserError(f"bits: {bits!r} is not valid; valid: 8, 16, or None (images become RGB)")
        return PixelFormat(channels, bits)

    def _to_tensor(self, images: Sequence[Image.Image | ChannelImage], augment: Sequence[Mapping[str, Any]]) -> Tensor:
        """Returns (B, C, S, S) floats in 0..1 on the device of the network."""
        positions = np.arange(len(images))
        keys = derive_view_keys(0, np.zeros_like(positions), positions, 0)
        params = ops.sample_params(augment, keys, np.array([image.size for image in images]), self.image_size)
        pixels = np.stack(list(ops.apply_batch(images, params, self.image_size)))
        device = next(self.parameters()).device
        return scale_pixels(send_pixels(pixels, device))


def _open_image(image: ImageLike, position: int, depth: int | None) -> Image.Image:
    """Returns an RGB image. Errors call an image without a path by its position."""
    where = str(image) if isinstance(image, str | Path) else f"images[{position}]"
    levels = list_depth_ranges(depth)
    try:
        if isinstance(image, str | Path):
            rgb = open_rgb(Path(image).read_bytes(), levels=levels)
        else:
            rgb = convert_given_image(image, levels)
        if (found := rgb.info.get("levels")) is not None:
            kind, low, high = found
            check_not_dark(kind, low, high) if depth is None else check_depth(kind, low, high, depth)
        return rgb
    except (BadImage, OSError, TypeError, ValueError) as error:
        raise UserError(f"{where}: is not an image: {describe_os_error(error)}") from None


def _open_bands(image: ImageLike, position: int, pixels: PixelFormat) -> ChannelImage:
    """Returns an image with its channels as they are. Errors call an image without a path by its position."""
    where = str(image) if isinstance(image, str | Path) else f"images[{position}]"
    try:
        if isinstance(image, str | Path):
            return open_channels(Path(image).read_bytes(), pixels)
        return convert_given_channels(image, pixels)
    except (BadImage, OSError, ValueError) as error:
        raise UserError(f"{where}: is not an image of {pixels}: {describe_os_error(error)}") from None
