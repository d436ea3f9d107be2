"""An extension keeps the annotations of earlier images and refuses a source in which they differ."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.data import shards
from firstlight.pipeline.data.prepare import prepare as prepare_module
from firstlight.pipeline.data.splits import draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from tests.support.extended_stores import assert_extends
from tests.support.image_sources import dataset_options, make_png, prepare_store
from tests.support.presence import read_presence
from tests.support.published_sets import write_texts
from tests.support.voc_folders import CAT, DOG, HARD_DOG, ObjectRow, write_objects

BIRD: ObjectRow = ("bird", (1, 1, 5, 5), 0)
OVER: ObjectRow = ("dog", (3, 3, 90, 90), 0)  # goes over the edge of 8 x 8: it is cut there, in the store
OBJECTS = ((CAT,), (DOG, HARD_DOG), (), (CAT, OVER))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "IMAGES_PER_SHARD", 6)
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 4)


def put(root: Path, numbers: Sequence[int], test: Sequence[int] = (20, 21), folder: str = "Main") -> Path:
    """Writes images of 8 x 8: image k has OBJECTS[k % 4] and a mask of value k % 3; `test` are the test split."""
    for k in (*numbers, *test):
        for file, content in (
            (f"JPEGImages/{k:06d}.png", make_png(k)),
            (f"SegmentationClass/{k:06d}.png", mask(k % 3)),
        ):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(content)
        write_objects(root, k, *OBJECTS[k % 4])
    lists = {"trainval": numbers, "test": test}
    return write_texts(
        root, **{f"ImageSets__{folder}__{name}": "".join(f"{k:06d}\n" for k in ids) for name, ids in lists.items()}
    )


def mask(value: int) -> bytes:
    image, file = Image.new("P", (8, 8), value), io.BytesIO()
    image.putpalette([0] * 768)
    image.save(file, "PNG")
    return file.getvalue()


def store(root: Path, **fields: Any) -> Store:
    return prepare_store(dataset_options(source="voc", root=root, **fields), root.parent / "stores")


def known(found: Store, ids: np.ndarray) -> list[dict[str, Any]]:
    """Returns the store's facts of each image, with the names of classes in the place of their numbers."""
    out = []
    for one in found.read_annotations(ids):
        kinds = [] if one.box_classes is None else [found.classes[c] for c in one.box_classes.tolist()]
        present = None if one.present is None else dict(zip(found.classes, one.present.tolist(), strict=True))
        boxes = None if one.boxes is None or one.difficult is None else (one.boxes.tolist(), one.difficult.tolist())
        out.append({"kinds": kinds, "present": present, "boxes": boxes, "mask": one.mask})
    return out


@pytest.mark.parametrize("annotations", [["boxes", "present"], ["boxes"], ["present"]])
def test_old_images_keep_annotations_and_new_ones_follow(tmp_path: Path, annotations: list[str]) -> None:
    root = put(tmp_path / "in", range(9))
    old = store(root, annotations=annotations)
    before = known(old, np.arange(11))
    put(root, range(14), (20, 21, 22))
    new = store(root, annotations=annotations, extends=str(old.path))
    assert_extends(new, old)
    assert new.annotations == old.annotations == tuple(annotations)
    assert known(new, np.arange(11)) == before
    whole = store(root, annotations=annotations, name="whole")
    assert [new.splits[name] for name in ("train", "test")] == [14, 3]
    order = [*range(9), *(14, 15), *range(9, 14), 16]  # the ids that the images have in a store that was made at once
    assert known(new, np.arange(17)) == known(whole, np.array(order))
    if "present" in annotations:
        assert read_presence(new, "train").shape == (14, 2)
    assert new.images["annotated"] == whole.images["annotated"]
    assert {name: new.subset(name).tolist() for name in new.subset_names} == {}
    data = dataset_options(source="voc", root=root, val_fraction=0.3)
    assert set(draw_splits(new, data).val) >= set(draw_splits(old, data).val)


def test_old_masks_are_kept(tmp_path: Path) -> None:
    root = write_texts(put(tmp_path / "in", range(9), folder="Segmentation"), classes="ground\ncat\ndog\n")
    old = store(root, annotations=["mask"])
    before = known(old, np.arange(11))
    write_texts(put(root, range(13), folder="Segmentation"), classes="ground\ncat\ndog\nsky\n")
    new = store(root, annotations=["mask"], extends=str(old.path))
    assert_extends(new, old)
    assert known(new, np.arange(11)) == before
    assert [one["mask"] for one in known(new, np.arange(11, 15))] == [mask(k % 3) for k in range(9, 13)]


def test_new_class_is_numbered_after_the_old_ones(tmp_path: Path) -> None:
    """`bird` is sorted before `cat`: the boxes of old and new images must not change places."""
    root = put(tmp_path / "in", range(9))
    old = store(root, annotations=["boxes"])
    put(root, range(11))
    write_objects(root, 9, BIRD, CAT)
    new = store(root, annotations=["boxes"], extends=str(old.path))
    assert new.classes == ("cat", "dog", "bird")
    assert_extends(new, old)
    assert [one["kinds"] for one in known(new, np.array([0, 3, 11, 12]))] == [
        ["cat"],
        ["cat", "dog"],
        ["bird", "cat"],
        [],
    ]
    with pytest.raises(UserError, match=r"'bird' is a new class, which the images of .* are not annotated with"):
        store(root, annotations=["boxes", "present"], extends=str(store(put(tmp_path / "two", range(9))).path))


def moved(root: Path) -> None:
    write_objects(root, 4, ("cat", (1, 1, 5, 4), 0))


def renamed(root: Path) -> None:
    write_objects(root, 4, ("dog", CAT[1], 0))


def harder(root: Path) -> None:
    write_objects(root, 4, (*CAT[:2], 1))


def emptied(root: Path) -> None:
    write_objects(root, 4)


@pytest.mark.parametrize("change", [moved, renamed, harder, emptied])
def test_changed_annotation_of_old_image_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    root = put(tmp_path / "in", range(9))
    old = store(root)
    put(root, range(12))
    change(root)
    message = (
        r"^dataset\.extends: 1 of the 11 images of .* have other annotations in the source, "
        r"e\.g\. JPEGImages/000004\.png \(boxes, present\); restore"
    )
    with pytest.raises(UserError, match=message):
        store(root, extends=str(old.path))
    write_objects(root, 4, CAT)
    assert_extends(store(root, extends=str(old.path)), old)


def test_changed_mask_of_old_image_is_refused(tmp_path: Path) -> None:
    root = write_texts(put(tmp_path / "in", range(9), folder="Segmentation"), classes="ground\ncat\ndog\n")
    old = store(root, annotations=["mask"])
    put(root, range(12), folder="Segmentation")
    (root / "SegmentationClass/000004.png").write_bytes(mask(2))
    with pytest.raises(
        UserError,
        match=r"1 of the 11 images .* have other annotations in the source, e\.g\. JPEGImages/000004\.png \(mask\)",
    ):
        store(root, annotations=["mask"], extends=str(old.path))


def test_unreadable_annotation_of_old_image_is_refused(tmp_path: Path) -> None:
    root = put(tmp_path / "in", range(9))
    old = store(root)
    (root / "Annotations/000004.xml").write_text("<annotation><obj")
    with pytest.raises(
        UserError,
        match=r"1 of the 11 images of .*, e\.g\. JPEGImages/000004\.png \(has other bytes, or cannot be read\)",
    ):
        store(root, extends=str(old.path))


@pytest.mark.parametrize(("annotations", "folder"), [(["mask"], "Segmentation"), (["present"], "Main")])
def test_reordered_numeric_classes_are_refused(tmp_path: Path, annotations: list[str], folder: str) -> None:
    root = write_texts(put(tmp_path / "in", range(9), folder=folder), classes="cat\ndog\nsky\n")
    old = store(root, annotations=annotations)
    write_texts(put(root, range(12), folder=folder), classes="cat\nsky\ndog\n")
    with pytest.raises(
        UserError,
        match=r"^dataset\.extends: class 1 of .* is 'dog', and 'sky' in the source; restore the order of its classes",
    ):
        store(root, annotations=annotations, extends=str(old.path))
