"""Checks of a search before its first trial: against its recipe, the machine, and the images."""

from pathlib import Path

import torch

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import TrainingOptions
from firstlight.pipeline.data.mirror.places import find_mirror
from firstlight.pipeline.data.sources import Source, open_source
from firstlight.pipeline.data.splits import Splits, draw_splits
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run import data_checks, preflight
from firstlight.pipeline.run.nodes import Node
from firstlight.pipeline.run.ray_session import count_local_cpus
from firstlight.pipeline.search import pbt
from firstlight.pipeline.search.capacity import max_concurrent_trials
from firstlight.pipeline.search.objectives import check_measure, is_logged, parse_measure
from firstlight.pipeline.search.plan import SearchPlan, load_plan
from firstlight.pipeline.search.space import Pbt
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.tracking.loggers.registry import check_loggers

# Sections of a recipe whose settings can be searched.
SEARCHABLE_SECTIONS = ("stages", "encoder", "stream", "dataset")
# Keys of the dataset that can be searched. The others would change which images are held out, or the images.
SEARCHABLE_DATASET_KEYS = ("max_train", "image_size", "train_augment", "eval_augment")


def load_checked_plan(path: Path, overrides: tuple[str, ...] = ()) -> SearchPlan:
    """Reads a search file, and checks it against its recipe at every end of its space.

    Raises:
        UserError: one line for each mistake, which names the dotted key, the value and the valid values.
    """
    plan = load_plan(path, overrides)
    _check_keys(plan)
    recipe = plan.budget_recipe()
    _check_objectives(plan, recipe)
    if isinstance(plan.search.scheduler, Pbt):
        _check_population(plan, plan.search.scheduler, recipe)
    _check_stages(plan, recipe)
    for values in plan.corner_values():
        try:
            plan.trial_recipe(values)
        except UserError as error:
            raise UserError(plan.explain_error(str(error), values)) from None
    # Its lengths are of one unit.
    _ = plan.max_length
    return plan


def _check_keys(plan: SearchPlan) -> None:
    search = plan.search
    for key in (*search.space, *search.overrides):
        if not all(key.split(".")):
            raise UserError(f"space.{key}: is no dotted key; valid: e.g. stages.pretrain.optimizer.lr")
    overridden = [override.partition("=")[0] for override in plan.overrides]
    for key in search.space:
        section, *rest = key.split(".")
        in_dataset = section != "dataset" or (rest and rest[0] in SEARCHABLE_DATASET_KEYS)
        if section not in SEARCHABLE_SECTIONS or not in_dataset:
            raise UserError(
                f"space.{key}: cannot be searched; valid: keys of stages, encoder, stream, and "
                f"dataset.{', dataset.'.join(SEARCHABLE_DATASET_KEYS)}"
            )
        for fixed in (*search.overrides, *overridden, *(other for other in search.space if other != key)):
            if fixed == key or key.startswith(f"{fixed}.") or fixed.startswith(f"{key}."):
                raise UserError(
                    f"space.{key}: is searched, and {fixed!r} sets it at the same time; valid: one of the two"
                )


def _check_objectives(plan: SearchPlan, recipe: Recipe) -> None:
    search = plan.search
    for k, objective in enumerate(search.objectives):
        check_measure(objective.measure, f"objectives.{k}.measure", recipe)
    if search.scheduler_objective:
        measure, where = search.scheduler_objective[0], "scheduler.measure"
        check_measure(measure, where, recipe)
        training = recipe.stages[parse_measure(measure).stage]
        if not is_logged(measure, recipe) or not isinstance(training, TrainingOptions):
            raise UserError(
                f"{where}: {measure!r} is known only at the end of a trial; valid: a number that a pretrain stage logs "
                "during training"
            )


def _check_stages(plan: SearchPlan, recipe: Recipe) -> None:
    used = plan.trial_stages(recipe)
    for key in plan.search.space:
        section, *rest = key.split(".")
        if section == "stages" and rest and rest[0] in recipe.stages and rest[0] not in used:
            raise UserError(f"space.{key}: changes no objective: a trial runs the stages {', '.join(used)} only")
    if plan.search.promote and plan.encoder_stage(recipe) is None:
        raise UserError("promote: no stage of a trial makes the encoder that the first objective scores; valid: null")


def _check_population(plan: SearchPlan, scheduler: Pbt, recipe: Recipe) -> None:
    """Checks that the rest of a training can be made with other settings, as population-based training requires."""
    assert plan.search.scheduler_objective is not None
    measure = plan.search.scheduler_objective[0]
    name, number = parse_measure(measure)
    stage = recipe.stages[name]
    assert isinstance(stage, TrainingOptions), "a number is logged by a training"
    if not stage.changeable_keys:
        raise UserError(
            f"scheduler: pbt is not valid: no setting of stages.{name}, of kind {stage.kind}, can change in the middle "
            "of its training; valid: none, asha"
        )
    for key in plan.search.space:
        valid = [f"stages.{name}.{part}" for part in stage.changeable_keys]
        if not any(key == start or key.startswith(f"{start}.") for start in valid) or key.endswith(".name"):
            raise UserError(
                f"space.{key}: cannot change in the middle of a training, which scheduler: pbt requires; valid: keys "
                f"of {', '.join(valid)}"
            )
    if len(recipe.seeds) > 1:
        raise UserError(
            f"seeds: {list(recipe.seeds)}: scheduler: pbt trains one network for each trial; valid: one seed, e.g. in "
            "overrides"
        )
    where = f"scheduler.interval: {scheduler.interval} is not valid"
    if scheduler.interval >= stage.length.count:
        raise UserError(f"{where}: stages.{name} trains {stage.length}; valid: fewer than that")
    period = stage_kind(stage).find_measuring_period(stage, number)
    if period is not None and stage.length.unit == "epochs" and scheduler.interval % period.epochs:
        raise UserError(
            f"{where}: {measure} is known every {period.epochs} epochs (stages.{name}.{period.key}); valid: a multiple "
            "of that"
        )
    if stage.schedule is not None and stage.schedule.name == "ReduceLROnPlateau":
        raise UserError(
            f"stages.{name}.schedule.name: 'ReduceLROnPlateau' is not valid with scheduler: pbt: it depends on the "
            "losses of one network"
        )


def check_search(plan: SearchPlan, recipe: Recipe) -> Source:
    """Checks everything that can be known before Ray starts: the resources of one trial, and all ends of the space.

    Returns the source of the images.

    Raises:
        UserError: names the dotted key, the value and the valid values.
    """
    check_loggers(recipe.tracking.loggers)
    mirror = find_mirror(recipe.storage)
    if mirror is not None:
        raise UserError(
            f"storage: {mirror.uri!r} is not valid for a search: its trials and their processes follow each other by "
            "files; valid: a folder that all machines see"
        )
    scale = recipe.scale
    if scale.min_workers < scale.max_workers:
        raise UserError(
            f"scale.workers: {[scale.min_workers, scale.max_workers]} is not valid in a search: the trials that run at "
            "the same time are counted by their workers; valid: one number"
        )
    if scale.address == "local":
        max_concurrent_trials(scale, recipe.stream, [Node(count_local_cpus(scale), torch.cuda.device_count())])
    source = open_source(recipe.dataset)
    for values in plan.corner_values():
        try:
            preflight.check_recipe(plan.trial_recipe(values), source)
        except UserError as error:
            raise UserError(plan.explain_error(str(error), values)) from None
    pbt.check_networks(plan, 0 if source.annotations else len(source.classes))
    return source


def check_search_images(plan: SearchPlan, store: Store) -> None:
    """Checks every end of the space against the images in the store.

    Raises:
        UserError: as `data_checks.check_images`.
    """
    for values in plan.corner_values():
        recipe = plan.trial_recipe(values)
        splits = draw_splits(store, recipe.dataset, recipe.measured_splits)
        try:
            data_checks.check_images(recipe, splits)
        except UserError as error:
            raise UserError(plan.explain_error(str(error), values)) from None
        if isinstance(plan.search.scheduler, Pbt):
            _check_watched_steps(plan, plan.search.scheduler, recipe, splits)


def _check_watched_steps(plan: SearchPlan, scheduler: Pbt, recipe: Recipe, splits: Splits) -> None:
    """Checks that a feature metric, which is known at ends of epochs, is known where a training in steps pauses."""
    assert plan.search.scheduler_objective is not None
    measure = plan.search.scheduler_objective[0]
    name, number = parse_measure(measure)
    stage = recipe.stages[name]
    kind = stage_kind(stage)
    period, counted = kind.find_measuring_period(stage, number), kind.count_epoch_images(stage, splits, recipe.seeds[0])
    if period is None or counted is None or not isinstance(stage, TrainingOptions) or stage.length.unit == "epochs":
        return
    images, batch = counted
    every = period.epochs * (images // batch)
    if scheduler.interval % every:
        raise UserError(
            f"scheduler.interval: {scheduler.interval} is not valid: {measure} is known every {every} steps, "
            f"{period.epochs} epochs (stages.{name}.{period.key}); valid: a multiple of that"
        )
