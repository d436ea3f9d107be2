"""Recipes on stores with boxes, masks and several classes an image: pretraining, three tasks, scores, figures."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.score_table import make_score_table, score_facts
from firstlight.pipeline.run import preflight
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.finetuning.views import list_scored_views
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.tracking.location import TrackingLocation
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes
from tests.support.blank_figures import save_blank
from tests.support.published_sets import write_texts
from tests.support.recipe_runs import QUIET, runs_of
from tests.support.undrawn_figures import leave_undrawn
from tests.support.voc_folders import write_objects

WIDTH, HEIGHT, IMAGES = 26, 20, 40
ADAM = {"name": "Adam", "lr": 0.003}
SEGMENT = {"name": "segment", "norm": "group", "head": "mirror"}
DETECT = {"name": "detect", "anchors": [6, 12], "hidden": 8}
MULTILABEL = {"name": "multilabel", "norm": "group"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes bright and dark rectangles on noise in VOC's layout: 32 training and 8 test images."""
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    (root / "JPEGImages").mkdir()
    (root / "SegmentationClass").mkdir()
    for k in range(IMAGES):
        pixels, mask = rng.integers(90, 160, (HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
        objects = []
        for kind, name, level in ((1, "bright", 250), (2, "dark", 5)):
            if rng.random() < 0.7:
                x, y = (kind - 1) * 13 + int(rng.integers(0, 4)), int(rng.integers(0, 8))
                pixels[y : y + 10, x : x + 8], mask[y : y + 10, x : x + 8] = level, kind
                objects.append((name, (x + 1, y + 1, x + 8, y + 10), int(rng.random() < 0.2)))
        mask[0] = 255
        Image.fromarray(pixels).save(root / f"JPEGImages/{k:06d}.png")
        Image.fromarray(mask).save(root / f"SegmentationClass/{k:06d}.png")
        write_objects(root, k, *objects)
    train, test = ("".join(f"{k:06d}\n" for k in part) for part in (range(32), range(32, IMAGES)))
    lists = {
        f"ImageSets__{kind}__{split}": text
        for kind in ("Main", "Segmentation")
        for split, text in (("train", train), ("test", test))
    }
    return write_texts(root, **lists)


def recipe(storage: Path, root: Path, task: dict[str, Any], **changes: Any) -> Recipe:
    mask = task["name"] == "segment"
    if mask:
        (root / "classes.txt").write_text("ground\nbright\ndark\n")
    else:
        (root / "classes.txt").unlink(missing_ok=True)
    return recipes.recipe(
        storage,
        **{
            "dataset__name": "shapes",
            "dataset__source": "voc",
            "dataset__root": str(root),
            "dataset__annotations": ["mask"] if mask else ["boxes", "present"],
            "dataset__image_size": 26,
            "dataset__val_fraction": 0.25,
            "dataset__max_train": None,
            "dataset__max_test": None,
            "dataset__train_augment": [{"op": "fit"}, {"op": "horizontal_flip"}],
            "dataset__eval_augment": [{"op": "fit"}],
            "encoder": {"name": "network1", "norm": "group", "width": 4, "m": [2, 2, 0, 0]},
            "stages": {
                "pretrain": {
                    "kind": "pretrain",
                    "method": {"name": "dae", "norm": "group"},
                    "epochs": 1,
                    "batch_size": 8,
                    "optimizer": ADAM,
                },
                "finetune": {
                    "kind": "finetune",
                    "task": task,
                    "epochs": 2,
                    "batch_size": 8,
                    "optimizer": ADAM,
                    "learning_rates": [],
                },
            },
            **changes,
        },
    )


@pytest.fixture(scope="module")
@save_blank()
def pretrained(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, Path]:
    """Returns, by task, the storage of a recipe whose pretraining has finished. Two tasks have the same images."""
    storages = {}
    for task in (SEGMENT, MULTILABEL):
        storage = storages[str(task["name"])] = tmp_path_factory.mktemp("pretrained")
        run_recipe(recipe(storage, root, task), QUIET, "pretrain")
    return {**storages, "detect": storages["multilabel"]}


def copy_storage(pretrained: dict[str, Path], task: dict[str, Any], folder: Path) -> Path:
    """Copies the storage for a task, so that a recipe begins with its fine-tuning. Returns the copy."""
    return Path(shutil.copytree(pretrained[task["name"]], folder, dirs_exist_ok=True))


def test_loader_returns_the_annotations_of_the_store(tmp_path: Path, root: Path) -> None:
    """At the size of the images nothing is scaled: 26 x 20 on a canvas of 26 x 26, three black rows above and below."""
    for task, kind in ((DETECT, "boxes"), (MULTILABEL, "present"), (SEGMENT, "mask")):
        built = recipe(tmp_path, root, task)
        store = prepare(built.dataset, tmp_path / "stores", lambda: False, lambda done, total: None)
        context = StageContext.create(built, store, on_ray=False)
        loader = context.build_loader([built.dataset.eval_augment], 0, kind)  # type: ignore[arg-type]
        ids = np.array([5, 33, 0])
        found, known = loader.load(ids, np.zeros_like(ids), loader.read_encoded(ids)), store.read_annotations(ids)
        for row, annotation in enumerate(known):
            if kind == "boxes":
                count = len(annotation.box_classes)  # type: ignore[arg-type]
                classes = annotation.box_classes.tolist()  # type: ignore[union-attr]
                assert found["box_classes"][row].tolist() == [*classes, *[-1] * (2 - count)]
                assert np.array_equal(found["boxes"][row, :count], annotation.boxes + np.array([0, 3, 0, 3]))
                assert np.array_equal(found["difficult"][row, :count], annotation.difficult)  # type: ignore[arg-type]
            elif kind == "present":
                assert np.array_equal(found["present"][row], annotation.present)  # type: ignore[arg-type]
            else:
                pixels = np.asarray(Image.open(root / f"SegmentationClass/{ids[row]:06d}.png"))
                assert np.array_equal(found["mask"][row, 3:23], pixels)
                assert (found["mask"][row, [0, 1, 2, 23, 24, 25]] == 255).all()


def test_masks_are_cropped_and_flipped_with_their_images(root: Path, tmp_path: Path) -> None:
    built = recipe(
        tmp_path, root, SEGMENT, dataset__train_augment=[{"op": "random_resized_crop"}, {"op": "horizontal_flip"}]
    )
    store = prepare(built.dataset, tmp_path / "stores", lambda: False, lambda done, total: None)
    context = StageContext.create(built, store, on_ray=False)
    batch = next(iter(context.iterate_batches(context.splits.train, 24, [built.dataset.train_augment], "mask")))
    image, mask = batch.views[0], batch.targets["mask"]
    assert mask.shape == (24, 26, 26)
    bright = image.mean(1) > 0.9  # well inside of a bright rectangle
    assert float((mask[bright] == 1).float().mean()) > 0.97
    assert 0.02 < float((mask == 1).float().mean()) < 0.6


@save_blank()
@pytest.mark.parametrize("task", [MULTILABEL, DETECT, SEGMENT], ids=["multilabel", "detect", "segment"])
def test_recipe_with_annotations_runs_to_scores_and_figures(
    tmp_path: Path, root: Path, pretrained: dict[str, Path], task: dict[str, Any]
) -> None:
    arms = ["pretrained_decoder", "pretrained", "lsuv", "scratch"] if task is SEGMENT else ["pretrained", "scratch"]
    copy_storage(pretrained, task, tmp_path)
    built = recipe(tmp_path, root, task, stages__finetune__arms=arms)
    rows = run_recipe(built, QUIET).rows
    measure = {"multilabel": "map", "detect": "map_11point", "segment": "mean_iou"}[task["name"]]
    assert [row.measure.split(",")[0] for row in rows] == [f"{task['name']} {measure}"] * (len(arms) - 1)
    assert len({row.measure for row in rows}) == len(rows)
    assert make_score_table(built, rows).row_count == len(rows)
    tuned = runs_of(built)["finetune seed 0"]
    (folder,) = (tmp_path / built.name).glob("finetune-seed0-*")
    result = json.loads((folder / "result.json").read_text())
    for arm in arms:
        assert 0.0 <= tuned.data.metrics[f"{arm}/test"] == result[arm]["scores"]["test"][measure] <= 1.0
    names = {
        path.path
        for path in mlflow.MlflowClient(TrackingLocation.of(built).uri).list_artifacts(tuned.info.run_id, "figures")
    }
    shown = set() if task is MULTILABEL else {f"figures/predicted_{arm}.png" for arm in arms}
    shown |= {"figures/curves_arms.png", "figures/filters.png"}
    assert names == {f"figures/curves_{arm}.png" for arm in arms} | shown
    if task is SEGMENT:
        assert {f"pretrained/test_iou/{name}" for name in ("ground", "bright", "dark")} <= set(tuned.data.metrics)


def test_task_that_does_not_fit_the_store_is_a_one_line_error(tmp_path: Path, root: Path) -> None:
    wrong = {
        "masks": (
            SEGMENT,
            {"dataset__annotations": ["boxes", "present"]},
            r"^stages\.finetune\.task\.name: 'segment' needs masks, and .* has boxes, pr",
        ),
        "boxes": (
            DETECT,
            {"dataset__annotations": ["present"]},
            r"'detect' needs boxes, and .* has present instead; valid: .*multilabel$",
        ),
        "labels": (
            MULTILABEL,
            {"stages__finetune__labels_per_class": 2},
            r"^stages\.finetune\.labels_per_class: 2 is not valid: .*labels_fraction$",
        ),
        "crops": (SEGMENT, {"stages__finetune__test_crops": 10}, r"^stages\.finetune\.test_crops: 10 is not valid"),
        "held": (
            SEGMENT,
            {"stream__resident": "on"},
            r"^stream\.resident: 'on' is not possible for stages\.finetune: .* with their mask; valid: auto",
        ),
        "decoder": (
            DETECT,
            {"stages__finetune__arms": ["pretrained_decoder", "scratch"]},
            r"^stages\.finetune\.arms: 'pretrained_decoder' is not valid",
        ),
        "shape": (
            {**SEGMENT, "shortcuts": "none"},
            {"stages__finetune__arms": ["pretrained_decoder", "scratch"]},
            r"^stages\.finetune\.arms: 'pretrained_decoder' is not valid: "
            r"shortcuts: none differs from full of the pretrained decoder$",
        ),
        "nothing": (
            SEGMENT,
            {
                "stages__pretrain__method": {"name": "nat", "dim": 4},
                "stages__finetune__arms": ["pretrained_decoder", "scratch"],
            },
            r"'pretrained_decoder' is not valid: nat of stages\.pretrain makes no decoder but head; "
            r"valid: pretrained, scratch$",
        ),
        "groups": (
            MULTILABEL,
            {"stages__finetune__class_groups": {"light": ["brigth"]}},
            r"^stages\.finetune\.class_groups\.light: 'brigth' is no class of the data set; did you mean 'bright'\?",
        ),
        "layer": (
            MULTILABEL,
            {"stages__finetune__task__layer": 9},
            r"^stages\.finetune\.task\.layer: 9 is none of the encoder's 4 feature maps",
        ),
    }
    for task, changes, message in wrong.values():
        with pytest.raises(UserError, match=message):
            preflight.check_recipe(recipe(tmp_path, root, dict(task), **changes))


@leave_undrawn()
def test_decoder_by_reference_equals_that_of_the_previous_stage(
    tmp_path: Path, root: Path, pretrained: dict[str, Path]
) -> None:
    copy_storage(pretrained, SEGMENT, tmp_path)
    arms = ["pretrained_decoder", "scratch"]
    (row,) = run_recipe(recipe(tmp_path, root, SEGMENT, stages__finetune__arms=arms), QUIET).rows
    trained = runs_of(recipe(tmp_path, root, SEGMENT))["pretrain seed 0"].info.run_id
    other = recipe(
        tmp_path,
        root,
        SEGMENT,
        name="other",
        stages__finetune__arms=arms,
        stages__finetune__encoder=f"runs:/{trained}/encoder",
    )
    (again,) = run_recipe(other, QUIET, "finetune").rows
    assert again.pretrained == row.pretrained
    for task, told in (
        ({**SEGMENT, "shortcuts": "none"}, "shortcuts: none differs from full"),
        (MULTILABEL, "a task of this kind starts from the enc"),
    ):
        wrong = recipe(
            tmp_path,
            root,
            task,
            name="wrong",
            stages__finetune__arms=arms,
            stages__finetune__encoder=f"runs:/{trained}/encoder",
        )
        with pytest.raises(UserError, match=rf"^stages\.finetune\.arms: 'pretrained_decoder' is not valid: .*{told}"):
            run_recipe(wrong, QUIET, "finetune")


@leave_undrawn()
def test_ten_crops_of_a_test_image_are_scored_as_one(tmp_path: Path, root: Path, pretrained: dict[str, Path]) -> None:
    copy_storage(pretrained, MULTILABEL, tmp_path)
    built = recipe(tmp_path, root, MULTILABEL, stages__finetune__test_crops=10, stages__finetune__test_scale=0.7)
    (row,) = run_recipe(built, QUIET).rows
    assert row.measure == "multilabel map, 24 images"


@leave_undrawn()
def test_random_test_crops_use_the_training_augmentation(tmp_path: Path, root: Path) -> None:
    """An image has ten different crops, the same ones for all arms and seeds, so that scores can be compared."""
    augment = [{"op": "random_crop", "scale": 0.7}, {"op": "horizontal_flip"}]
    built = recipe(
        tmp_path,
        root,
        MULTILABEL,
        stages__finetune__test_crops=10,
        stages__finetune__test_crop="random",
        dataset__train_augment=augment,
    )
    store = prepare(built.dataset, tmp_path / "stores", lambda: False, lambda done, total: None)
    context, stage = StageContext.create(built, store, on_ray=False), built.stages["finetune"]
    assert isinstance(stage, Finetune)
    views = list_scored_views(context, stage)
    assert views == [built.dataset.train_augment] * 10
    (first,), (again,) = (list(context.iterate_batches(context.splits.test, 8, views, "present")) for _ in range(2))
    assert len({view.numpy().tobytes() for view in first.views}) == 10
    assert all(torch.equal(a, b) for a, b in zip(first.views, again.views, strict=True))
    (row,) = run_recipe(built, QUIET).rows
    assert row.measure == "multilabel map, 24 images"
    with pytest.raises(
        UserError, match=r"^stages\.finetune: test_crop: 'random' is not valid with test_crops: 1; valid: corners, or"
    ):
        recipe(tmp_path, root, MULTILABEL, stages__finetune__test_crop="random")


@leave_undrawn()
@pytest.mark.parametrize(
    ("task", "lists"),
    [(MULTILABEL, "ap"), (DETECT, "ap_11point"), (SEGMENT, "iou")],
    ids=["multilabel", "detect", "segment"],
)
def test_class_group_scores_the_mean_of_its_classes(
    tmp_path: Path, root: Path, pretrained: dict[str, Path], task: dict[str, Any], lists: str
) -> None:
    copy_storage(pretrained, task, tmp_path)
    groups = {"light": ["bright"], "both": ["bright", "dark"]}
    measure = {"ap": "map", "ap_11point": "map_11point", "iou": "mean_iou"}[lists]
    says = {"stage": "finetune", "measure": f"{measure}_both", "paper": 70.0, "source": "x"}
    built = recipe(tmp_path, root, task, stages__finetune__class_groups=groups, expected=[says])
    rows = run_recipe(built, QUIET).rows
    assert [row.key for row in rows] == [measure, f"{measure}_light", f"{measure}_both"]
    (folder,) = (tmp_path / built.name).glob("finetune-seed0-*")
    result = json.loads((folder / "result.json").read_text())
    for arm, scores in (("pretrained", rows[2].pretrained), ("scratch", rows[2].baseline)):
        found = result[arm]["scores"]["test"]
        bright, dark = found[lists][-2:]  # masks have a background before them
        assert found[f"{measure}_light"] == pytest.approx(bright)
        assert scores == (pytest.approx((bright + dark) / 2),)
    assert [score_facts(built, row).get("paper") for row in rows] == [None, None, 70.0]


@leave_undrawn()
def test_fraction_of_annotated_images_can_be_learned_from(
    tmp_path: Path, root: Path, pretrained: dict[str, Path]
) -> None:
    copy_storage(pretrained, MULTILABEL, tmp_path)
    built = recipe(tmp_path, root, MULTILABEL, stages__finetune__labels_fraction=0.5)
    (row,) = run_recipe(built, QUIET).rows
    assert row.measure == "multilabel map, 12 images"


ODD = {
    "bright": "red & hot@100%",
    "dark": "..",
    "third": "$\\bad{$",
    "fourth": "\N{LATIN SMALL LETTER U WITH DIAERESIS}/" + "x" * 300,
}


@pytest.mark.fault(55, "classes whose names MLflow refuses")
@pytest.mark.parametrize("task", [MULTILABEL, SEGMENT], ids=["multilabel", "segment"])
def test_classes_of_any_name_are_scored(tmp_path: Path, root: Path, task: dict[str, Any]) -> None:
    odd = Path(shutil.copytree(root, tmp_path / "odd"))
    for file in odd.glob("Annotations/*.xml"):
        text = file.read_text()
        for name, other in ODD.items():
            text = text.replace(f">{name}<", f">{escape(other)}<")
        file.write_text(text)
    built = recipe(tmp_path / "runs", odd, task)
    (odd / "classes.txt").write_text("\n".join([*(["ground"] if task is SEGMENT else []), *ODD.values()]))
    run_recipe(built, QUIET)
    lists, arms = ("iou" if task is SEGMENT else "ap"), ("pretrained", "scratch")
    logged = runs_of(built)["finetune seed 0"].data.metrics
    for arm in arms:
        keys = {key.removeprefix(f"{arm}/test_{lists}/") for key in logged if key.startswith(f"{arm}/test_{lists}/")}
        assert {"red _ hot_100_", "class 2" if task is SEGMENT else "class 1"} <= keys
