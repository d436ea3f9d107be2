"""Boxes are drawn where they are, masks in the colours of their classes, and the legend has what is seen."""

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from firstlight.pipeline.data.annotations import Annotation
from firstlight.pipeline.report import overlay
from tests.support.png_maps import png
from tests.support.published_sets import write_texts
from tests.support.voc_folders import CAT, DOG, HARD_DOG, prepare_voc_store, write_mask, write_objects, write_voc


def test_boxes_and_masks_are_drawn_in_pixels_of_the_image() -> None:
    colours = np.linspace(0, 1, 9).reshape(3, 3)
    axis = Figure().subplots()
    known = Annotation(
        boxes=np.array([[10, 20, 110, 70], [0, 0, 5, 5]], np.float32),
        box_classes=np.array([2, 0]),
        difficult=np.array([False, True]),
    )
    assert overlay.draw_annotation(axis, np.zeros((400, 2000, 3), np.uint8), known, colours) == {0, 2}
    assert [(p.get_xy(), p.get_width(), p.get_height(), p.get_linestyle()) for p in axis.patches] == [
        ((10, 20), 100, 50, "-"),
        ((0, 0), 5, 5, "--"),
    ]
    assert tuple(axis.images[0].get_extent()) == (0, 2000, 400, 0)  # also of one that is shown smaller
    assert axis.images[0].get_array().shape == (96, 480, 3)
    axis = Figure().subplots()
    values = np.array([[0, 1], [2, 255]], np.uint8)
    assert overlay.draw_annotation(axis, np.zeros((2, 2, 3), np.uint8), Annotation(mask=png(values)), colours) == {
        0,
        1,
        2,
        255,
    }
    np.testing.assert_array_equal(axis.images[1].get_array(), np.array([colours[[0, 1]], [colours[2], [0, 0, 0]]]))


def test_sample_images_show_their_annotations(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "in", trainval="000000\n000001\n000002\n000003\n000004\n", test="000005\n")
    for image, objects in enumerate(((CAT, DOG), (HARD_DOG,), (), (), (CAT,), (DOG,))):
        write_objects(root, image, *objects)
    write_voc(root, "ImageSets/Segmentation", train="000000\n", test="000001\n")
    for image in range(2):
        write_mask(root, image, [[image, 255, 1, 0, 0, 0]] * 4)
    found = overlay.draw_annotated_images(prepare_voc_store(root), np.arange(5), "five")
    assert [text.get_text() for text in found.legends[0].get_texts()] == ["cat", "dog"]
    assert [len(axis.patches) for axis in found.axes] == [2, 1, 0, 0, 1, 0, 0, 0]
    present = overlay.draw_annotated_images(prepare_voc_store(root, annotations=["present"]), np.arange(1), "one")
    assert (present.axes[0].get_title(), present.legends) == ("cat, dog", [])
    write_texts(root, classes="grass\nsky\n")
    masks = overlay.draw_annotated_images(prepare_voc_store(root, annotations=["mask"]), np.arange(2), "two")
    assert [text.get_text() for text in masks.legends[0].get_texts()] == ["grass", "sky", "void"]
    for figure in (found, present, masks):
        figure.savefig(io.BytesIO(), format="png")


def test_forty_classes_have_distinct_colours() -> None:
    assert len({tuple(colour) for colour in overlay._make_class_colours(40).tolist()}) == 40
    assert overlay._make_class_colours(300).shape == (300, 3)
