"""The classes of a set in VOC's layout, and what the values of its masks stand for."""

from pathlib import Path

import numpy as np
import pytest

from firstlight.pipeline.data.images.class_maps import VOID_VALUE, ClassMapRule
from firstlight.pipeline.data.sources.published.voc_classes import (
    find_mask_files,
    is_void_name,
    make_mask_rule,
    read_label_map,
)
from firstlight.pipeline.errors import UserError
from tests.support.image_sources import write_named_files
from tests.support.odd_images import encode_image
from tests.support.published_sets import get_refusal, write_texts
from tests.support.voc_folders import prepare_voc_store, write_voc

LABEL_MAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncell:250,50,83::\nignore:7,7,7::\n"


def test_masks_are_found_by_name_in_any_lossless_format(tmp_path: Path) -> None:
    write_named_files(
        tmp_path, *(f"SegmentationClass/{name}" for name in ("a.PNG", "b.tif", "b.png", "c.jpg", "d.txt", "e f.bmp"))
    )
    found = {name.decode(): path.decode().rpartition("/")[2] for name, path in find_mask_files(tmp_path).items()}
    assert found == {"a": "a.PNG", "b": "b.png", "c": "c.jpg", "e f": "e f.bmp"}
    assert find_mask_files(tmp_path / "none") == {}


def test_label_map_names_the_colours(tmp_path: Path) -> None:
    assert read_label_map(tmp_path) == {}
    write_texts(tmp_path, labelmap=LABEL_MAP)
    found = read_label_map(tmp_path)
    assert found == {(0, 0, 0): "background", (250, 50, 83): "cell", (7, 7, 7): "ignore"}
    assert is_void_name("Ignore")
    assert not is_void_name("background")


@pytest.mark.parametrize(
    "line", ["cat", "cat:1,2", "cat:1,2,256::", "cat:a,b,c::", ":0,0,0::", "cat:0,0,0", "dog:0,0,0\ndog:1,1,1"]
)
def test_label_map_that_is_none_names_its_line(tmp_path: Path, line: str) -> None:
    write_texts(tmp_path, labelmap=f"first:0,0,0::\n{line}\n")
    with pytest.raises(UserError, match=r"labelmap\.txt: line \d: "):
        read_label_map(tmp_path)


def test_rule_is_that_of_stated_values_before_the_label_map() -> None:
    classes = ("background", "cell")
    label_map = {(0, 0, 0): "background", (9, 9, 9): "cell", (7, 7, 7): "ignore"}
    assert make_mask_rule(classes, {}, {}) == ClassMapRule(2)
    assert make_mask_rule(classes, {}, label_map).colours == {(0, 0, 0): 0, (9, 9, 9): 1, (7, 7, 7): VOID_VALUE}
    stated = make_mask_rule(classes, {"cell": (0, 7), "void": (9,)}, label_map)
    assert stated == ClassMapRule(2, {0: 1, 7: 1, 9: VOID_VALUE})
    assert make_mask_rule(classes, {"cell": ("#0a0b0c",)}, {}).colours == {(10, 11, 12): 1}
    with pytest.raises(UserError, match=r"dataset\.mask_values: 'cel' is no class; .*cell"):
        make_mask_rule(classes, {"cel": (0,)}, {})
    with pytest.raises(UserError, match=r"labelmap\.txt: 'dog' is no class"):
        make_mask_rule(classes, {}, {(1, 1, 1): "dog"})


def write_masks(root: Path, masks: list[np.ndarray], kind: str = "png") -> None:
    (root / "SegmentationClass").mkdir()
    for k, mask in enumerate(masks):
        (root / f"SegmentationClass/{k:06d}.{kind}").write_bytes(encode_image(mask, {"tif": "TIFF"}.get(kind, "PNG")))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_voc(tmp_path, "ImageSets/Segmentation", train="000000\n000001\n", test="000002\n")


HALF = np.array([[0, 0, 0, 1, 1, 1]] * 4, np.uint8)


def test_annotation_tool_names_classes_and_colours(root: Path) -> None:
    colours = np.array([(0, 0, 0), (250, 50, 83), (7, 7, 7)], np.uint8)
    write_texts(root, labelmap=LABEL_MAP)
    write_masks(root, [colours[HALF], colours[HALF * 2], colours[HALF]])
    found = prepare_voc_store(root)
    assert found.classes == ("background", "cell")
    assert found.images["annotated"]["train"]["pixels"] == {"0": 24, "1": 12, "255": 12}


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_binary_masks_are_asked_about_and_read_as_stated(root: Path, kind: str) -> None:
    """Masks of 0 and 255 with two classes: 255 is void by default, and the score would be perfect."""
    write_texts(root, classes="background\ncell\n")
    write_masks(root, [HALF * 255] * 3, kind)
    with pytest.raises(
        UserError, match=r"50\.0% of the pixels .* class 1 \('cell'\) never occurs; valid, if 255 is a cl"
    ):
        prepare_voc_store(root)
    for values, pixels in (
        ({"background": 0, "cell": 255}, {"0": 24, "1": 24}),
        ({"cell": [255], "background": [0, 7]}, {"0": 24, "1": 24}),
        ({"background": 0, "void": 255, "cell": 1}, {"0": 24, "255": 24}),
    ):
        found = prepare_voc_store(root, mask_values=values)
        assert found.images["annotated"]["train"]["pixels"] == pixels
        assert found.images["readings"]["mask_values_stated"] == 3
    (root / "classes.txt").unlink()
    for order in (("background", "cell"), ("cell", "background")):
        values = {"background": 0, "cell": 255}
        found = prepare_voc_store(root, mask_values={name: values[name] for name in order})
        assert found.classes == order
    assert "or state dataset.mask_values" in get_refusal("voc", root, annotations=["mask"])


def test_folder_of_masks_alone_names_no_class(root: Path) -> None:
    write_masks(root, [HALF] * 3)
    assert "classes.txt' is missing" in get_refusal("voc", root, annotations=["mask"])
