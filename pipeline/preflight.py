"""Checks on the driver that need more than the recipe itself: the machine, the storage, the source, the store. Before Ray starts where possible."""

import os
import uuid
from pathlib import Path

from pipeline.config import Downstream, Evaluate, Finetune, Pretrain, Recipe, Training
from pipeline.errors import UserError
from pipeline.session import check_local
from pipeline.sources import open_source
from pipeline.splits import Splits
from tasks.encoders import Encoder


def check(recipe: Recipe) -> None:
    """Everything that can be known without Ray.

    Raises:
        UserError: names the key, the value and what is valid.
    """
    check_local(recipe.scale)
    _check_storage(recipe.storage)
    for name, stage in recipe.stages.items():
        size, workers = getattr(stage, "batch_size", 0), max(recipe.scale.workers, 1)
        if isinstance(stage, Training) and size % workers:
            raise UserError(
                f"stages.{name}.batch_size: {size} is not valid: it is the sum over scale.workers = {workers} workers and must be a multiple of it"
            )
    try:
        Encoder(recipe.encoder.model_dump(), recipe.dataset.image_size)
    except ValueError as error:
        raise UserError(f"dataset.image_size: {recipe.dataset.image_size} is not valid: {error}") from None
    source = open_source(recipe.dataset)
    for name, stage in recipe.stages.items():
        if isinstance(stage, Downstream) and not source.classes:
            raise UserError(
                f"stages.{name}: needs labels, and dataset.root {str(recipe.dataset.root)!r} has none; "
                "valid: images in a folder per class, or a recipe with a pretrain stage only"
            )
        if isinstance(stage, Downstream) and not source.splits.get("test"):
            raise UserError(f"stages.{name}: needs a test split; dataset.test_fraction: {recipe.dataset.test_fraction} leaves none")


def _check_storage(storage: Path) -> None:
    probe = storage / f".write-{uuid.uuid4().hex[:8]}"
    try:
        storage.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"storage: {str(storage)!r} cannot be written: {os.strerror(error.errno or 0)}; valid: a folder you may write to") from None


def check_images(recipe: Recipe, splits: Splits) -> None:
    """The recipe against the images that there are, once they are prepared.

    Raises:
        UserError: a batch larger than its images, too few images of a class, an empty held-out part.
    """
    for name, stage in recipe.stages.items():
        images = len(splits.train)
        if isinstance(stage, Finetune):
            try:
                images = len(splits.few(stage.labels_per_class, recipe.seeds[0]))
            except UserError as error:
                raise UserError(f"stages.{name}.{error}") from None
        if isinstance(stage, Pretrain | Finetune) and stage.batch_size > images:
            raise UserError(f"stages.{name}.batch_size: {stage.batch_size} is more than the {images} images it would train on")
        if isinstance(stage, Evaluate | Finetune):
            for part, ids in (("val", splits.val), ("test", splits.test)):
                known = int((splits.labels[ids] >= 0).sum())
                if known < max(recipe.scale.workers, 1):
                    raise UserError(
                        f"dataset.{part}_fraction: leaves {known} labelled {part} images for {max(recipe.scale.workers, 1)} workers: too few"
                    )
