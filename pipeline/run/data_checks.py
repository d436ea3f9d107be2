"""A recipe against the images that there are, once they are prepared: enough for its batches and its labels, for every seed."""

import numpy as np

from firstlight.pipeline.config.recipe import Evaluate, FewLabels, Finetune, Pretrain, Recipe, Retrieve
from firstlight.pipeline.data.splits import Splits
from firstlight.pipeline.data.store import DUPLICATES, QUARANTINE, Store
from firstlight.pipeline.data.subsets import lost_images
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.retrieve import gallery, queries
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.task import Target


def check_images(recipe: Recipe, splits: Splits) -> None:
    """The recipe against the images that there are, once they are prepared, for every seed.

    Raises:
        UserError: a batch larger than its images, too few images of a class, a subset that is not there, an empty held-out part.
    """
    for name, stage in recipe.stages.items():
        if isinstance(stage, Pretrain | Finetune):
            for seed in recipe.seeds:
                _check_training(f"stages.{name}", stage, splits, seed)
        if isinstance(stage, Retrieve):
            _check_gallery(f"stages.{name}", stage, splits, max(recipe.scale.most, 1))
        if isinstance(stage, Pretrain) and stage.watch.every and len(splits.val) < max(recipe.scale.most, 2):
            raise UserError(
                f"dataset.val_fraction: leaves {len(splits.val)} held-out images, too few for stages.{name}.watch.every: {stage.watch.every}"
            )
        if isinstance(stage, Evaluate | Finetune):
            for part, ids in (("val", splits.val), *([("test", splits.test)] if recipe.score_test else [])):
                known = len(splits.with_target(ids, _target(stage)))
                if known < max(recipe.scale.most, 1):
                    raise UserError(
                        f"dataset.{part}_fraction: leaves {known} labelled {part} images for {max(recipe.scale.most, 1)} workers: too few"
                    )


def _check_gallery(where: str, stage: Retrieve, splits: Splits, workers: int) -> None:
    """Enough images to be found, besides the query itself."""
    searched, asked = gallery(stage, splits), queries(stage, splits)
    if len(asked) < workers:
        raise UserError(f"{where}.queries: {stage.queries!r} has {len(asked)} images for {workers} workers: too few")
    known = searched[splits.labels[searched] >= 0]
    searched = known if len(known) else searched
    others = len(searched) - bool(np.isin(asked, searched).any())
    if max(stage.precision_at) > others:
        raise UserError(
            f"{where}.precision_at: {max(stage.precision_at)} is more than the {others} images that a query can find; valid: 1 to {others}"
        )


def _check_training(where: str, stage: Pretrain | Finetune, splits: Splits, seed: int) -> None:
    images = len(splits.train)
    if isinstance(stage, Finetune) or stage.labelled_per_batch:
        images = labelled = _labelled(where, stage, splits, seed)
        if isinstance(stage, Pretrain):
            images = _check_mixture(where, stage, labelled, len(splits.train) - labelled)
    if stage.batch_size > images:
        raise UserError(f"{where}.batch_size: {stage.batch_size} is more than the {images} images it would train on")


def _labelled(where: str, stage: FewLabels, splits: Splits, seed: int) -> int:
    try:
        return len(splits.labelled_subset(stage, seed, _target(stage)))
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _check_mixture(where: str, stage: Pretrain, labelled: int, rest: int) -> int:
    """The images that a semi-supervised pretraining trains on, of `labelled` and `rest`."""
    wanted = stage.batch_size - stage.labelled_per_batch
    if stage.labelled_per_batch > labelled:
        raise UserError(
            f"{where}.labelled_per_batch: {stage.labelled_per_batch} is more than the {labelled} labelled images there are"
        )
    if wanted > rest:
        raise UserError(
            f"{where}.labelled_per_batch: {stage.labelled_per_batch} leaves {wanted} images of a batch to the {rest} without a label that there are; "
            f"valid: fewer labels (e.g. a smaller labels_per_class), or {stage.batch_size} (labelled images only)"
        )
    return labelled + rest if wanted else labelled


def wrong_with(recipe: Recipe, store: Store) -> list[str]:
    """Lines for the user: what is wrong with the images of a store."""
    copies = store.images["duplicates"]
    notes = (
        [f"{recipe.dataset.list or recipe.dataset.root}: {store.source['aside']}"] if "aside" in store.source else []
    )
    if store.quarantined:
        notes.append(f"{store.quarantined:,} images cannot be decoded, listed in {store.path / QUARANTINE}")
    if lost := lost_images(store.subsets):
        notes.append(f"subsets are smaller by images that cannot be decoded: {', '.join(lost)}")
    if copies["copies"]:
        both = f"{copies['of_train_in_test']:,} of them test images that are also in train, "
        notes.append(f"{copies['copies']:,} images are copies of others, {both}listed in {store.path / DUPLICATES}")
    return notes


def left_out(recipe: Recipe, name: str, splits: Splits) -> list[str]:
    """Lines for the user: images that a stage's trainings leave out."""
    stage, notes = recipe.stages[name], list[str]()
    if not isinstance(stage, Pretrain | Finetune):
        return notes
    if stage.labels_subset and (held := {splits.held_back(stage, seed) for seed in recipe.seeds}) != {0}:
        why = "are held out (dataset.val_fraction), or have no label"
        notes.append(f"stages.{name}.labels_subset: {_range(held)} images of {stage.labels_subset!r} {why}")
    tails, images = (
        set(numbers) for numbers in zip(*(_tail(stage, splits, seed) for seed in recipe.seeds), strict=True)
    )
    if tails != {0}:
        why = "(fewer than a batch), others each time"
        notes.append(f"stages.{name}: each epoch leaves out {_range(tails)} of {_range(images)} images {why}")
    return notes


def _tail(stage: Pretrain | Finetune, splits: Splits, seed: int) -> tuple[int, int]:
    """The images that an epoch leaves out, and those that it is drawn from."""
    images, batch = len(splits.train), stage.batch_size
    if isinstance(stage, Finetune) or stage.labelled_per_batch == batch:
        images = len(splits.labelled_subset(stage, seed, _target(stage)))
    elif stage.labelled_per_batch:
        images, batch = (
            images - len(splits.labelled_subset(stage, seed, _target(stage))),
            batch - stage.labelled_per_batch,
        )
    return images % batch, images


def _range(counts: set[int]) -> str:
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"


def _target(stage: object) -> Target:
    """What a stage learns from of an image."""
    return TASKS[stage.task.name].target if isinstance(stage, Finetune) else "label"
