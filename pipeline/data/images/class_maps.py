"""Maps of classes: image files whose pixels are numbers of classes, colours that stand for them, or void.

A store keeps a map as a PNG file of 8 bits whose values are classes, or `VOID_VALUE`. Files of that kind stay as they
are; what is certain of others is read and written so.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from firstlight.pipeline.data.images.bad_image import BadImage, raise_only_bad_image
from firstlight.pipeline.data.images.deep_colour import PNG_DEPTH_BYTE, TIFF_BITS_PER_SAMPLE
from firstlight.pipeline.data.images.formats import JPEG_SIGNATURE
from firstlight.pipeline.data.images.headers import open_file_header
from firstlight.pipeline.data.images.orientation import EXIF_TRANSPOSES, load_pixels, turn_map

# Value of a map: the pixel belongs to no class, or to an unknown one.
VOID_VALUE = 255
# The name of void in `dataset.mask_values`.
VOID_NAME = "void"
# VOC's colour of void.
VOC_VOID_COLOUR = (224, 224, 192)
# Formats that keep every value.
LOSSLESS_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
# The most values in a message.
MAX_NAMED_VALUES = 6
MaskColour = tuple[int, int, int]


@dataclass(frozen=True)
class ClassMapRule:
    """The meaning of the values of maps: the class of each number and of each colour, or `VOID_VALUE`.

    Without either, numbers are classes, and colours are VOC's.
    """

    num_classes: int
    numbers: Mapping[int, int] = field(default_factory=dict)
    colours: Mapping[MaskColour, int] = field(default_factory=dict)

    @property
    def is_stated(self) -> bool:
        return bool(self.numbers or self.colours)


def decode_class_map(data: bytes, max_pixels: int = 64_000_000) -> np.ndarray:
    """Decodes a PNG file with a palette, or with one channel of 8 bits, to its numbers (H, W) uint8.

    The numbers are the indices of the palette's entries, not their colours.

    Raises:
        BadImage: the bytes are not a whole file of this kind, or its header declares more than `max_pixels` pixels.
    """
    return raise_only_bad_image(lambda: _decode_plain_map(data, max_pixels), max_pixels)


def _decode_plain_map(data: bytes, max_pixels: int) -> np.ndarray:
    image = open_file_header(data, max_pixels, ("PNG",))
    # Pillow scales grey of fewer than 8 bits up to 255.
    if image.mode not in ("P", "L") or (image.mode == "L" and _find_map_depth(image, data) != 8):
        raise BadImage(
            f"is not a map of classes but an image of mode {image.mode}, {data[PNG_DEPTH_BYTE]} bits; "
            "valid: a palette, or grey of 8 bits"
        )
    image.load()
    return np.asarray(image)


def interpret_class_map(data: bytes, max_pixels: int, rule: ClassMapRule) -> tuple[bytes, tuple[str, ...]]:
    """Returns a map of classes as a store keeps it, and what was taken as what (`readings.READING_SENTENCES`).

    Certain are: grey or a palette of up to 16 bits, and grey kept as colours, whose values are classes; VOC's colours;
    and what `rule` states. The map is turned upright if the file has an EXIF orientation of its own.

    Raises:
        BadImage: the file is none of this.
    """
    return raise_only_bad_image(lambda: _interpret_map(data, max_pixels, rule), max_pixels)


def encode_class_map(values: np.ndarray) -> bytes:
    """Returns (H, W) uint8 classes as a PNG file of grey."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def list_voc_colours(count: int) -> list[MaskColour]:
    """Returns VOC's colours of classes: the bits of the class, distributed over red, green and blue."""
    shares = [
        [((k >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)]
        for k in range(count)
        for channel in range(3)
    ]
    levels = [sum(bits) for bits in shares]
    return [(levels[k], levels[k + 1], levels[k + 2]) for k in range(0, len(levels), 3)]


def _interpret_map(data: bytes, max_pixels: int, rule: ClassMapRule) -> tuple[bytes, tuple[str, ...]]:
    if data.startswith(JPEG_SIGNATURE):
        raise BadImage("is a JPEG file, which does not keep the values of a mask; valid: a PNG, TIFF, BMP or GIF file")
    image = open_file_header(data, max_pixels, LOSSLESS_FORMATS)
    orientation, depth = load_pixels(image), _find_map_depth(image, data)
    readings = [] if image.format == "PNG" else [f"mask_{str(image.format).lower()}"]
    if image.mode == "P" and not rule.colours:
        if not rule.numbers:
            _check_palette(image, rule.num_classes)
        values = np.asarray(image)
    elif image.mode in ("1", "L", "I;16", "I;16B", "I") and not rule.colours:
        values, how = _read_numbers(image, depth)
        readings += how
    else:
        values, how = _read_colours(image, rule)
        readings += how
    if rule.is_stated:
        values = _look_up_classes(values, rule)
        readings.append("mask_values_stated")
    if orientation in EXIF_TRANSPOSES and image.format != "TIFF":
        values = turn_map(values, orientation)
    if orientation in EXIF_TRANSPOSES:
        readings.append("mask_turned")
    return (encode_class_map(_fit_8_bits(values)), tuple(readings)) if readings else (data, ())


def _find_map_depth(image: Image.Image, data: bytes) -> int:
    """Returns the number of bits of a sample that the file keeps."""
    if image.format == "PNG":
        return data[PNG_DEPTH_BYTE]
    bits = getattr(image, "tag_v2", {}).get(TIFF_BITS_PER_SAMPLE, (8,))
    return int(bits[0] if isinstance(bits, tuple) else bits)


def _read_numbers(image: Image.Image, depth: int) -> tuple[np.ndarray, list[str]]:
    """Returns the (H, W) numbers of a grey image, and the names of what was decided."""
    values = np.asarray(image)
    if image.mode == "1":
        return values.astype(np.uint8), ["mask_few_bits"]
    if image.mode == "L" and depth < 8:
        # Pillow scales them up to 255.
        return values // (255 // (2**depth - 1)), ["mask_few_bits"]
    return values, [] if image.mode == "L" else ["mask_16_bits"]


def _fit_8_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype != np.uint8 and (values.min() < 0 or values.max() > VOID_VALUE):
        wrong = int(values[(values < 0) | (values > VOID_VALUE)][0])
        raise BadImage(f"the value {wrong} is not a class; {advise_mask_values(wrong)}")
    return values.astype(np.uint8)


def _read_colours(image: Image.Image, rule: ClassMapRule) -> tuple[np.ndarray, list[str]]:
    """Returns the (H, W) classes of an image of colours, or its numbers where they are grey and `rule` has numbers."""
    if image.mode in ("RGBA", "LA", "PA"):
        alpha = np.asarray(image.getchannel("A"))
        if (alpha != 255).any():
            raise BadImage("is partly transparent; valid: a mask without transparency")
    elif image.mode not in ("RGB", "P", "L", "1"):
        raise BadImage(f"is an image of mode {image.mode}; valid: a palette, grey, or colours that stand for classes")
    pixels = np.asarray(image.convert("RGB"))
    if not rule.colours and (pixels[:, :, :1] == pixels).all():
        return pixels[:, :, 0], ["mask_grey_as_colours"]
    table = {colour: k for k, colour in enumerate(list_voc_colours(rule.num_classes))} | {VOC_VOID_COLOUR: VOID_VALUE}
    table = dict(rule.colours) if rule.is_stated else table
    return _match_colours(pixels, table, rule), [] if rule.is_stated else ["mask_voc_colours"]


def _match_colours(pixels: np.ndarray, table: Mapping[MaskColour, int], rule: ClassMapRule) -> np.ndarray:
    codes = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    found, places = np.unique(codes.reshape(-1), return_inverse=True)
    classes = [table.get((code >> 16, code >> 8 & 255, code & 255)) for code in found.tolist()]
    unknown = [f"#{code:06x}" for code, known in zip(found.tolist(), classes, strict=True) if known is None]
    if unknown:
        named = ", ".join(unknown[:MAX_NAMED_VALUES]) + (" ..." if len(unknown) > MAX_NAMED_VALUES else "")
        what = "dataset.mask_values does not name" if rule.is_stated else "no class is known for"
        raise BadImage(f"{what} the colours {named}; {advise_mask_values(unknown[0])}")
    return np.array(classes, np.uint8)[places].reshape(pixels.shape[:2])


def _look_up_classes(values: np.ndarray, rule: ClassMapRule) -> np.ndarray:
    """Maps (H, W) numbers to classes by `rule`; classes that were found by their colours stay."""
    if not rule.numbers:
        return values
    found, places = np.unique(values.reshape(-1), return_inverse=True)
    unknown = [value for value in found.tolist() if value not in rule.numbers]
    if unknown:
        raise BadImage(f"dataset.mask_values does not name the value {unknown[0]}; {advise_mask_values(unknown[0])}")
    return np.array([rule.numbers[value] for value in found.tolist()], np.uint8)[places].reshape(values.shape)


def _check_palette(image: Image.Image, num_classes: int) -> None:
    """Refuses a palette that has VOC's colours in another order: its indices and its colours say different things.

    Raises:
        BadImage: that is so for the entries that occur.
    """
    palette = image.getpalette("RGB") or []
    known = {colour: k for k, colour in enumerate(list_voc_colours(num_classes))} | {VOC_VOID_COLOUR: VOID_VALUE}
    used = np.unique(np.asarray(image)).tolist()
    named = {
        k: known.get((palette[3 * k], palette[3 * k + 1], palette[3 * k + 2])) for k in used if 3 * k + 2 < len(palette)
    }
    wrong = next((k for k in sorted(named) if named[k] != k), None)
    if len(named) > 1 and wrong is not None and None not in named.values():
        raise BadImage(
            f"the palette has VOC's colours in another order: entry {wrong} has the colour of class {named[wrong]}; "
            f"{advise_mask_values(wrong)}"
        )


def advise_mask_values(value: int | str) -> str:
    """Returns the end of a reason: what to do about a mask with a value or colour that is not known to be a class."""
    shown = f'"{value}"' if isinstance(value, str) else value
    return f"valid: dataset.mask_values={{name: {shown}, ...}}, the values of each class, and of void"
