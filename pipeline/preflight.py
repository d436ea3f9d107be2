"""Checks on the driver that need more than the recipe itself: the machine, the storage, the source, the store. Before Ray starts where possible."""

import os
import uuid
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Evaluate, Export, FewLabels, Finetune, Look, Pretrain, Recipe, Retrieve, Training, arguments
from pipeline.errors import UserError
from pipeline.retrieve import gallery, queries
from pipeline.session import check_local
from pipeline.sources import open_source
from pipeline.splits import Splits
from tasks.encoders import Encoder
from tasks.exchange import FORMATS, lacks
from tasks.pretrain import METHODS
from tasks.pretrain.method import Setting


def check(recipe: Recipe) -> None:
    """Everything that can be known without Ray.

    Raises:
        UserError: names the key, the value and what is valid.
    """
    check_local(recipe.scale, recipe.stream)
    _check_storage(recipe.storage)
    for name, stage in recipe.stages.items():
        if isinstance(stage, Training):
            _check_batch(f"stages.{name}", stage, max(recipe.scale.workers, 1))
    try:
        encoder = Encoder(recipe.encoder.model_dump(), recipe.dataset.image_size)
    except ValueError as error:
        key = "encoder." if str(error).startswith(tuple(f"{key}: " for key in type(recipe.encoder).model_fields)) else ""
        raise UserError(f"{key}{error}" if key else f"dataset.image_size: {recipe.dataset.image_size} is not valid: {error}") from None
    source = open_source(recipe.dataset)
    handed_on: dict[str, set[str]] = {}  # pretrain stage -> the networks that its method hands on besides the encoder
    place = f"list {recipe.dataset.list!r}" if recipe.dataset.list else f"root {recipe.dataset.root!r}"
    for name, stage in recipe.stages.items():
        if isinstance(stage, Evaluate | Finetune) and not source.classes:
            raise UserError(
                f"stages.{name}: needs labels, and dataset.{place} has none; "
                "valid: images in a folder per class, or a recipe with a pretrain stage only"
            )
        if isinstance(stage, Evaluate | Finetune) and source.annotations:
            raise UserError(
                f"stages.{name}: needs one label per image, and those of dataset.{place} have {', '.join(source.annotations)} instead; "
                "valid: images in a folder per class, or a recipe with a pretrain stage only"
            )
        tests = isinstance(stage, Evaluate | Finetune) or (isinstance(stage, Retrieve) and "test" in (stage.queries, stage.gallery))
        if tests and not source.splits.get("test") and not recipe.dataset.extends:
            raise UserError(f"stages.{name}: needs a test split; dataset.test_fraction: {recipe.dataset.test_fraction} leaves none")
        if isinstance(stage, Export):
            _check_formats(f"stages.{name}", stage, encoder)
        if isinstance(stage, Pretrain):
            handed_on[name] = _check_method(f"stages.{name}", stage, recipe, encoder, 0 if source.annotations else len(source.classes))
            if stage.watch.every and stage.watch.features == "head":
                _check_has_head(f"stages.{name}.watch", name, recipe, handed_on)
        if isinstance(stage, Look):
            _check_look(f"stages.{name}", stage, len(encoder.shapes))
            if stage.features == "head" and stage.encoder == "previous":
                _check_has_head(f"stages.{name}", list(handed_on)[-1], recipe, handed_on)


def _check_batch(where: str, stage: Training, workers: int) -> None:
    if stage.batch_size % (workers * stage.accumulate):
        parts = f" and accumulate = {stage.accumulate} parts" if stage.accumulate > 1 else ""
        raise UserError(
            f"{where}.batch_size: {stage.batch_size} is not valid: it is the sum over scale.workers = {workers} workers{parts} "
            f"and must be a multiple of {workers * stage.accumulate}"
        )


def _check_look(where: str, stage: Look, maps: int) -> None:
    """The layers of a stage against the encoder's maps."""
    assert isinstance(stage, Evaluate | Retrieve)
    key = "layers" if isinstance(stage, Evaluate) else "layer"
    for layer in stage.layers:
        if not -maps <= layer < maps:
            raise UserError(f"{where}.{key}: {layer} is not one of the encoder's {maps} feature maps; valid: {-maps} to {maps - 1}")
    for name, usual in (("layers", (-1,)), ("pool", "avg")):
        if stage.features == "head" and getattr(stage, name) != usual:
            told, value = (key, list(stage.layers)) if name == "layers" else (name, stage.pool)
            raise UserError(f"{where}.{told}: {value} is not valid with features: head, which has one output; valid: leave it out")


def _check_has_head(where: str, made_by: str, recipe: Recipe, handed_on: dict[str, set[str]]) -> None:
    stage = recipe.stages[made_by]
    assert isinstance(stage, Pretrain)
    if "head" not in handed_on[made_by]:
        has = ", ".join(sorted(handed_on[made_by]))
        raise UserError(
            f"{where}.features: 'head' is not valid: {stage.method.name} of stages.{made_by} hands on no head"
            f"{f' but {has}' if has else ''}; valid: encoder"
        )


def _check_formats(where: str, stage: Export, encoder: Encoder) -> None:
    """Formats that are asked for by name must be there for this encoder."""
    reasons = {format: lacks(encoder, format) for format in stage.formats or ()}
    for format, reason in reasons.items():
        if reason:
            valid = [name for name in FORMATS if not (reasons[name] if name in reasons else lacks(encoder, name))]
            raise UserError(f"{where}.formats: {format!r} is not valid: {reason}; valid: {', '.join(valid)}")


def _check_method(where: str, stage: Pretrain, recipe: Recipe, encoder: Encoder, classes: int) -> set[str]:
    """What batches hold against what the method needs; then the method itself, built once over a small table: what it hands on."""
    cls, parameters = METHODS[stage.method.name], arguments(stage.method)
    needs, labelled = cls.needs(**parameters), stage.labelled_per_batch
    if labelled > stage.batch_size:
        raise UserError(f"{where}.labelled_per_batch: {labelled} is more than batch_size: {stage.batch_size}; valid: 0 to {stage.batch_size}")
    if needs.labels and not labelled:
        raise UserError(f"{where}.labelled_per_batch: 0 is not valid: the method, as it is set, learns from labels; valid: 1 to {stage.batch_size}")
    if labelled and not needs.labels:
        raise UserError(f"{where}.labelled_per_batch: {labelled} is not valid: the method, as it is set, looks at no label; valid: 0")
    if labelled and not classes:
        raise UserError(f"{where}.labelled_per_batch: {labelled} is not valid: dataset.name {recipe.dataset.name!r} has no labels; valid: 0")
    for key, value in stage.labels_given.items() if not labelled else ():
        raise UserError(f"{where}.{key}: {value!r} is not valid without labelled_per_batch; valid: null")
    if stage.first_view == "plain" and needs.views == 1:
        raise UserError(f"{where}.first_view: 'plain' is not valid: the method, as it is set, takes one view; valid: augmented")
    setting = Setting(1024, stage.epochs, 0, classes, torch.full((1024,), -1))
    try:
        return set(cls(encoder, setting, **parameters).handed_on())
    except ValueError as error:
        raise UserError(str(error) if str(error).startswith("encoder.") else f"{where}.method.{error}") from None


def _check_storage(storage: Path) -> None:
    probe = storage / f".write-{uuid.uuid4().hex[:8]}"
    try:
        storage.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"storage: {str(storage)!r} cannot be written: {os.strerror(error.errno or 0)}; valid: a folder you may write to") from None


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
            _check_gallery(f"stages.{name}", stage, splits, max(recipe.scale.workers, 1))
        if isinstance(stage, Pretrain) and stage.watch.every and len(splits.val) < max(recipe.scale.workers, 2):
            raise UserError(
                f"dataset.val_fraction: leaves {len(splits.val)} held-out images, too few for stages.{name}.watch.every: {stage.watch.every}"
            )
        if isinstance(stage, Evaluate | Finetune):
            for part, ids in (("val", splits.val), ("test", splits.test)):
                known = int((splits.labels[ids] >= 0).sum())
                if known < max(recipe.scale.workers, 1):
                    raise UserError(
                        f"dataset.{part}_fraction: leaves {known} labelled {part} images for {max(recipe.scale.workers, 1)} workers: too few"
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
        return len(splits.few(stage, seed))
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _check_mixture(where: str, stage: Pretrain, labelled: int, rest: int) -> int:
    """The images that a semi-supervised pretraining trains on, of `labelled` and `rest`."""
    wanted = stage.batch_size - stage.labelled_per_batch
    if stage.labelled_per_batch > labelled:
        raise UserError(f"{where}.labelled_per_batch: {stage.labelled_per_batch} is more than the {labelled} labelled images there are")
    if wanted > rest:
        raise UserError(
            f"{where}.labelled_per_batch: {stage.labelled_per_batch} leaves {wanted} images of a batch to the {rest} without a label that there are; "
            f"valid: fewer labels (e.g. a smaller labels_per_class), or {stage.batch_size} (labelled images only)"
        )
    return labelled + rest if wanted else labelled


def left_out(recipe: Recipe, name: str, splits: Splits) -> list[str]:
    """Lines for the user: images that a stage's trainings leave out."""
    stage, notes = recipe.stages[name], list[str]()
    if not isinstance(stage, Pretrain | Finetune):
        return notes
    if stage.labels_subset and (held := {splits.held_back(stage, seed) for seed in recipe.seeds}) != {0}:
        why = "are held out (dataset.val_fraction), or have no label"
        notes.append(f"stages.{name}.labels_subset: {_range(held)} images of {stage.labels_subset!r} {why}")
    tails, images = (set(numbers) for numbers in zip(*(_tail(stage, splits, seed) for seed in recipe.seeds), strict=True))
    if tails != {0}:
        why = "(fewer than a batch), others each time"
        notes.append(f"stages.{name}: each epoch leaves out {_range(tails)} of {_range(images)} images {why}")
    return notes


def _tail(stage: Pretrain | Finetune, splits: Splits, seed: int) -> tuple[int, int]:
    """The images that an epoch leaves out, and those that it is drawn from."""
    images, batch = len(splits.train), stage.batch_size
    if isinstance(stage, Finetune) or stage.labelled_per_batch == batch:
        images = len(splits.few(stage, seed))
    elif stage.labelled_per_batch:
        images, batch = images - len(splits.few(stage, seed)), batch - stage.labelled_per_batch
    return images % batch, images


def _range(counts: set[int]) -> str:
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
