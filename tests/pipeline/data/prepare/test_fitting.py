"""Annotations are turned with their image, and cut at its edges; what cannot be decided is refused."""

from typing import Any

import numpy as np
import pytest

from firstlight.pipeline.data.annotations import Annotation
from firstlight.pipeline.data.images import BadImage, decode_class_map
from firstlight.pipeline.data.images.class_maps import encode_class_map
from firstlight.pipeline.data.images.decode import ImageFrame
from firstlight.pipeline.data.images.orientation import turn_map, turn_size
from firstlight.pipeline.data.prepare.fitting import fit_annotation

STORED = (30, 20)


def make_frame(orientation: int, stored: tuple[int, int] = STORED) -> ImageFrame:
    return ImageFrame(stored, turn_size(stored, orientation), orientation)


def make_boxes(*boxes: tuple[float, float, float, float], **fields: Any) -> Annotation:
    k = len(boxes)
    return Annotation(None, np.array(boxes, np.float32), np.arange(k), np.zeros(k, bool), **fields)


def fit(found: Annotation, frame: ImageFrame) -> Annotation:
    return fit_annotation(found, frame, 3, "a.xml")


@pytest.mark.parametrize(
    ("orientation", "fields", "expected", "reading"),
    [
        (6, {"stated_size": (30, 20)}, [12, 11, 17, 25], "oriented_stored"),
        (6, {"stated_size": (20, 30)}, [11, 3, 15, 8], "oriented_upright"),
        (8, {"stated_size": (30, 20)}, [3, 5, 8, 19], "oriented_stored"),
        (3, {"frame": "stored"}, [5, 12, 19, 17], "oriented_stored"),
        (3, {"frame": "upright"}, [11, 3, 25, 8], "oriented_upright"),
        (6, {"frame": "stored", "stated_size": (20, 30)}, [12, 11, 17, 25], "oriented_stored"),
    ],
)
def test_boxes_of_turned_image_are_turned(
    orientation: int, fields: dict[str, Any], expected: list[int], reading: str
) -> None:
    box = (11, 3, 15, 8) if fields.get("stated_size") == (20, 30) and "frame" not in fields else (11, 3, 25, 8)
    fitted = fit(make_boxes(box, **fields), make_frame(orientation))
    assert fitted.boxes is not None
    assert fitted.boxes.tolist() == [expected]
    assert fitted.readings == {reading: 1}


@pytest.mark.parametrize(
    ("orientation", "stated", "stored", "said"),
    [
        (3, (30, 20), STORED, "which states 30 x 20 pixels"),
        (6, None, STORED, "which states no size"),
        (6, (20, 20), (20, 20), "which states 20 x 20 pixels"),
        (6, (60, 40), STORED, "which states 60 x 40 pixels"),
    ],
)
def test_undecided_orientation_is_refused_and_names_its_key(
    orientation: int, stated: tuple[int, int] | None, stored: tuple[int, int], said: str
) -> None:
    with pytest.raises(BadImage) as raised:
        fit(make_boxes((1, 1, 5, 5), stated_size=stated), make_frame(orientation, stored))
    assert said in str(raised.value)
    assert "valid: dataset.annotated_orientation=stored or upright" in str(raised.value)
    assert raised.value.kind == "annotation"


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_masks_of_turned_image_are_turned(orientation: int) -> None:
    values = np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.uint8)
    turned = turn_map(values, orientation)
    of_stored = fit(Annotation(mask=encode_class_map(values)), make_frame(orientation))
    assert of_stored.mask is not None
    np.testing.assert_array_equal(decode_class_map(of_stored.mask), turned)
    assert of_stored.readings == {"oriented_stored": 1}
    kept = encode_class_map(turned)
    of_upright = fit(Annotation(mask=kept), make_frame(orientation))
    assert (of_upright.mask, of_upright.readings) == (kept, {"oriented_upright": 1})
    with pytest.raises(BadImage, match="may apply before or after"):
        fit(Annotation(mask=encode_class_map(values[:5, :5])), make_frame(orientation))
    with pytest.raises(BadImage, match=r"a\.xml"):
        fit(Annotation(mask=b"no image"), make_frame(orientation))


def test_present_classes_have_no_orientation() -> None:
    found = Annotation(np.array([1, 0, 0], np.int8))
    assert fit(found, make_frame(6)) is found


def test_other_stated_size_is_reported_or_refused() -> None:
    """Boxes of a larger copy of the image reach over its edge; others may be of it."""
    fitted = fit(make_boxes((1, 1, 5, 5), (-1, 0, 31, 20), stated_size=(60, 40)), make_frame(1))
    assert fitted.readings == {"other_size_stated": 1}
    for wrong in ((1, 1, 32, 5), (1, 1, 5, 22), (-3, 1, 5, 5)):
        with pytest.raises(BadImage, match=r"states 60 x 40 pixels, and its image has 30 x 20: object 2 reaches"):
            fit(make_boxes((1, 1, 5, 5), wrong, stated_size=(60, 40)), make_frame(1))
    cut = fit(make_boxes((1, 1, 35, 5), stated_size=STORED), make_frame(1))
    assert cut.readings == {"box_cut": 1}
