"""Predictions are written whole or not at all: Parquet, masks with an index, COCO's JSON; odd images are listed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.prediction.answer_files import WRITERS, choose_output
from firstlight.pipeline.stages.prediction.answers import ImageAnswer, ImageClasses, ImageMask, ImageObjects
from firstlight.pipeline.stages.prediction.image_items import FileImages, StoreImages
from firstlight.pipeline.stages.prediction.predictor import ItemAnswer
from firstlight.pipeline.stages.prediction.saved_model import SavedModel, read_model
from firstlight.tasks.downstream.segment import voc_palette
from tests.support.saved_models import CLASSES, save_small_model

PATHS = ("in/a.jpg", "in/b.jpg", "more/a.jpg", "more/a.png")


def make_model(tmp_path: Path, name: str) -> SavedModel:
    save_small_model(tmp_path / "model", name)
    return read_model(tmp_path / "model")


def write_all(out: Path, model: SavedModel, answers: list[ImageAnswer | None], items: Any = None) -> None:
    found = [ItemAnswer(k, (8, 6), one, None if one else "is torn") for k, one in enumerate(answers)]
    with WRITERS[model.target](out, model, items or FileImages(PATHS), "models:/m@current") as writer:
        for item in found:
            writer.add_answers([item])


def classes_of(k: int) -> ImageClasses:
    return ImageClasses(CLASSES, np.roll(np.array([0.7, 0.2, 0.1], np.float32), k))


def test_table_has_a_row_for_each_image_and_the_classes(tmp_path: Path) -> None:
    out = tmp_path / "p.parquet"
    write_all(out, make_model(tmp_path, "classify"), [classes_of(0), None, classes_of(1), classes_of(2)])
    table = pq.read_table(out)
    assert table.column("path").to_pylist() == [PATHS[0], PATHS[2], PATHS[3]]
    assert table.column("class").to_pylist() == ["bee", "cat", "dog"]
    assert table.column("probability").to_pylist() == pytest.approx([0.7] * 3)
    assert table.column("probabilities").to_pylist()[1] == pytest.approx([0.1, 0.7, 0.2])
    told = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert told == {"task": "classify", "classes": json.dumps(CLASSES), "model": "models:/m@current"}
    refused = pq.read_table(tmp_path / "p-quarantine.parquet").to_pylist()
    assert refused == [{"path": "in/b.jpg", "reason": "is torn"}]
    assert {file.name for file in tmp_path.iterdir()} == {"model", "p.parquet", "p-quarantine.parquet"}


def test_rows_of_a_store_have_its_ids_and_splits(tmp_path: Path, digits: Store) -> None:
    items = StoreImages(digits, digits.ids("test")[:2])
    write_all(tmp_path / "p.parquet", make_model(tmp_path, "classify"), [classes_of(0), classes_of(1)], items)
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["id"] for row in rows] == digits.ids("test")[:2].tolist()
    assert [row["split"] for row in rows] == ["test", "test"]
    assert not (tmp_path / "p-quarantine.parquet").exists()


def test_masks_keep_their_values_their_size_and_a_name_of_their_own(tmp_path: Path) -> None:
    masks = [np.full((6, 8), k % 3, np.uint8) for k in range(4)]
    masks[0][0] = 255
    answers: list[ImageAnswer | None] = [ImageMask(CLASSES, mask) for mask in masks]
    write_all(tmp_path / "out", make_model(tmp_path, "segment"), answers)
    rows = pq.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    assert [row["path"] for row in rows] == list(PATHS)
    names = [row["mask"] for row in rows]
    assert names == ["masks/a.png", "masks/b.png", "masks/a.jpg.png", "masks/a.png.png"]
    for name, mask in zip(names, masks, strict=True):
        with Image.open(tmp_path / "out" / name) as opened:
            assert opened.mode == "P"
            assert np.array_equal(np.asarray(opened), mask)
            colour = (255 * voc_palette(256)[int(mask[5, 0])]).round().int().tolist()
            assert opened.convert("RGB").getpixel((0, 5)) == tuple(colour)
    assert rows[0]["shares"] == pytest.approx([40 / 48, 0.0, 0.0])
    assert (rows[0]["width"], rows[0]["height"]) == (8, 6)


def test_masks_of_a_store_are_named_by_ids_whatever_its_paths_say(tmp_path: Path, digits: Store) -> None:
    items, mask = StoreImages(digits, digits.ids("test")[:1]), ImageMask(CLASSES, np.zeros((6, 8), np.uint8))
    write_all(tmp_path / "out", make_model(tmp_path, "segment"), [mask], items)
    (row,) = pq.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    assert row["mask"] == f"masks/{digits.ids('test')[0]:08d}.png"


def test_masks_never_leave_their_folder(tmp_path: Path) -> None:
    items = FileImages(("../../etc/passwd", "..", "/"))
    answers: list[ImageAnswer | None] = [ImageMask(CLASSES, np.zeros((2, 2), np.uint8))] * 3
    write_all(tmp_path / "out", make_model(tmp_path, "segment"), answers, items)
    assert len(list((tmp_path / "out/masks").iterdir())) == 3


def test_objects_are_what_coco_reads(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    boxes = np.array([[1.0, 2.0, 4.0, 6.0], [0.0, 0.0, 8.0, 6.0]])
    answer = ImageObjects(CLASSES, boxes, np.array([0.9, 0.6], np.float32), np.array([2, 0]))
    none = ImageObjects(CLASSES, boxes[:0], np.empty(0, np.float32), np.empty(0, np.int64))
    out = tmp_path / "p.json"
    write_all(out, make_model(tmp_path, "detect"), [answer, none, None, answer])
    found = COCO(str(out))
    images = [(image["id"], image["file_name"]) for image in found.loadImgs(found.getImgIds())]
    assert images == [(0, "in/a.jpg"), (1, "in/b.jpg"), (3, "more/a.png")]
    assert {one["id"]: one["name"] for one in found.loadCats(found.getCatIds())} == {1: "bee", 2: "cat", 3: "dog"}
    first, second = found.loadAnns(found.getAnnIds(imgIds=[0]))
    assert (first["bbox"], first["category_id"]) == ([1.0, 2.0, 3.0, 4.0], 3)
    assert first["score"] == pytest.approx(0.9)
    assert second["area"] == 48.0
    assert found.getAnnIds(imgIds=[1]) == []
    assert len(set(found.getAnnIds())) == 4


def stop_in_between(out: Path, model: SavedModel) -> None:
    with WRITERS[model.target](out, model, FileImages(PATHS), "m") as writer:
        writer.add_answers([ItemAnswer(0, None, None, "is torn")])
        raise RuntimeError("stopped")


@pytest.mark.parametrize("name", ["classify", "segment", "detect"])
def test_failure_in_between_leaves_nothing(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path, name)
    with pytest.raises(RuntimeError, match="stopped"):
        stop_in_between(tmp_path / "out", model)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("target", "out", "message"),
    [
        ("label", "p.csv", r"--out: '.*p.csv' is not valid; valid: a .parquet file, such as predictions.parquet"),
        ("boxes", "p.parquet", r"valid: a .json file of boxes"),
        ("label", "none/p.parquet", r"--out: '.*': there is no folder '.*none'"),
        ("label", "old.parquet", r"--out: '.*old.parquet' exists; valid: another path, or --force"),
        ("label", "folder.parquet", r"is a folder; valid: a .parquet file"),
        ("mask", "old.parquet", r"is a file; valid: a folder of masks"),
        ("mask", "mine", r"--out: '.*mine' exists"),
    ],
)
def test_output_that_is_not_free_is_a_one_line_error(tmp_path: Path, target: str, out: str, message: str) -> None:
    (tmp_path / "old.parquet").write_text("x")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(UserError, match=message) as told:
        choose_output(target, str(tmp_path / out), force=False)
    assert "\n" not in str(told.value)


def test_force_replaces_predictions_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(UserError, match="a folder of other files, which --force does not replace"):
        choose_output("mask", str(tmp_path / "mine"), force=True)
    model, mask = make_model(tmp_path, "segment"), ImageMask(CLASSES, np.zeros((6, 8), np.uint8))
    write_all(tmp_path / "out", model, [mask] * 4)
    assert choose_output("mask", str(tmp_path / "out"), force=True) == tmp_path / "out"
    write_all(tmp_path / "out", model, [mask])
    assert len(list((tmp_path / "out/masks").iterdir())) == 1
