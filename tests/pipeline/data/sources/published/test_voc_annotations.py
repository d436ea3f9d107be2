"""VOC's annotations: lists of classes, objects and masks, as they lie in the published folders, to the store."""

import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from firstlight.pipeline.data.sources import Source
from firstlight.pipeline.data.sources.published.voc import TWENTY
from firstlight.pipeline.data.store import QUARANTINE, Store
from tests.pipeline.data.sources.published.test_voc import SHARED, voc
from tests.support.published import opened, refusal, texts
from tests.support.tiny import dataset, everything, prepared

Object = tuple[str, tuple[int, int, int, int], int]  # name, xmin ymin xmax ymax as the file has them, difficult


def annotate(root: Path, image: int, *objects: Object, extra: str = "") -> None:
    found = "".join(
        f"<object><name>{name}</name><difficult>{hard}</difficult><part><name>head</name></part><bndbox>"
        + "".join(
            f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        + "</bndbox></object>"
        for name, box, hard in objects
    )
    file = root / f"Annotations/{image:06d}.xml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"<annotation><filename>x</filename>{extra}{found}</annotation>")


CAT, DOG, HARD_DOG = ("cat", (1, 1, 6, 4), 0), ("dog", (2, 2, 3, 4), 0), ("dog", (3, 1, 6, 2), 1)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A set of its own classes, without lists of them: 4 images to train on, 2 to test on, all 6 x 4."""
    root = voc(
        tmp_path,
        trainval="000000\n000001\n000002\n000003\n",
        train="000002\n000000\n",
        val="000001\n000003\n",
        test="000004\n000005\n",
    )
    for image, objects in enumerate(((CAT, DOG), (HARD_DOG,), (HARD_DOG, DOG, CAT), (), (CAT,), (DOG,))):
        annotate(root, image, *objects)
    return root


def store(root: Path, **fields: Any) -> Store:
    return prepared(
        dataset(source="voc", root=root, max_bad_fraction=0.9, **fields), root.parent / f"{root.name}-stores"
    )


def bad(found: Store) -> dict[str, str]:
    return {Path(row["path"]).stem: row["reason"] for row in pq.read_table(found.path / QUARANTINE).to_pylist()}


def test_boxes_and_what_occurs(other: Path) -> None:
    found = store(other)
    assert (found.classes, found.annotations, found.quarantined) == (("cat", "dog"), ("boxes", "present"), 0)
    assert found.present("train").tolist() == [[1, 1], [0, -1], [1, 1], [0, 0]]
    assert found.present("test").tolist() == [[1, 0], [0, 1]]
    assert set(found.labels("train").tolist()) == {-1}
    last, first = found.annotated(np.array([2, 0]))
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
def test_the_published_years(tmp_path: Path, year: str) -> None:
    """VOC's twenty classes, by the lists of each; 0 in them: only objects that are difficult. 2012 has no test list, so val is tested on."""
    lists = {
        "trainval": "000000\n000001\n000002\n",
        "train": "000000\n000002\n",
        "val": "000001\n",
        "dog_train": "000000  1\n000002 -1\n",
    }
    lists |= {"dog_val": "000001  0\n", "dog_trainval": "000000  1\n000001  0\n000002 -1\n"}
    lists |= {"test": "000004\n", "dog_test": "000004 -1\n"} if year == "VOC2007" else {}
    root = voc(tmp_path / "VOCdevkit" / year, **lists)
    for image in (0, 1, 2, 4):  # the lists count; cat has none, so that its objects decide
        annotate(root, image, CAT, DOG)
    found = store(tmp_path, annotations=["present"])
    dog, cat = TWENTY.index("dog"), TWENTY.index("cat")
    assert found.classes == TWENTY
    assert found.annotations == ("present",)
    present = np.concatenate([found.present("train"), found.present("test")])
    assert present[:, dog].tolist() == ([1, -1, 0, 0] if year == "VOC2007" else [1, 0, -1])
    assert set(present[:, cat].tolist()) == {1}
    assert set(np.delete(present, [dog, cat], 1).flat) == {0}
    assert sorted(found.subsets["images"]) == (["train", "val"] if year == "VOC2007" else ["train"])
    assert found.annotated(np.arange(2))[0].boxes is None


def test_complete_lists_need_no_objects(other: Path) -> None:
    texts(other, classes="cat\ndog\n")
    for name, occurs in (("cat", "1 -1 0 1"), ("dog", "-1 -1 1 0")):
        lines = [f"{k:06d} {value}\n" for k, value in enumerate(occurs.split())]
        texts(
            other,
            **{
                f"ImageSets__Main__{name}_trainval": "".join(lines),
                f"ImageSets__Main__{name}_test": "000004 1\n000005 -1\n",
            },
        )
    for file in (other / "Annotations").iterdir():
        file.unlink()
    (other / "Annotations").rmdir()
    found = store(other, annotations=["present"])
    assert found.present("train").tolist() == [[1, 0], [0, 0], [-1, 1], [1, -1]]
    assert "Annotations' is missing" in refusal("voc", other, annotations=["boxes"])
    texts(other, ImageSets__Main__dog_train="000000 1\n000002 1\n")
    assert "dog_trainval.txt: line 1: '000000 -1' is not what another list of 'dog' says" in refusal(
        "voc", other, annotations=["present"]
    )
    for line in ("000000 2", "000000", "000000 1 1"):
        texts(other, ImageSets__Main__dog_train=f"000002 1\n{line}\n")
        assert f"dog_train.txt: line 2: {line!r} is not an image and one of 1, -1, 0" in refusal(
            "voc", other, annotations=["present"]
        )


def test_an_image_whose_objects_cannot_be_used_is_quarantined(other: Path) -> None:
    texts(other, classes="dog\ncat\n")  # the order is the list's
    (other / "Annotations/000000.xml").write_text('<!DOCTYPE a [<!ENTITY x "y">]><annotation/>')
    (other / "Annotations/000001.xml").unlink()
    annotate(other, 2, CAT, ("cow", (1, 1, 2, 2), 0))
    annotate(other, 4, ("cat", (7, 1, 9, 4), 0))
    (other / "Annotations/000005.xml").write_bytes(b"<a>" + b" " * 1_000_000)
    found = store(other)
    assert found.classes == ("dog", "cat")
    assert bad(found) == {
        "000000": "Annotations/000000.xml: has a document type (<!DOCTYPE ...>), which is not read; valid: plain XML",
        "000001": "Annotations/000001.xml: No such file or directory",
        "000002": "Annotations/000002.xml: object 2: 'cow' is no class of the set",
        "000004": "Annotations/000004.xml: object 1: its box, 6 to 9 across and 0 to 4 down, has no pixel of the image of 6 x 4",
        "000005": "Annotations/000005.xml: is larger than 1,000,000 bytes",
    }
    assert found.subsets["lost"] == {"train": 2, "val": 1}
    assert (found.subset("train").tolist(), found.subset("val").tolist()) == ([], [0])


@pytest.mark.fault(54, "an annotation that leads out of the root")
def test_an_annotation_file_cannot_be_a_way_out(other: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.xml"
    outside.write_text("<annotation/>")
    (other / "Annotations/000000.xml").unlink()
    (other / "Annotations/000000.xml").symlink_to(outside)
    assert bad(store(other)) == {"000000": "Annotations/000000.xml: link leaves the root"}


def test_boxes_of_an_image_that_is_turned(other: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(other / "JPEGImages/000002.jpg", exif=exif)
    assert bad(store(other)) == {
        "000002": "Annotations/000002.xml: the image has EXIF orientation 6, and whether its annotation means it before or after that is not said"
    }
    assert store(other, annotations=["present"]).quarantined == 0


def test_annotations_can_be_left(other: Path) -> None:
    found = store(other, annotations=[])
    assert (found.classes, found.annotations) == ((), ())
    assert pq.read_schema(found.path / found.shards[0].file).names == ["id", "image", "label", "path", "digest"]


def test_what_changes_the_annotations_changes_the_store(other: Path) -> None:
    seen = {opened("voc", other, annotations=asked).fingerprint for asked in (None, ["boxes"], [])}
    annotate(other, 3, CAT)
    seen.add(opened("voc", other).fingerprint)
    texts(other, classes="cat\ndog\n")
    seen.add(opened("voc", other).fingerprint)
    texts(other, ImageSets__Main__cat_test="000004 1\n")
    seen.add(opened("voc", other).fingerprint)
    assert len(seen) == 6


def mask(root: Path, image: int, values: Any) -> bytes:
    file = io.BytesIO()
    array = np.array(values, np.uint8)
    map_ = Image.frombytes("P", array.shape[::-1], array.tobytes())
    map_.putpalette(bytes(range(255, -1, -1)) * 3)
    map_.save(file, "PNG")
    path = root / f"SegmentationClass/{image:06d}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(file.getvalue())
    return file.getvalue()


def test_masks(tmp_path: Path) -> None:
    """They choose the images of ImageSets/Segmentation, and VOC's classes begin with the background."""
    root = voc(tmp_path / "VOC2007", trainval="000000\n", test="000001\n")
    voc(root, "ImageSets/Segmentation", train="000002\n", val="000003\n", test="000005\n")
    files = {k: mask(root, k, [[0, 1, 20, 255, 0, 0]] * 4) for k in (2, 3, 5)}
    mask(root, 3, [[21] * 6] * 4)
    found = store(root, annotations=["mask"])
    assert found.classes == ("background", *TWENTY)
    assert bad(found) == {
        "000003": "SegmentationClass/000003.png: the value 21 is no class; valid: 0 to 20, and 255 (void)"
    }
    assert [known.mask for known in found.annotated(np.arange(2))] == [files[2], files[5]]
    assert found.images["annotated"]["test"] == {"pixels": {"0": 12, "1": 4, "20": 4, "255": 4}}
    (root / "SegmentationClass/000005.png").unlink()
    assert "No such file" in bad(store(root, annotations=["mask"]))["000005"]


def test_masks_need_their_classes(tmp_path: Path) -> None:
    root = voc(tmp_path, "ImageSets/Segmentation", train="000002\n", test="000003\n")
    assert opened("voc", root).annotations == ()
    assert "SegmentationClass' is missing" in refusal("voc", root, annotations=["mask"])
    mask(root, 2, [[0] * 6] * 4)
    assert "classes.txt' is missing: the names of the masks' values 0, 1, ..., one a line" in refusal(
        "voc", root, annotations=["mask"]
    )
    texts(root, classes="".join(f"c{k}\n" for k in range(256)))
    assert "lists 256 classes; valid: at most 255" in refusal("voc", root)


def test_no_class_at_all(tmp_path: Path) -> None:
    root = voc(tmp_path, train="000002\n", test="000003\n")
    annotate(root, 2)
    assert "names a class; valid: files with objects, or dataset.annotations=[]" in refusal("voc", root)


def real(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"there is no {SHARED / name}")
    return SHARED / name


def names_of(source: Source, split: str) -> list[str]:
    return [Path(record.path).stem for record in everything(source, split)]


def test_bccd_by_an_independent_reading(tmp_path: Path) -> None:
    root = real("bccd")
    data = dataset(source="voc", root=root)
    found = prepared(data, tmp_path)
    assert (found.classes, found.quarantined) == (("Platelets", "RBC", "WBC"), 0)
    assert {name: len(found.subset(name)) for name in ("train", "val")} == {"train": 205, "val": 87}
    names = names_of(opened("voc", root), "train") + names_of(opened("voc", root), "test")
    known = found.annotated(np.arange(len(names)))
    present = np.concatenate([found.present("train"), found.present("test")])
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


def test_camvid_by_an_independent_reading(tmp_path: Path) -> None:
    root = real("camvid")
    found = prepared(dataset(source="voc", root=root), tmp_path)
    assert (len(found.classes), found.annotations, found.quarantined) == (11, ("mask",), 0)
    pixels = np.zeros(256, np.int64)
    names = (root / "ImageSets/Segmentation/test.txt").read_text().split()
    ids = found.ids("test")[: len(names)]
    for name, one in zip(names, found.annotated(ids), strict=True):
        file = (root / f"SegmentationClass/{name}.png").read_bytes()
        assert one.mask == file
        pixels += np.bincount(np.asarray(Image.open(io.BytesIO(file))).reshape(-1), minlength=256)
    told = found.images["annotated"]["test"]["pixels"]
    assert {int(k): n for k, n in told.items()} == {int(k): int(pixels[k]) for k in np.flatnonzero(pixels)}
    assert json.loads(json.dumps(found.images)) == found.images
