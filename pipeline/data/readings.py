"""Sentences about what was taken as what while images and their annotations were read.

Names of readings are counted while a store is written, and kept in its manifest; the terminal and the report show them
as these sentences.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from firstlight.pipeline.data.images.class_maps import VOID_VALUE

# Each is followed by a number of images, files or objects.
READING_SENTENCES = {
    "png_text_dropped": "PNG files read without their texts and colour profiles, which are too large or damaged",
    "jpeg_end_added": "JPEG files without their end marker, read as every pixel is there",
    "high_bytes_only": "images of 16 bits a sample of which only the high bytes can be read",
    "one_colour": "images of one colour",
    "dark": "images without a level above 31 of 255",
    "first_frame": "files of several images (animations, pages), of which the first is read",
    "oriented": "images turned upright by their EXIF orientation",
    "oriented_stored": "annotations turned upright with their image, as they count in its stored pixels",
    "oriented_upright": "annotations of images with an EXIF orientation, taken as they are, as they count in the "
    "upright image",
    "other_size_stated": "annotations that state another size than their image has, taken in pixels of the image, as "
    "all boxes are within it",
    "object_unnamed": "objects without a name, left out",
    "object_without_box": "objects without a box of four numbers; their classes count as present, without a box",
    "box_swapped": "boxes whose ends were swapped, read in order",
    "box_cut": "boxes cut at the edges of their image by more than one pixel",
    "box_outside": "boxes without a pixel of their image, left out",
    "difficult_as_no": "values of `difficult` that are neither 0 nor 1, taken as no",
    "difficult_as_yes": "values of `difficult` that are neither 0 nor 1, taken as yes",
    "mask_few_bits": "masks of fewer than 8 bits, whose values are taken as classes",
    "mask_16_bits": "masks of 16 or 32 bits, whose values are taken as classes",
    "mask_grey_as_colours": "masks of grey kept as colours, whose levels are taken as classes",
    "mask_voc_colours": "masks of VOC's colours, taken as the classes that they stand for",
    "mask_values_stated": "masks read by dataset.mask_values",
    "mask_turned": "masks with an EXIF orientation of their own, turned upright",
    "mask_tiff": "masks that are TIFF files",
    "mask_bmp": "masks that are BMP files",
    "mask_gif": "masks that are GIF files",
    "mask_ppm": "masks that are PPM files",
    "mask_void": "masks that are void everywhere, from which nothing is learned and which are not scored",
}
# The most names of classes in a note.
MAX_NAMED_CLASSES = 6
# Kinds of counts of annotations, the first of which a store has says which classes occur.
OCCURRENCE_KINDS = ("present", "boxes", "pixels")


def describe_readings(images: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """Returns lines about what was taken as what, and about classes that do not occur.

    `images`: the entry of the manifest; `classes`: the names of the classes.
    """
    lines = [_describe_levels(kind, found) for kind, found in images.get("levels", {}).items()]
    found = images.get("readings", {})
    lines += [f"{sentence}: {found[name]:,}" for name, sentence in READING_SENTENCES.items() if found.get(name)]
    lines += _describe_lost_classes(images, classes)
    return [line for line in lines if line] + _describe_absent_classes(images, classes)


def _describe_levels(kind: str, found: Mapping[str, Any]) -> str:
    """Returns how images of more than 8 bits are scaled, "" where 16 bits are used as they are meant."""
    low, high, black, white = (f"{found[key]:,.10g}" for key in ("lowest", "highest", "black", "white"))
    text = f"{found['images']:,} images of {kind} have levels {low} to {high}: {black} is black, {white} is white"
    if kind != "floats":
        text += " (dataset.depth sets the number of bits)"
    if found["flat"]:
        text += f"; {found['flat']:,} of them have one colour, or nearly so"
    if found["dark"]:
        text += f"; {found['dark']:,} of them use less than a sixteenth of the range"
    is_plain = found["white"] == 65535 and not found["flat"] and not found["dark"]
    return "" if is_plain else text


def _describe_lost_classes(images: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """Returns a line for each split with classes of which no image can be decoded."""
    found = {
        split: [classes[k] for k in numbers if k < len(classes)]
        for split, numbers in images.get("lost_classes", {}).items()
    }
    return [
        f"{split}: no image can be decoded of {_join_class_names(names)}" for split, names in found.items() if names
    ]


def _join_class_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED_CLASSES:,} more" if len(names) > MAX_NAMED_CLASSES else ""
    return ", ".join(names[:MAX_NAMED_CLASSES]) + more


def _describe_absent_classes(images: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    lines = []
    for split, kinds in images.get("annotated", {}).items():
        kind = next((kind for kind in OCCURRENCE_KINDS if kind in kinds), None)
        absent = [name for k, name in enumerate(classes) if kind is not None and not kinds[kind].get(str(k))]
        if absent:
            is_void = kind == "pixels" and kinds[kind].get(str(VOID_VALUE))
            why = f"; {VOID_VALUE} is read as void, unless dataset.mask_values names its class" if is_void else ""
            lines.append(describe_absent(split, absent, len(classes)) + why)
    return lines


def describe_absent(split: str, absent: Sequence[str], num_classes: int) -> str:
    """Returns a line about the classes that do not occur in a split."""
    return f"{split}: {len(absent):,} of the {num_classes:,} classes do not occur: {_join_class_names(absent)}"


def describe_refused(images: Mapping[str, Any]) -> str:
    """Returns why images are quarantined, with numbers, in brackets; "" if the manifest does not say."""
    found = sorted(images.get("refused", {}).items(), key=lambda pair: (-pair[1], pair[0]))
    return f" ({', '.join(f'{count:,} {kind}' for kind, count in found)})" if found else ""
