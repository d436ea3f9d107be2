"""A fine-tuned model predicts for test images what its stage has scored, whatever its views; and the docs' example."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.finetune import FinetuneStage
from firstlight.pipeline.stages.finetuning.views import list_scored_views
from firstlight.pipeline.stages.prediction.answers import ImageClasses, ImageMask
from firstlight.pipeline.stages.prediction.image_items import StoreImages
from firstlight.pipeline.stages.prediction.predictor import predict_items
from firstlight.pipeline.stages.prediction.saved_model import read_model
from firstlight.pipeline.stages.sections.finetune import Finetune
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.downstream.segment import confusion_counts
from tests.support import recipes
from tests.support.paths import ROOT
from tests.support.published_sets import write_texts
from tests.support.recipe_runs import QUIET, runs_of

pytestmark = pytest.mark.usefixtures("undrawn_figures")


def run_finetune(storage: Path, **changes: Any) -> tuple[Recipe, Path, dict[str, Any], StageContext]:
    """Runs the stage `finetune` alone, from scratch. Returns its folder, the scores of its test images, and images."""
    one_training = {"stages__finetune__arms": ["scratch"], "stages__finetune__learning_rates": []}
    raw = recipes.recipe(storage, **{**one_training, **changes}).dump()
    recipe = parse_recipe({**raw, "stages": {"finetune": raw["stages"]["finetune"]}})
    run_recipe(recipe, QUIET)
    (folder,) = (storage / recipe.name).glob("finetune-seed0-*")
    (store,) = (storage / "stores").glob("*/")
    context = StageContext.create(recipe, Store.open(store), on_ray=False)
    told, stage = FinetuneStage().read_score, recipe.stages["finetune"]
    assert isinstance(stage, Finetune)
    instance = StageInstance("finetune", 0, "f", folder)
    scores = {m.name: told(stage, m, "scratch", "test", instance) for m in stage.measures}
    return recipe, folder / "model", scores, context


@pytest.mark.parametrize(
    "views",
    [
        {},
        {"stages__finetune__test_crops": 10, "stages__finetune__test_scale": 0.8},
        {"stages__finetune__test_crops": 10, "stages__finetune__test_crop": "random"},
        {"dataset__eval_augment": [{"op": "random_crop", "scale": 0.8}]},
    ],
    ids=["one view", "ten crops", "random crops", "random view"],
)
def test_predicted_classes_of_test_images_are_those_that_were_scored(tmp_path: Path, views: dict[str, Any]) -> None:
    recipe, folder, scores, context = run_finetune(tmp_path, **views)
    model, ids = read_model(folder), context.splits.test
    found = [item.answer for item in predict_items(StoreImages(context.store, ids), model, batch_size=len(ids))]
    stage: Any = recipe.stages["finetune"]
    (batch,) = context.iterate_batches(ids, len(ids), list_scored_views(context, stage))
    task: Any = model.task
    with torch.inference_mode():
        expected = task.mean_logits(batch).softmax(1).numpy()
    for answer, row in zip(found, expected, strict=True):
        assert isinstance(answer, ImageClasses)
        assert np.array_equal(answer.probabilities, row)
    predicted = np.array([one.probabilities.argmax() for one in found if isinstance(one, ImageClasses)])
    assert scores["accuracy"] == pytest.approx(float((predicted == context.splits.labels[ids]).mean()))


def write_scenes(root: Path) -> Path:
    """Writes 20 images of several sizes with masks of three classes, six of them for testing."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for k in range(20):
        width, height = ((31, 22), (22, 31), (40, 16))[k % 3]
        mask = rng.integers(0, 3, (height, width), np.uint8)
        Image.fromarray(np.array((20, 130, 240), np.uint8)[mask]).convert("RGB").save(root / f"JPEGImages/{k:06d}.png")
        Image.fromarray(mask).save(root / f"SegmentationClass/{k:06d}.png")
    lists = {
        name: "".join(f"{k:06d}\n" for k in part) for name, part in (("train", range(14)), ("test", range(14, 20)))
    }
    return write_texts(
        root,
        classes="a\nb\nc\n",
        ImageSets__Segmentation__train=lists["train"],
        ImageSets__Segmentation__test=lists["test"],
    )


def test_masks_of_test_images_are_those_that_were_scored_on_whole_images(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes")
    _, folder, scores, context = run_finetune(
        tmp_path / "runs",
        dataset__name="scenes",
        dataset__source="voc",
        dataset__root=str(root),
        dataset__annotations=["mask"],
        dataset__image_size=26,
        dataset__max_train=None,
        dataset__max_test=None,
        dataset__train_augment=[{"op": "random_crop", "scale": 0.9}],
        dataset__eval_augment=[{"op": "center_crop", "scale": 0.9}],
        encoder={"name": "network1", "norm": "group", "width": 4, "m": [2, 2, 0, 0]},
        stages__finetune__task={"name": "segment", "norm": "group"},
        stages__finetune__labels_per_class=None,
        stages__finetune__batch_size=4,
        stages__finetune__scored_pixels="image",
        stages__finetune__optimizer={"name": "Adam", "lr": 0.01},
        stages__finetune__epochs=6,
    )
    ids = context.splits.test
    counts = torch.zeros(3, 3, dtype=torch.int64)
    for image, item in zip(
        ids.tolist(), predict_items(StoreImages(context.store, ids), read_model(folder)), strict=True
    ):
        truth = np.asarray(Image.open(root / f"SegmentationClass/{image:06d}.png"))
        assert isinstance(item.answer, ImageMask)
        assert item.answer.mask.shape == truth.shape, "at the size of the original image"
        assert int(item.answer.mask.max()) < 3, "windows cover it"
        own, given = (torch.from_numpy(part.copy())[None].long() for part in (item.answer.mask, truth))
        counts += confusion_counts(own, given, 3)[0]
    hits = counts.diagonal().double()
    expected = float((hits / (counts.sum(0) + counts.sum(1) - hits)).mean())
    assert scores["mean_iou"] == pytest.approx(expected, abs=1e-3)
    assert expected > 0.2


def read_example() -> str:
    """Returns the Python of docs/predict.md that asks a model for answers."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/predict.md").read_text("utf-8"), re.S)
    (code,) = [block for block in blocks if "fl.load_model" in block]
    return str(code)


def test_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recipe, _, _, _ = run_finetune(tmp_path / "runs", stages__finetune__register_as="flowers")
    Image.new("RGB", (30, 20), (200, 20, 20)).save(tmp_path / "photo.jpg")
    Image.new("RGB", (20, 30), (20, 200, 20)).save(tmp_path / "other.jpg")
    monkeypatch.chdir(tmp_path)
    exec(read_example(), {})
    assert re.search(r"^\d 0\.\d+$", capsys.readouterr().out, re.M)
    card = runs_of(recipe)["finetune seed 0"].data.tags["mlflow.note.content"]
    assert "The classes, in the order of its outputs: `0`, `1`" in card
