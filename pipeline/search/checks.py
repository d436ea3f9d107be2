"""A search against its recipe: keys that can be searched, measures that there are, and every end of the space."""

from pathlib import Path

from firstlight.pipeline.config.recipe import Pretrain, Recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.search import space
from firstlight.pipeline.search.objectives import check_measure, is_logged
from firstlight.pipeline.search.space import Pbt, Plan

SEARCHED = ("stages", "encoder", "stream", "dataset")  # sections of a recipe that settings can be searched in
PASSED_ON = (
    "optimizer",
    "schedule",
    "method",
    "augment",
    "clip_norm",
)  # of a pretraining, what can change in its middle
OF_DATASET = (
    "max_train",
    "image_size",
    "train_augment",
    "eval_augment",
)  # the rest would change what is held out, or the images themselves


def read(path: Path, overrides: tuple[str, ...] = ()) -> Plan:
    """Read and check a search file, and every end of its space against the recipe.

    Raises:
        UserError: one line per mistake, each naming the dotted key, the value and what would be valid.
    """
    plan = space.read(path, overrides)
    _check(plan)
    return plan


def _check(plan: Plan) -> None:
    search = plan.search
    for key in (*search.space, *search.overrides):
        if not all(key.split(".")):
            raise UserError(f"space.{key}: is no dotted key; valid: e.g. stages.pretrain.optimizer.lr")
    given = [override.partition("=")[0] for override in plan.overrides]
    for key in search.space:
        first, *rest = key.split(".")
        if first not in SEARCHED or (first == "dataset" and (not rest or rest[0] not in OF_DATASET)):
            raise UserError(
                f"space.{key}: cannot be searched; valid: keys of stages, encoder, stream, and dataset.{', dataset.'.join(OF_DATASET)}"
            )
        for fixed in (*search.overrides, *given, *(other for other in search.space if other != key)):
            if fixed == key or key.startswith(f"{fixed}.") or fixed.startswith(f"{key}."):
                raise UserError(
                    f"space.{key}: is searched, and {fixed!r} sets it at the same time; valid: one of the two"
                )
    base = plan.base()
    _check_objectives(plan, base)
    for values in plan.corners():
        try:
            plan.trial(values)
        except UserError as error:
            raise UserError(plan.told(str(error), values)) from None


def _check_objectives(plan: Plan, base: Recipe) -> None:
    search = plan.search
    for k, objective in enumerate(search.objectives):
        check_measure(objective.measure, f"objectives.{k}.measure", base)
    if search.deciding:
        measure, where = search.deciding[0], "scheduler.measure"
        check_measure(measure, where, base)
        if not is_logged(measure, base):
            raise UserError(
                f"{where}: {measure!r} is known only at the end of a trial; valid: a number that a pretrain stage logs on the way"
            )
    if isinstance(search.scheduler, Pbt):
        _check_population(plan, search.scheduler, base)
    used = plan.stages(base)
    for key in search.space:
        first, *rest = key.split(".")
        if first == "stages" and rest and rest[0] in base.stages and rest[0] not in used:
            raise UserError(f"space.{key}: changes no objective: a trial runs the stages {', '.join(used)} only")
    if search.promote and plan.maker(base) is None:
        raise UserError("promote: no stage of a trial makes the encoder that the first objective judges; valid: null")


def _check_population(plan: Plan, scheduler: Pbt, base: Recipe) -> None:
    """Of settings that change while a network trains: those that the rest of its training can be made with."""
    assert plan.search.deciding is not None
    name = plan.search.deciding[0].partition(".")[0]
    stage = base.stages[name]
    assert isinstance(stage, Pretrain)
    for key in plan.search.space:
        valid = [f"stages.{name}.{part}" for part in PASSED_ON]
        if not any(key == start or key.startswith(f"{start}.") for start in valid) or key.endswith(".name"):
            raise UserError(
                f"space.{key}: cannot change in the middle of a training, as scheduler: pbt has it; valid: keys of {', '.join(valid)}"
            )
    if len(base.seeds) > 1:
        raise UserError(
            f"seeds: {list(base.seeds)}: scheduler: pbt trains a network a trial; valid: one seed, e.g. in overrides"
        )
    if scheduler.interval >= stage.epochs:
        raise UserError(
            f"scheduler.interval: {scheduler.interval} is not valid: stages.{name} trains {stage.epochs} epochs; valid: fewer than that"
        )
    if plan.search.deciding[0].partition(".")[2].startswith("watch_") and scheduler.interval % stage.watch.every:
        raise UserError(
            f"scheduler.interval: {scheduler.interval} is not valid: {plan.search.deciding[0]} is known every {stage.watch.every} epochs "
            f"(stages.{name}.watch.every); valid: a multiple of that"
        )
    if stage.schedule is not None and stage.schedule.name == "ReduceLROnPlateau":
        raise UserError(
            f"stages.{name}.schedule.name: 'ReduceLROnPlateau' is not valid with scheduler: pbt: it follows the losses of one network"
        )
