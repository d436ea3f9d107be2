"""Fits the annotation of an image to its pixels: turned upright with the image, and within its edges."""

from dataclasses import replace

from firstlight.pipeline.data.annotations import Annotation, fit_to_image
from firstlight.pipeline.data.images import BadImage, decode_class_map, read_header_frame
from firstlight.pipeline.data.images.class_maps import encode_class_map
from firstlight.pipeline.data.images.decode import ImageFrame
from firstlight.pipeline.data.images.orientation import EXIF_TRANSPOSES, find_annotated_frame, turn_boxes, turn_map

# The number of pixels by which a box may reach over the edge of an image of another size than the annotation states.
BOX_TOLERANCE = 1.0


def fit_annotation(found: Annotation, frame: ImageFrame, num_classes: int, where: str) -> Annotation:
    """Returns `found` in the upright image of `frame`, with its boxes cut at the edges; what was decided is counted in
    its `readings`.

    `where` is the file of the annotation, for the reasons.

    Raises:
        BadImage: the annotation does not fit the image; or its positions may apply before or after turning the image.
    """
    if frame.orientation in EXIF_TRANSPOSES and (found.boxes is not None or found.mask is not None):
        found = _turn_annotation(found, frame, where)
    elif found.boxes is not None and found.stated_size not in (None, frame.upright):
        found = _keep_fitting_boxes(found, frame, where)
    return fit_to_image(found, frame.upright, num_classes, where)


def _turn_annotation(found: Annotation, frame: ImageFrame, where: str) -> Annotation:
    stated = found.stated_size if found.mask is None else _read_mask_size(found.mask, where)
    counts_in = found.frame or find_annotated_frame(stated, frame.stored, frame.upright)
    if counts_in is None:
        size = f"states {stated[0]} x {stated[1]} pixels" if stated else "states no size"
        raise BadImage(
            f"{where}: the image has EXIF orientation {frame.orientation}, and the annotation, which {size}, may apply "
            "before or after turning it; valid: dataset.annotated_orientation=stored or upright",
            "annotation",
        )
    if counts_in == "upright":
        return found.count_reading("oriented_upright")
    if found.mask is not None:
        turned = turn_map(decode_class_map(found.mask, frame.stored[0] * frame.stored[1]), frame.orientation)
        found = replace(found, mask=encode_class_map(turned))
    if found.boxes is not None:
        found = replace(found, boxes=turn_boxes(found.boxes, frame.orientation, frame.stored))
    return found.count_reading("oriented_stored")


def _read_mask_size(mask: bytes, where: str) -> tuple[int, int]:
    try:
        return read_header_frame(mask).stored
    except BadImage as error:
        raise BadImage(f"{where}: {error}", "annotation") from None


def _keep_fitting_boxes(found: Annotation, frame: ImageFrame, where: str) -> Annotation:
    """Counts an annotation that states another size than its image has, if its boxes are within the image.

    Raises:
        BadImage: a box reaches over the edge, so that the boxes belong to an image of another size.
    """
    assert found.boxes is not None
    assert found.stated_size is not None
    width, height = frame.upright
    beyond = (found.boxes < -BOX_TOLERANCE).any(1) | (
        (found.boxes[:, 2] > width + BOX_TOLERANCE) | (found.boxes[:, 3] > height + BOX_TOLERANCE)
    )
    if beyond.any():
        stated = f"{found.stated_size[0]} x {found.stated_size[1]}"
        raise BadImage(
            f"{where}: states {stated} pixels, and its image has {width} x {height}: "
            f"object {int(beyond.argmax()) + 1} reaches over its edge; valid: boxes in pixels of the image",
            "annotation",
        )
    return found.count_reading("other_size_stated")
