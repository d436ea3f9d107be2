"""Annotations that people have, from a folder in VOC's layout to the targets of a batch, the notes and the scores."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from firstlight.pipeline.data.augment.targets import Targets
from firstlight.pipeline.data.images import decode_rgb
from firstlight.pipeline.data.loader import Loader
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.data_notes import describe_problems
from firstlight.pipeline.run.runner import run_recipe
from firstlight.tasks.downstream.segment import Segmentation, confusion_counts
from tests.support import recipes
from tests.support.image_sources import dataset_options, prepare_store
from tests.support.odd_images import encode_image, make_exif
from tests.support.recipe_runs import runs_of
from tests.support.undrawn_figures import leave_undrawn

FIT = ({"op": "fit"},)
SPLITS = {"train": "000000\n000001\n", "test": "000002\n"}


def write_set(root: Path, folder: str = "Main", **lists: str) -> Path:
    for name, content in (lists or SPLITS).items():
        file = root / f"ImageSets/{folder}/{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root


def write_marked(root: Path, k: int, orientation: int, kind: str, stated: str) -> None:
    """Writes an image with one bright square, turned by an EXIF orientation, and the box of the square.

    The box is that in the stored image, or that in the upright image, with the size of the one that it is in.
    """
    stored = np.zeros((20, 32, 3), np.uint8)
    stored[4:10, 18:28] = 255
    upright = np.asarray(
        {1: lambda a: a, 6: lambda a: np.rot90(a, -1), 8: lambda a: np.rot90(a, 1)}[orientation](stored)
    )
    marked = stored if stated == "stored" else upright
    rows, columns = np.nonzero(marked[:, :, 0])
    sides = (columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1)
    box = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), sides, strict=True))
    size = f"<size><width>{marked.shape[1]}</width><height>{marked.shape[0]}</height></size>"
    for path, data in (
        (
            f"JPEGImages/{k:06d}.{kind.lower()}",
            encode_image(stored, kind, exif=make_exif(orientation), **({"quality": 95} if kind == "JPEG" else {})),
        ),
        (
            f"Annotations/{k:06d}.xml",
            f"<annotation>{size}<object><name>square</name><bndbox>{box}</bndbox></object></annotation>".encode(),
        ),
        (f"SegmentationClass/{k:06d}.png", encode_image((marked[:, :, 0] > 0).astype(np.uint8))),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def prepare_set(root: Path, **fields: Any) -> tuple[Store, list[str]]:
    """Returns the store, and the notes that the terminal and the report show."""
    options = dataset_options(source="voc", root=root, max_bad_fraction=0.9, **fields)
    store = prepare_store(options, root.parent / f"{root.name}-stores")
    recipe = recipes.recipe(root.parent, dataset=options.model_dump(mode="json"))
    return store, describe_problems(recipe, store)


@pytest.mark.parametrize("stated", ["stored", "upright"])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [6, 8])
def test_boxes_and_masks_lie_on_what_they_mark(tmp_path: Path, orientation: int, kind: str, stated: str) -> None:
    for k in range(3):
        write_marked(tmp_path / "in", k, orientation, kind, stated)
    root = write_set(write_set(tmp_path / "in"), "Segmentation")
    (root / "classes.txt").write_text("ground\nsquare\n")
    told = {
        "stored": "annotations turned upright with their image, as they count in its stored pixels: 3",
        "upright": "annotations of images with an EXIF orientation, taken as they are, "
        "as they count in the upright image: 3",
    }[stated]
    for target in ("boxes", "mask"):
        store, notes = prepare_set(root, annotations=[target])
        assert store.quarantined == 0
        assert told in notes
        ids = store.ids("train")
        for data, known in zip(store.read(ids)[0], store.read_annotations(ids), strict=True):
            bright = decode_rgb(data)[:, :, 0] > 128
            if known.boxes is not None:
                left, top, right, bottom = known.boxes[0].astype(int).tolist()
                marked = np.zeros_like(bright)
                marked[top:bottom, left:right] = True
            else:
                marked = np.asarray(Image.open(io.BytesIO(known.mask or b""))) > 0
            assert (marked == bright).mean() > 0.99


def test_targets_of_a_batch_follow_turned_image(tmp_path: Path) -> None:
    for k in range(3):
        write_marked(tmp_path / "in", k, 6, "TIFF", "stored")
    store, _ = prepare_set(write_set(tmp_path / "in"), annotations=["boxes"])
    batch = Loader(store, (FIT,), 32, 0, 10_000, Targets("boxes", 1)).load_once(store.ids("train"))
    for view, (box,) in zip(batch["views"][:, 0], batch["boxes"], strict=True):
        left, top, right, bottom = np.rint(box).astype(int).tolist()
        assert view[top + 1 : bottom - 1, left + 1 : right - 1, 0].min() > 200
        assert np.delete(view[:, :, 0], np.s_[left - 1 : right + 1], 1).max() < 50


def write_grey_masks(root: Path, *masks: np.ndarray, classes: str = "background\ncell\n") -> Path:
    for k, mask in enumerate(masks):
        for path, data in (
            (
                f"JPEGImages/{k:06d}.png",
                np.random.default_rng(k).integers(0, 255, (*mask.shape[:2], 3)).astype(np.uint8),
            ),
            (f"SegmentationClass/{k:06d}.png", mask),
        ):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(encode_image(data.astype(np.uint8)))
    (root / "classes.txt").write_text(classes)
    return write_set(root, "Segmentation")


HALF = np.array([[0, 0, 0, 1, 1, 1]] * 4, np.uint8)
VOID = np.full_like(HALF, 255)


@pytest.mark.parametrize(
    "masks",
    [
        (HALF * 255, HALF * 255, HALF * 255),
        (np.repeat(HALF[:, :, None] * 255, 3, 2),) * 3,
        (VOID, VOID, HALF),
        (255 - HALF * 255, 255 - HALF * 255, HALF),
    ],
    ids=["binary", "binary colours", "void", "inverted"],
)
def test_void_that_may_be_a_class_is_asked_about(tmp_path: Path, masks: tuple[np.ndarray, ...]) -> None:
    root = write_grey_masks(tmp_path / "in", *masks)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"^dataset\.mask_values: \d+\.0% of the pixels of the training masks are 255"
        ):
            prepare_set(root)


def test_masks_without_a_class_in_test_are_reported(tmp_path: Path) -> None:
    root = write_grey_masks(tmp_path / "in", HALF, HALF, HALF * 0)
    _, notes = prepare_set(root)
    assert "test: 1 of the 2 classes do not occur: cell" in notes
    void = write_grey_masks(tmp_path / "void", HALF, np.where(HALF, 1, 0), VOID)
    _, notes = prepare_set(void)
    void_note = "; 255 is read as void, unless dataset.mask_values names its class"
    assert f"test: 2 of the 2 classes do not occur: background, cell{void_note}" in notes
    assert "masks that are void everywhere, from which nothing is learned and which are not scored: 1" in notes


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "no class is known for the colours #0a0000, #14050a; valid: dataset.mask_values="),
        ({"background": "#0a0000", "cell": "#14050a"}, None),
        ({"background": "#0a0000", "cell": "#010101"}, "dataset.mask_values does not name the colours #14050a"),
    ],
)
def test_colours_of_masks_are_asked_for_and_read_as_stated(
    tmp_path: Path, values: dict[str, str], said: str | None
) -> None:
    colours = np.array([(10, 0, 0), (20, 5, 10)], np.uint8)
    root = write_grey_masks(tmp_path / "in", *[colours[HALF]] * 3)
    if said is None:
        store, notes = prepare_set(root, mask_values=values)
        assert store.images["annotated"]["train"]["pixels"] == {"0": 24, "1": 24}
        assert "masks read by dataset.mask_values: 3" in notes
    else:
        with pytest.raises(UserError) as raised:
            prepare_set(root, mask_values=values)
        assert said in str(raised.value)


def test_odd_objects_are_reported(tmp_path: Path) -> None:
    for k in range(3):
        write_marked(tmp_path / "in", k, 1, "PNG", "stored")
    root = write_set(tmp_path / "in")
    file = root / "Annotations/000000.xml"
    odd = (
        "<object><name>square</name><difficult>Unspecified</difficult>"
        "<bndbox><xmin>30</xmin><ymin>3</ymin><xmax>2</xmax><ymax>90</ymax></bndbox></object>"
    )
    file.write_text(
        file.read_text().replace("</annotation>", f"{odd}<object><name>square</name></object></annotation>")
    )
    store, notes = prepare_set(root)
    assert store.quarantined == 0
    assert store.images["annotated"]["train"]["boxes"] == {"0": 3}
    for line in (
        "boxes whose ends were swapped, read in order: 1",
        "boxes cut at the edges of their image by more than one pixel: 1",
        "objects without a box of four numbers; their classes count as present, without a box: 1",
        "values of `difficult` that are neither 0 nor 1, taken as no: 1",
    ):
        assert line in notes


def test_scores_of_absent_classes_are_no_numbers(tmp_path: Path) -> None:
    """From the store to the score: test masks of one class, or of void, give none."""
    for test in (HALF * 0, VOID):
        root = write_grey_masks(tmp_path / f"in{test.max()}", HALF, HALF, test)
        store, _ = prepare_set(root)
        batch = Loader(store, (FIT,), 8, 0, 10_000, Targets("mask")).load_once(store.ids("test"))
        mask = torch.from_numpy(batch["mask"]).long()
        counts = confusion_counts(torch.zeros_like(mask), mask, 2)
        scores = Segmentation.score(cast(Segmentation, None), (counts,))
        assert math.isnan(scores["mean_iou"])  # type: ignore[arg-type]


@pytest.mark.parametrize(("classes", "scored"), [("background\ncell\n", 0), ("background\ncell\nother\n", 2)])
def test_run_says_what_is_not_scored(tmp_path: Path, classes: str, scored: int) -> None:
    """The table, the report and MLflow have no number, and say so, if the test masks show too few classes.

    The figures of such a run are drawn.
    """
    masks = [HALF if k < 20 or scored else VOID for k in range(24)]
    root = write_grey_masks(tmp_path / "in", *masks, classes=classes)
    write_set(
        root,
        "Segmentation",
        train="".join(f"{k:06d}\n" for k in range(20)),
        test="".join(f"{k:06d}\n" for k in range(20, 24)),
    )
    adam, task = {"name": "Adam", "lr": 0.003}, {"name": "segment", "norm": "group"}
    built = recipes.recipe(
        tmp_path / "runs",
        dataset={
            "name": "masks",
            "source": "voc",
            "root": str(root),
            "annotations": ["mask"],
            "image_size": 26,
            "val_fraction": 0.25,
            "train_augment": [{"op": "fit"}],
            "eval_augment": [{"op": "fit"}],
        },
        encoder={"name": "network1", "norm": "group", "width": 4, "m": [2, 2, 0, 0]},
        stages={
            "pretrain": {
                "kind": "pretrain",
                "method": {"name": "dae", "norm": "group"},
                "epochs": 1,
                "batch_size": 5,
                "optimizer": adam,
            },
            "finetune": {
                "kind": "finetune",
                "task": task,
                "epochs": 1,
                "batch_size": 5,
                "optimizer": adam,
                "learning_rates": [],
            },
        },
    )
    console = Console(record=True, width=300, file=io.StringIO())
    with leave_undrawn() if scored else contextlib.nullcontext():
        (row,) = run_recipe(built, console).rows
    text, page = console.export_text(), tmp_path / "runs" / built.name / "report.html"
    tuned = runs_of(built)["finetune seed 0"].data.metrics
    some = f"{scored} of {classes.count(chr(10))} classes"
    assert some in row.measure
    for shown in (text, page.read_text()):
        assert some in shown
        assert ("no score" in shown) == (scored == 0)
    assert row.is_scored == (scored > 0)
    assert ("pretrained/test" in tuned) == (scored > 0)
    assert ("pretrained/test_iou/cell" in tuned) == (scored > 0)
    assert "pretrained/test_iou/other" not in tuned
    assert not any(map(math.isnan, tuned.values()))
    run_recipe(built, console)


@pytest.mark.parametrize("target", ["boxes", "mask"])
def test_turned_annotations_are_the_same_when_a_store_is_extended(tmp_path: Path, target: str) -> None:
    root = tmp_path / "in"
    for k in range(4):
        write_marked(root, k, (6, 8, 1)[k % 3], ("JPEG", "TIFF", "PNG")[k % 3], "stored")
    for folder in ("Main", "Segmentation"):
        write_set(root, folder)
    (root / "classes.txt").write_text("ground\nsquare\n")
    old, _ = prepare_set(root, annotations=[target])
    for folder in ("Main", "Segmentation"):
        write_set(root, folder, train=SPLITS["train"] + "000003\n", test=SPLITS["test"])
    new, _ = prepare_set(root, annotations=[target], extends=old.path)
    assert new.splits == {"train": 3, "test": 1}
    file = root / ("Annotations/000000.xml" if target == "boxes" else "SegmentationClass/000000.png")
    changed = file.read_bytes().replace(b"<xmin>19<", b"<xmin>20<")
    file.write_bytes(changed if target == "boxes" else encode_image(np.zeros((20, 32), np.uint8)))
    with pytest.raises(UserError, match=r"1 of the 3 images of .* have other annotations in the source"):
        prepare_set(root, annotations=[target], extends=old.path)
