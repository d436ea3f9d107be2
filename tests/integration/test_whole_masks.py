"""Segmentation that is scored on whole images: every labelled pixel of a photograph's mask counts once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.prepare.prepare import prepare
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.finetuning.views import list_scored_views
from firstlight.pipeline.train.context import StageContext
from firstlight.tasks.downstream.segment import Segmentation
from firstlight.tasks.downstream.whole_images import VOID_CLASS
from firstlight.tasks.nn.encoders import Encoder
from tests.support import recipes
from tests.support.blank_figures import save_blank
from tests.support.published_sets import write_texts
from tests.support.recipe_runs import QUIET

ADAM = {"name": "Adam", "lr": 0.003}
# VOC's usual sizes, an image that takes more windows than those, and one that takes a single one.
SIZES = [(500, 375), (375, 500), (500, 120), (225, 225)]
LEVELS = (20, 130, 240)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes 24 images whose levels are those of their classes, with void along the right and lower edges."""
    root, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    (root / "JPEGImages").mkdir()
    (root / "SegmentationClass").mkdir()
    for k in range(24):
        width, height = SIZES[k % 4]
        mask = np.zeros((height, width), np.uint8)
        for kind in (1, 2):
            x, y = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
            mask[y : y + height // 2, x : x + width // 2] = kind
        Image.fromarray(np.array(LEVELS, np.uint8)[mask]).convert("RGB").save(root / f"JPEGImages/{k:06d}.png")
        mask[-5:], mask[:, -5:] = VOID_CLASS, VOID_CLASS
        Image.fromarray(mask).save(root / f"SegmentationClass/{k:06d}.png")
    train, test = ("".join(f"{k:06d}\n" for k in part) for part in (range(16), range(16, 24)))
    return write_texts(
        root,
        classes="ground\ngrey\nbright\n",
        ImageSets__Segmentation__train=train,
        ImageSets__Segmentation__test=test,
    )


def large_recipe(storage: Path, root: Path, size: int, task: str = "segment", **changes: Any) -> Recipe:
    stage = {
        "kind": "finetune",
        "task": {"name": task, "norm": "group"},
        "epochs": 1,
        "batch_size": 8,
        "learning_rates": [],
    }
    return recipes.recipe(
        storage,
        **{
            "dataset__name": "large",
            "dataset__source": "voc",
            "dataset__root": str(root),
            "dataset__annotations": ["mask"] if task == "segment" else ["present"],
            "dataset__image_size": size,
            "dataset__val_fraction": 0.25,
            "dataset__max_train": None,
            "dataset__max_test": None,
            "dataset__train_augment": [{"op": "random_crop", "scale": 0.9}],
            "dataset__eval_augment": [{"op": "center_crop", "scale": 0.9}],
            "encoder": {"name": "network1", "norm": "group", "width": 4, "m": [2, 2, 0, 0]},
            "stages": {"finetune": {**stage, "optimizer": ADAM, "arms": ["scratch"], "scored_pixels": "image"}},
            **changes,
        },
    )


def read_mask(root: Path, image: int) -> np.ndarray:
    return np.asarray(Image.open(root / f"SegmentationClass/{image:06d}.png"))


def tell_by_level(images: Tensor) -> Tensor:
    """Returns the logits of a network that knows the level of every class."""
    distances = (255 * images.mean(1, keepdim=True) - torch.tensor(LEVELS).view(1, 3, 1, 1)).abs()
    return -distances


@pytest.mark.parametrize("side", [{"test_scale": 225 / 256}, {"test_size": 225}, {"test_scale": 0.4}])
def test_every_labelled_pixel_of_an_image_counts_once(
    tmp_path: Path, root: Path, side: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {f"stages__finetune__{key}": value for key, value in side.items()}
    built = large_recipe(tmp_path, root, 225, **given)
    store = prepare(built.dataset, tmp_path / "stores", lambda: False, lambda done, total: None)
    context, stage = StageContext.create(built, store, on_ray=False), built.stages["finetune"]
    views = list_scored_views(context, stage)  # type: ignore[arg-type]
    task = Segmentation(Encoder(built.network_spec, 225), 3, norm="group").eval()
    monkeypatch.setattr(task, "compute_logits", tell_by_level)
    counts = [task.observe(batch)[0] for batch in context.iterate_batches(context.splits.test, 3, views, "mask", True)]
    found = torch.cat(counts)
    for image, own in zip(context.splits.test.tolist(), found, strict=True):
        mask = read_mask(root, image)
        known = np.bincount(mask[mask != VOID_CLASS], minlength=3)
        assert own.sum(1).tolist() == known.tolist(), "rows are true classes: each pixel is in one cell"
        assert mask.shape[::-1] in SIZES
    assert float(found.sum(0).diagonal().sum() / found.sum()) > 0.98, "and where the pixel is"


@save_blank()
def test_recipe_counts_whole_held_out_and_test_images(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[list[int]] = []
    real = Segmentation.score

    def record(self: Segmentation, rows: tuple[Tensor, ...]) -> Any:
        scored.append(sorted(rows[0].sum((1, 2)).tolist()))
        return real(self, rows)

    monkeypatch.setattr(Segmentation, "score", record)
    (row,) = run_recipe(large_recipe(tmp_path, root, 26), QUIET).rows
    assert row.key == "mean_iou"
    labelled = [int((read_mask(root, image) != VOID_CLASS).sum()) for image in range(24)]
    held_out, test = scored
    assert test == sorted(labelled[16:])
    assert len(held_out) == 4
    assert set(held_out) <= set(labelled[:16])


def test_default_scores_the_view(tmp_path: Path, root: Path) -> None:
    built = large_recipe(tmp_path, root, 26, stages__finetune__scored_pixels="view")
    stage: Any = built.stages["finetune"]
    store = prepare(built.dataset, tmp_path / "stores", lambda: False, lambda done, total: None)
    context = StageContext.create(built, store, on_ray=False)
    assert list_scored_views(context, stage) == [built.dataset.eval_augment]


def test_task_without_masks_is_refused(tmp_path: Path, root: Path) -> None:
    with pytest.raises(UserError) as error:
        run_recipe(recipes.recipe(tmp_path, stages__finetune__scored_pixels="image"), QUIET)
    assert str(error.value) == (
        "stages.finetune.scored_pixels: 'image' is not valid: classify has no masks; valid: view, or task.name: segment"
    )
