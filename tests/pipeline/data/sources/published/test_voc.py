"""The annotations of PASCAL VOC, from the published folders to the store."""

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from firstlight.pipeline.data.manifest import QUARANTINE_FILE
from firstlight.pipeline.data.sources import Source
from firstlight.pipeline.data.sources.published.voc_classes import VOC_CLASS_NAMES
from firstlight.pipeline.data.store import Store
from tests.support.image_sources import dataset_options, prepare_store, read_split
from tests.support.odd_images import encode_image, make_exif
from tests.support.paths import SHARED_DATA
from tests.support.presence import read_presence
from tests.support.published_sets import get_refusal, open_set, write_texts
from tests.support.voc_folders import CAT, DOG, HARD_DOG, prepare_voc_store, write_mask, write_objects, write_voc


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A set of its own classes, without lists of them: 4 images to train on, 2 to test on, all 6 x 4."""
    root = write_voc(
        tmp_path,
        trainval="000000\n000001\n000002\n000003\n",
        train="000002\n000000\n",
        val="000001\n000003\n",
        test="000004\n000005\n",
    )
    for image, objects in enumerate(((CAT, DOG), (HARD_DOG,), (HARD_DOG, DOG, CAT), (), (CAT,), (DOG,))):
        write_objects(root, image, *objects)
    return root


def read_quarantine(found: Store) -> dict[str, str]:
    return {Path(row["path"]).stem: row["reason"] for row in pq.read_table(found.path / QUARANTINE_FILE).to_pylist()}


def test_boxes_and_present_classes_are_stored(other: Path) -> None:
    found = prepare_voc_store(other)
    assert (found.classes, found.annotations, found.quarantined) == (("cat", "dog"), ("boxes", "present"), 0)
    assert read_presence(found, "train").tolist() == [[1, 1], [0, -1], [1, 1], [0, 0]]
    assert read_presence(found, "test").tolist() == [[1, 0], [0, 1]]
    assert set(found.labels("train").tolist()) == {-1}
    last, first = found.read_annotations(np.array([2, 0]))
    assert first.boxes is not None
    assert first.boxes.tolist() == [[0, 0, 6, 4], [1, 1, 3, 4]]  # xmin - 1, ymin - 1, xmax, ymax
    assert first.box_classes is not None
    assert (first.box_classes.tolist(), first.box_classes.dtype) == ([0, 1], np.int64)
    assert last.difficult is not None
    assert last.difficult.tolist() == [True, False, False]
    assert found.images["annotated"]["train"] == {
        "boxes": {"0": 2, "1": 4},
        "difficult": {"1": 2},
        "present": {"0": 2, "1": 2},
    }
    assert {name: found.subset(name).tolist() for name in ("train", "val")} == {"train": [0, 2], "val": [1, 3]}


@pytest.mark.parametrize("year", ["VOC2007", "VOC2012"])
def test_published_years_read_lists_of_twenty_classes(tmp_path: Path, year: str) -> None:
    """A 0 in the list of a class means that it occurs only in difficult objects.

    2012 has no test list, so val is tested.
    """
    lists = {
        "trainval": "000000\n000001\n000002\n",
        "train": "000000\n000002\n",
        "val": "000001\n",
        "dog_train": "000000  1\n000002 -1\n",
    }
    lists |= {"dog_val": "000001  0\n", "dog_trainval": "000000  1\n000001  0\n000002 -1\n"}
    lists |= {"test": "000004\n", "dog_test": "000004 -1\n"} if year == "VOC2007" else {}
    root = write_voc(tmp_path / "VOCdevkit" / year, **lists)
    for image in (0, 1, 2, 4):  # the lists count; cat has none, so that its objects decide
        write_objects(root, image, CAT, DOG)
    found = prepare_voc_store(tmp_path, annotations=["present"])
    dog, cat = VOC_CLASS_NAMES.index("dog"), VOC_CLASS_NAMES.index("cat")
    assert found.classes == VOC_CLASS_NAMES
    assert found.annotations == ("present",)
    present = np.concatenate([read_presence(found, "train"), read_presence(found, "test")])
    assert present[:, dog].tolist() == ([1, -1, 0, 0] if year == "VOC2007" else [1, 0, -1])
    assert set(present[:, cat].tolist()) == {1}
    assert set(np.delete(present, [dog, cat], 1).flat) == {0}
    assert sorted(found.subsets["images"]) == (["train", "val"] if year == "VOC2007" else ["train"])
    assert found.read_annotations(np.arange(2))[0].boxes is None


def test_complete_class_lists_need_no_objects(other: Path) -> None:
    write_texts(other, classes="cat\ndog\n")
    for name, occurs in (("cat", "1 -1 0 1"), ("dog", "-1 -1 1 0")):
        lines = [f"{k:06d} {value}\n" for k, value in enumerate(occurs.split())]
        write_texts(
            other,
            **{
                f"ImageSets__Main__{name}_trainval": "".join(lines),
                f"ImageSets__Main__{name}_test": "000004 1\n000005 -1\n",
            },
        )
    for file in (other / "Annotations").iterdir():
        file.unlink()
    (other / "Annotations").rmdir()
    found = prepare_voc_store(other, annotations=["present"])
    assert read_presence(found, "train").tolist() == [[1, 0], [0, 0], [-1, 1], [1, -1]]
    assert "Annotations' is missing" in get_refusal("voc", other, annotations=["boxes"])
    write_texts(other, ImageSets__Main__dog_train="000000 1\n000002 1\n")
    assert "dog_trainval.txt: line 1: '000000 -1' is not what another list of 'dog' says" in get_refusal(
        "voc", other, annotations=["present"]
    )
    for line in ("000000 2", "000000", "000000 1 1"):
        write_texts(other, ImageSets__Main__dog_train=f"000002 1\n{line}\n")
        assert f"dog_train.txt: line 2: {line!r} is not an image and one of 1, -1, 0" in get_refusal(
            "voc", other, annotations=["present"]
        )


def test_image_with_unusable_objects_is_quarantined(other: Path) -> None:
    write_texts(other, classes="dog\ncat\n")  # the order is the list's
    (other / "Annotations/000000.xml").write_text('<!DOCTYPE a [<!ENTITY x "y">]><annotation/>')
    (other / "Annotations/000001.xml").unlink()
    write_objects(other, 2, CAT, ("cow", (1, 1, 2, 2), 0))
    (other / "Annotations/000005.xml").write_bytes(b"<a>" + b" " * 1_000_000)
    found = prepare_voc_store(other)
    assert found.classes == ("dog", "cat")
    assert read_quarantine(found) == {
        "000000": "Annotations/000000.xml: has a document type (<!DOCTYPE ...>), which is not read; valid: plain XML",
        "000001": "Annotations/000001.xml: No such file or directory",
        "000002": "Annotations/000002.xml: object 2: 'cow' is no class of the set",
        "000005": "Annotations/000005.xml: is larger than 1,000,000 bytes",
    }
    assert found.subsets["lost"] == {"train": 2, "val": 1}
    assert (found.subset("train").tolist(), found.subset("val").tolist()) == ([], [0])


@pytest.mark.fault(54, "an annotation that leads out of the root")
def test_annotation_link_out_of_root_is_refused(other: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.xml"
    outside.write_text("<annotation/>")
    (other / "Annotations/000000.xml").unlink()
    (other / "Annotations/000000.xml").symlink_to(outside)
    assert read_quarantine(prepare_voc_store(other)) == {"000000": "Annotations/000000.xml: link leaves the root"}


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_boxes_of_turned_image_follow_it_or_are_refused(other: Path, kind: str) -> None:
    (other / "JPEGImages/000002.jpg").unlink()
    file = other / f"JPEGImages/000002.{kind.lower()}"
    file.write_bytes(encode_image(Image.new("RGB", (6, 4)), kind, exif=make_exif(6)))
    assert read_quarantine(prepare_voc_store(other)) == {
        "000002": "Annotations/000002.xml: the image has EXIF orientation 6, and the annotation, which states no size, "
        "may apply before or after turning it; valid: dataset.annotated_orientation=stored or upright"
    }
    assert prepare_voc_store(other, annotations=["present"]).quarantined == 0
    stated = prepare_voc_store(other, annotated_orientation="upright")
    assert stated.quarantined == 0
    write_objects(other, 2, CAT, extra="<size><width>6</width><height>4</height></size>")
    found = prepare_voc_store(other)
    assert (found.quarantined, found.images["readings"]) == (0, {"one_colour": 6, "oriented": 1, "oriented_stored": 1})
    (turned,) = found.read_annotations(np.array([2]))
    assert turned.boxes is not None
    assert turned.boxes.tolist() == [[0, 0, 4, 6]]
    write_objects(other, 2, ("cat", (1, 1, 4, 3), 0), extra="<size><width>4</width><height>6</height></size>")
    (kept,) = prepare_voc_store(other).read_annotations(np.array([2]))
    assert kept.boxes is not None
    assert kept.boxes.tolist() == [[0, 0, 4, 3]]


def test_incomplete_object_is_left_out_alone(other: Path) -> None:
    nameless, boxless = "<object><bndbox/></object>", "<object><name>dog</name></object>"
    write_objects(other, 0, ("cat", (6, 4, 1, 1), 0), ("cat", (3, 1, 60, 40), 0), extra=nameless + boxless)
    write_objects(other, 4, ("cat", (7, 1, 9, 4), 0))
    text = (other / "Annotations/000001.xml").read_text().replace("<difficult>1<", "<difficult>2<")
    (other / "Annotations/000001.xml").write_text(text)
    found = prepare_voc_store(other)
    assert found.quarantined == 0
    first, outside = found.read_annotations(np.array([0, 4]))
    assert first.boxes is not None
    assert outside.boxes is not None
    assert (first.boxes.tolist(), outside.boxes.tolist()) == ([[0, 0, 6, 4], [2, 0, 6, 4]], [])
    assert read_presence(found, "train").tolist()[0] == [1, 1], "an object without a box occurs all the same"
    readings = {"box_cut": 1, "box_outside": 1, "box_swapped": 1, "difficult_as_yes": 1, "object_unnamed": 1}
    assert found.images["readings"] == {**readings, "object_without_box": 1, "one_colour": 6}


@pytest.mark.parametrize(("name", "classes"), [("red", ("cat", "dog", "red")), ("bird", VOC_CLASS_NAMES)])
def test_folder_called_like_voc_has_the_classes_of_its_objects(
    tmp_path: Path, name: str, classes: tuple[str, ...]
) -> None:
    root = write_voc(tmp_path / "VOC2007", trainval="000000\n000001\n", test="000002\n")
    for image, objects in enumerate(((CAT, DOG), ((name, (1, 1, 2, 2), 0),), (CAT,))):
        write_objects(root, image, *objects)
    found = prepare_voc_store(root)
    assert (found.classes, found.quarantined) == (classes, 0)
    told = (
        "the folder is called VOC2007, but has other classes than VOC, e.g. 'red': its classes are those of its objects"
    )
    assert open_set("voc", root).notes == ((told,) if name == "red" else ())


def test_empty_annotations_read_none(other: Path) -> None:
    found = prepare_voc_store(other, annotations=[])
    assert (found.classes, found.annotations) == ((), ())
    assert pq.read_schema(found.path / found.shards[0].file).names == ["id", "image", "label", "path", "digest"]


def test_fingerprint_changes_with_annotations(other: Path) -> None:
    seen = {open_set("voc", other, annotations=asked).fingerprint for asked in (None, ["boxes"], [])}
    write_objects(other, 3, CAT)
    seen.add(open_set("voc", other).fingerprint)
    write_texts(other, classes="cat\ndog\n")
    seen.add(open_set("voc", other).fingerprint)
    write_texts(other, ImageSets__Main__cat_test="000004 1\n")
    seen.add(open_set("voc", other).fingerprint)
    assert len(seen) == 6


def test_masks_choose_images_and_start_with_background(tmp_path: Path) -> None:
    """They choose the images of ImageSets/Segmentation, and VOC's classes begin with the background."""
    root = write_voc(tmp_path / "VOC2007", trainval="000000\n", test="000001\n")
    write_voc(root, "ImageSets/Segmentation", train="000002\n", val="000003\n", test="000005\n")
    values = [[0, 1, 20, 255, 0, 0], *[[0, 1, 20, 20, 0, 0]] * 3]
    files = {k: write_mask(root, k, values) for k in (2, 3, 5)}
    write_mask(root, 3, [[21] * 6] * 4)
    found = prepare_voc_store(root, annotations=["mask"])
    assert found.classes == ("background", *VOC_CLASS_NAMES)
    assert read_quarantine(found) == {
        "000003": "SegmentationClass/000003.png: the value 21 is not a class; valid: 0 to 20, and 255 (void), "
        "or dataset.mask_values={name: 21, ...}, the values of each class, and of void"
    }
    assert [known.mask for known in found.read_annotations(np.arange(2))] == [files[2], files[5]]
    assert found.images["annotated"]["test"] == {"pixels": {"0": 12, "1": 4, "20": 7, "255": 1}}
    (root / "SegmentationClass/000005.png").unlink()
    assert "No such file" in read_quarantine(prepare_voc_store(root, annotations=["mask"]))["000005"]


def test_masks_without_classes_raise(tmp_path: Path) -> None:
    root = write_voc(tmp_path, "ImageSets/Segmentation", train="000002\n", test="000003\n")
    assert open_set("voc", root).annotations == ()
    assert "SegmentationClass' is missing" in get_refusal("voc", root, annotations=["mask"])
    write_mask(root, 2, [[0] * 6] * 4)
    assert "classes.txt' is missing: the names of the masks' values 0, 1, ..., one a line" in get_refusal(
        "voc", root, annotations=["mask"]
    )
    write_texts(root, classes="".join(f"c{k}\n" for k in range(256)))
    assert "lists 256 classes; valid: at most 255" in get_refusal("voc", root)


def test_set_without_class_raises(tmp_path: Path) -> None:
    root = write_voc(tmp_path, train="000002\n", test="000003\n")
    write_objects(root, 2)
    assert "has a class; valid: files with objects, or dataset.annotations=[]" in get_refusal("voc", root)


def get_real_set(name: str) -> Path:
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"there is no {SHARED_DATA / name}")
    return SHARED_DATA / name


def list_stems(source: Source, split: str) -> list[str]:
    return [Path(record.path).stem for record in read_split(source, split)]


def test_bccd_equals_independent_reading(tmp_path: Path) -> None:
    root = get_real_set("bccd")
    data = dataset_options(source="voc", root=root)
    found = prepare_store(data, tmp_path)
    assert (found.classes, found.quarantined) == (("Platelets", "RBC", "WBC"), 0)
    assert {name: len(found.subset(name)) for name in ("train", "val")} == {"train": 205, "val": 87}
    names = list_stems(open_set("voc", root), "train") + list_stems(open_set("voc", root), "test")
    known = found.read_annotations(np.arange(len(names)))
    present = np.concatenate([read_presence(found, "train"), read_presence(found, "test")])
    for name, one, row in zip(names, known, present, strict=True):
        objects = ElementTree.parse(root / f"Annotations/{name}.xml").getroot().findall("object")
        boxes = [
            [int(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            for o in objects
            for box in o.findall("bndbox")
        ]
        assert one.boxes is not None
        assert one.box_classes is not None
        np.testing.assert_array_equal(one.boxes + np.array([1, 1, 0, 0]), np.array(boxes))
        kinds = [o.findtext("name") for o in objects]
        assert [found.classes[k] for k in one.box_classes.tolist()] == kinds
        assert row.tolist() == [int(name in kinds) for name in found.classes]
    assert sum(len(one.box_classes) for one in known if one.box_classes is not None) == 4888


def test_camvid_equals_independent_reading(tmp_path: Path) -> None:
    root = get_real_set("camvid")
    found = prepare_store(dataset_options(source="voc", root=root), tmp_path)
    assert (len(found.classes), found.annotations, found.quarantined) == (11, ("mask",), 0)
    pixels = np.zeros(256, np.int64)
    names = (root / "ImageSets/Segmentation/test.txt").read_text().split()
    ids = found.ids("test")[: len(names)]
    for name, one in zip(names, found.read_annotations(ids), strict=True):
        file = (root / f"SegmentationClass/{name}.png").read_bytes()
        assert one.mask == file
        pixels += np.bincount(np.asarray(Image.open(io.BytesIO(file))).reshape(-1), minlength=256)
    message = found.images["annotated"]["test"]["pixels"]
    assert {int(k): n for k, n in message.items()} == {int(k): int(pixels[k]) for k in np.flatnonzero(pixels)}
    assert json.loads(json.dumps(found.images)) == found.images
