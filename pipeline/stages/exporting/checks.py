"""Checks of the formats that a recipe names, before anything starts."""

import copy
from collections.abc import Callable
from typing import Any

from firstlight.pipeline.config.schema import constructor_arguments
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.stages.sections.export import Export
from firstlight.pipeline.stages.stage_kind import RecipeContext
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.downstream.starting_weights import fold_encoder
from firstlight.tasks.downstream.task import Task
from firstlight.tasks.nn.export_formats import EXPORT_FORMATS


def check_formats(where: str, stage: Export, explain: Callable[[str], str | None]) -> None:
    """Checks that the formats that a recipe names exist. `explain`: gives the reason why one does not."""
    reasons = {format: explain(format) for format in stage.formats or ()}
    for format, reason in reasons.items():
        if reason:
            valid = [name for name in EXPORT_FORMATS if not (reasons[name] if name in reasons else explain(name))]
            raise UserError(f"{where}.formats: {format!r} is not valid: {reason}; valid: {', '.join(valid)}")


def build_made_task(context: RecipeContext, made: Any) -> tuple[Task, bool]:
    """Returns the task that a stage `made` of the recipe will train, and True if its views have padding."""
    encoder = copy.deepcopy(context.encoder)
    if made.batch_norm == "fold":
        fold_encoder(encoder)
    task = TASKS[made.task.name](encoder, len(context.source.classes), **constructor_arguments(made.task))
    return task, any(op.op == "fit" for op in context.recipe.dataset.eval_augment)
