"""The objectives of a search: scores on held-out images, or numbers that a pretraining logs.

evaluate.knn, evaluate.probe, evaluate.knn_layer2    accuracies of the frozen features
evaluate.rankme, uniformity, feature_std             numbers of the same features that need no labels
finetune, finetune.scratch                           the measure of the task, for the first arm or for another one
retrieve.precision@5, .mean_average_precision
reconstruct.psnr                                     of images with the stage's corruption, the same for all trials
pretrain.watch_knn, .watch_rankme, .loss, ...        the last value of a number that the pretraining logs
pretrain.accuracy                                    that of the classifier which a method learns from labels
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schemas.strict_model import StrictModel
from firstlight.pipeline.errors import StopTraining, UserError, suggest_valid
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance


class MeasureName(NamedTuple):
    """The name of a number that trials are compared by: its stage, and its name there, "" for the stage itself."""

    stage: str
    number: str


def parse_measure(measure: str) -> MeasureName:
    """Returns the parts of `<stage>.<name>`, or of `<stage>`."""
    stage, _, number = measure.partition(".")
    return MeasureName(stage, number)


class Objective(StrictModel):
    """A number on held-out data that trials are compared by."""

    measure: str = Field(
        pattern=r"^[\w-]+(\.[\w@-]+)?\z",
        description="<stage> or <stage>.<name>: the name of a stage, and of a number that it measures or logs.",
    )
    mode: Literal["max", "min"] = Field("max", description="Whether larger or smaller values are better.")

    @property
    def sign(self) -> int:
        """1 or -1: a value times this is larger if it is better."""
        return 1 if self.mode == "max" else -1


def check_measure(measure: str, where: str, recipe: Recipe) -> None:
    """Checks that the recipe has the stage of a measure, and that this stage measures it. `where`: its dotted key.

    Raises:
        UserError: names the key, the measure and the valid measures.
    """
    name, what = parse_measure(measure)
    if name not in recipe.stages:
        raise UserError(f"{where}: {measure!r}: the recipe has no stage {name!r}; {suggest_valid(name, recipe.stages)}")
    stage = recipe.stages[name]
    kind = stage_kind(stage)
    names = kind.objectives(stage)
    if not names:
        measuring = [other for other, its in recipe.stages.items() if stage_kind(its).objectives(its)]
        valid = f"a number of {', '.join(measuring)}" if measuring else "a recipe with a stage that measures something"
        raise UserError(f"{where}: {measure!r}: a stage of kind {stage.kind} measures nothing; valid: {valid}")
    if what not in names:
        kind.check_objective(where, stage, name, measure)


# The lowest and the highest value of a score.
ScoreRange = tuple[float, float]


def score_range(measure: str, recipe: Recipe) -> ScoreRange:
    """Returns the range of a measure's values: that of a share, or of all finite numbers."""
    name, what = parse_measure(measure)
    stage = recipe.stages[name]
    return (0.0, 1.0) if stage_kind(stage).is_share_objective(stage, what) else (-math.inf, math.inf)


def is_logged(measure: str, recipe: Recipe) -> bool:
    """Returns True if the measure is logged during a pretraining, and not only at its end."""
    name, what = parse_measure(measure)
    stage = recipe.stages[name]
    return stage_kind(stage).logs_objective(stage, what)


def read_scores(measure: str, recipe: Recipe, instances: Sequence[StageInstance]) -> list[float]:
    """Returns the scores of the finished instances of a measure's stage, in the order of the recipe's seeds.

    Raises:
        StopTraining: a pretraining has not logged the measure, and the message names what it has logged; or a score is
            not a finite number, by which no trial can be compared.
    """
    name, what = parse_measure(measure)
    stage = recipe.stages[name]
    kind = stage_kind(stage)
    scores = [kind.read_objective(stage, what, instance) for instance in instances if instance.stage == name]
    if not all(map(math.isfinite, scores)):
        raise StopTraining(f"{measure}: {', '.join(f'{score:g}' for score in scores)} is no score to compare trials by")
    return scores
