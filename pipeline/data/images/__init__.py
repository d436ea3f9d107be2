"""Encoded bytes -> pixels: images in RGB, and maps of classes."""

from firstlight.pipeline.data.images.bad_image import BadImage
from firstlight.pipeline.data.images.class_maps import decode_class_map
from firstlight.pipeline.data.images.decode import (
    ImageHeader,
    convert_to_rgb,
    decode_rgb,
    open_rgb,
    read_header,
    read_header_frame,
)

__all__ = [
    "BadImage",
    "ImageHeader",
    "convert_to_rgb",
    "decode_class_map",
    "decode_rgb",
    "open_rgb",
    "read_header",
    "read_header_frame",
]
