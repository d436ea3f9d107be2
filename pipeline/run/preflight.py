"""Checks on the driver that need more than the recipe itself: the machine, the storage, the source, the store. Before Ray starts where possible."""

import copy
import math
import os
import uuid
from pathlib import Path

import torch
from torch import nn

from firstlight.pipeline.config.recipe import (
    Embed,
    Evaluate,
    Export,
    Finetune,
    Look,
    Pretrain,
    Recipe,
    Retrieve,
    Scale,
    Training,
    arguments,
)
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.errors import UserError, suggest_valid
from firstlight.pipeline.run.ray_session import check_local
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.nn.encoders import Encoder
from firstlight.tasks.nn.export_formats import FORMATS, lacks
from firstlight.tasks.pretrain import METHODS
from firstlight.tasks.pretrain.method import Method, Setting


def check(recipe: Recipe, source: Source | None = None) -> None:
    """Everything that can be known without Ray. `source`: that of `recipe.dataset`, where it is open already.

    Raises:
        UserError: names the key, the value and what is valid.
    """
    check_local(recipe.scale, recipe.stream)
    _check_storage(recipe.storage)
    encoder = check_alone(recipe)
    source = source or open_source(recipe.dataset)
    handed_on: dict[
        str, dict[str, nn.Module]
    ] = {}  # pretrain stage -> the networks that its method hands on besides the encoder
    for name, stage in recipe.stages.items():
        where = f"stages.{name}"
        if isinstance(stage, Evaluate | Finetune):
            _check_answers(where, stage, recipe, source)
        tests = isinstance(stage, Evaluate | Finetune) or (
            isinstance(stage, Retrieve) and "test" in (stage.queries, stage.gallery)
        )
        tests = tests and recipe.score_test
        if tests and not source.splits.get("test") and not recipe.dataset.extends:
            raise UserError(
                f"{where}: needs a test split; dataset.test_fraction: {recipe.dataset.test_fraction} leaves none"
            )
        if isinstance(stage, Embed):
            _check_classes(f"{where}.map_classes", stage.map_classes, source.classes)
        if isinstance(stage, Pretrain):
            handed_on[name] = _check_method(
                where, stage, recipe, encoder, 0 if source.annotations else len(source.classes)
            )
            if stage.watch.every and stage.watch.features == "head":
                _check_handed_on(f"{where}.watch.features", "head", recipe, name, handed_on[name])
        if isinstance(stage, Look) and stage.features == "head" and stage.encoder == "previous":
            _check_handed_on(f"{where}.features", "head", recipe, *list(handed_on.items())[-1])
        if isinstance(stage, Finetune):
            _check_task(where, stage, recipe, encoder, len(source.classes), list(handed_on.items())[-1:])
            _check_groups(where, stage, source.classes)


def check_alone(recipe: Recipe) -> Encoder:
    """What can be known without images and without the machines that it will run on: batches, and the encoder with what stages ask of it.

    Raises:
        UserError: as `check`.
    """
    for name, stage in recipe.stages.items():
        if isinstance(stage, Training):
            _check_batch(f"stages.{name}", stage, recipe.scale)
    try:
        encoder = Encoder(recipe.encoder.model_dump(), recipe.dataset.image_size)
    except ValueError as error:
        key = (
            "encoder." if str(error).startswith(tuple(f"{key}: " for key in type(recipe.encoder).model_fields)) else ""
        )
        raise UserError(
            f"{key}{error}" if key else f"dataset.image_size: {recipe.dataset.image_size} is not valid: {error}"
        ) from None
    for name, stage in recipe.stages.items():
        if isinstance(stage, Export):
            _check_formats(f"stages.{name}", stage, encoder)
        if isinstance(stage, Look):
            _check_look(f"stages.{name}", stage, len(encoder.shapes))
    return encoder


def _check_answers(where: str, stage: Evaluate | Finetune, recipe: Recipe, source: Source) -> None:
    """What the images are labelled with against what the stage learns from."""
    place = f"list {recipe.dataset.list!r}" if recipe.dataset.list else f"root {recipe.dataset.root!r}"
    has: tuple[str, ...] = source.annotations or (("label",) if source.classes else ())
    needed: str = TASKS[stage.task.name].target if isinstance(stage, Finetune) else "label"
    if needed in has:
        if needed == "label" and len(source.classes) == 1:
            one = source.classes[0]
            raise UserError(
                f"{where}: all images of dataset.{place} are {one!r}: there is nothing to tell apart; valid: two classes or more"
            )
        return
    tasks = ", ".join(name for name, task in TASKS.items() if task.target in has)
    valid = (
        f"a finetune stage with task.name {tasks}"
        if tasks
        else "images in a folder per class, or a recipe with a pretrain stage only"
    )
    name = f".task.name: {stage.task.name!r}" if isinstance(stage, Finetune) else ":"
    found = f"{', '.join(has)} instead" if has else "none"
    wanted = {
        "label": "labels, one for an image",
        "present": "to know all classes of an image",
        "mask": "masks",
        "boxes": "boxes",
    }[needed]
    raise UserError(f"{where}{name} needs {wanted}, and dataset.{place} has {found}; valid: {valid}")


def _check_task(
    where: str,
    stage: Finetune,
    recipe: Recipe,
    encoder: Encoder,
    classes: int,
    before: list[tuple[str, dict[str, nn.Module]]],
) -> None:
    """The task, built once, against the encoder; `before`: what the last pretraining before it hands on."""
    cls = TASKS[stage.task.name]
    if cls.target != "label" and stage.labels_per_class:
        raise UserError(
            f"{where}.labels_per_class: {stage.labels_per_class} is not valid: images have several classes; valid: labels_fraction"
        )
    if cls.target in ("mask", "boxes") and stage.test_crops > 1:
        raise UserError(
            f"{where}.test_crops: {stage.test_crops} is not valid: crops of an image have {cls.target} of their own; valid: 1"
        )
    if cls.target != "label" and recipe.stream.resident == "on":
        raise UserError(
            f"stream.resident: 'on' is not possible for {where}: its images are streamed, with their {cls.target}; valid: auto, off"
        )
    try:
        task = cls(copy.deepcopy(encoder), classes, **arguments(stage.task))
    except ValueError as error:
        raise UserError(f"{where}.task.{error}") from None
    if "pretrained_decoder" in stage.arms and stage.encoder == "previous":
        made_by, networks = before[-1]
        _check_handed_on(f"{where}.arms", "decoder", recipe, made_by, networks)
        try:
            task.start_from(networks)
        except ValueError as error:
            raise UserError(f"{where}.arms: 'pretrained_decoder' is not valid: {error}") from None


def _check_groups(where: str, stage: Finetune, classes: tuple[str, ...]) -> None:
    cls = TASKS[stage.task.name]
    if stage.class_groups and cls.by_class is None:
        raise UserError(
            f"{where}.class_groups: is not valid: {cls.measure} of {stage.task.name} is no mean over classes; valid: leave it out"
        )
    for group, members in stage.class_groups.items():
        _check_classes(f"{where}.class_groups.{group}", members, classes)


def _check_classes(where: str, named: tuple[str, ...], classes: tuple[str, ...]) -> None:
    for name in named:
        if name not in classes:
            raise UserError(
                f"{where}: {name!r} is no class of the data set; {suggest_valid(name, classes) if classes else 'it has none'}"
            )


def _check_batch(where: str, stage: Training, scale: Scale) -> None:
    """Every number of workers that there may be has an equal share."""
    if scale.fewest < scale.most:
        shares = math.lcm(*range(scale.fewest, scale.most + 1)) * stage.accumulate
        if stage.batch_size % shares:
            raise UserError(
                f"{where}.batch_size: {stage.batch_size} is not valid: it is the sum over scale.workers, {scale.fewest} to {scale.most} of them, "
                f"and must be a multiple of {shares}; near it: {max(stage.batch_size // shares, 1) * shares}"
            )
        return
    workers = max(scale.most, 1)
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
            raise UserError(
                f"{where}.{key}: {layer} is not one of the encoder's {maps} feature maps; valid: {-maps} to {maps - 1}"
            )
    for name, usual in (("layers", (-1,)), ("pool", "avg")):
        if stage.features == "head" and getattr(stage, name) != usual:
            told, value = (key, list(stage.layers)) if name == "layers" else (name, stage.pool)
            raise UserError(
                f"{where}.{told}: {value} is not valid with features: head, which has one output; valid: leave it out"
            )


def _check_handed_on(where: str, wanted: str, recipe: Recipe, made_by: str, networks: dict[str, nn.Module]) -> None:
    stage = recipe.stages[made_by]
    assert isinstance(stage, Pretrain)
    if wanted not in networks:
        has = ", ".join(sorted(networks))
        asked = "'pretrained_decoder'" if wanted == "decoder" else f"{wanted!r}"
        raise UserError(
            f"{where}: {asked} is not valid: {stage.method.name} of stages.{made_by} hands on no {wanted}{f' but {has}' if has else ''}; "
            f"valid: {'pretrained, scratch' if wanted == 'decoder' else 'encoder'}"
        )


def _check_formats(where: str, stage: Export, encoder: Encoder) -> None:
    """Formats that are asked for by name must be there for this encoder."""
    reasons = {format: lacks(encoder, format) for format in stage.formats or ()}
    for format, reason in reasons.items():
        if reason:
            valid = [name for name in FORMATS if not (reasons[name] if name in reasons else lacks(encoder, name))]
            raise UserError(f"{where}.formats: {format!r} is not valid: {reason}; valid: {', '.join(valid)}")


def _check_method(where: str, stage: Pretrain, recipe: Recipe, encoder: Encoder, classes: int) -> dict[str, nn.Module]:
    """What batches hold against what the method needs; then the method itself, built once over a small table: what it hands on."""
    cls, parameters = METHODS[stage.method.name], arguments(stage.method)
    needs, labelled = cls.needs(**parameters), stage.labelled_per_batch
    if labelled > stage.batch_size:
        raise UserError(
            f"{where}.labelled_per_batch: {labelled} is more than batch_size: {stage.batch_size}; valid: 0 to {stage.batch_size}"
        )
    if needs.labels and not labelled:
        raise UserError(
            f"{where}.labelled_per_batch: 0 is not valid: the method, as it is set, learns from labels; valid: 1 to {stage.batch_size}"
        )
    if labelled and not needs.labels:
        raise UserError(
            f"{where}.labelled_per_batch: {labelled} is not valid: the method, as it is set, looks at no label; valid: 0"
        )
    if labelled and not classes:
        raise UserError(
            f"{where}.labelled_per_batch: {labelled} is not valid: dataset.name {recipe.dataset.name!r} has no labels; valid: 0"
        )
    for key, value in stage.labels_given.items() if not labelled else ():
        raise UserError(f"{where}.{key}: {value!r} is not valid without labelled_per_batch; valid: null")
    if stage.first_view == "plain" and needs.views == 1:
        raise UserError(
            f"{where}.first_view: 'plain' is not valid: the method, as it is set, takes one view; valid: augmented"
        )
    try:
        return small(stage, encoder, classes).handed_on()
    except ValueError as error:
        raise UserError(str(error) if str(error).startswith("encoder.") else f"{where}.method.{error}") from None


def small(stage: Pretrain, encoder: Encoder, classes: int) -> Method:
    """The method over a small table.

    Raises:
        ValueError: its settings do not go with the encoder.
    """
    setting = Setting(1024, stage.epochs, 0, classes, torch.full((1024,), -1))
    return METHODS[stage.method.name](encoder, setting, **arguments(stage.method))


def _check_storage(storage: Path) -> None:
    probe = storage / f".write-{uuid.uuid4().hex[:8]}"
    try:
        storage.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"storage: {str(storage)!r} cannot be written: {os.strerror(error.errno or 0)}; valid: a folder you may write to"
        ) from None
