"""What a search judges its trials by: a measure on held-out data, or a number that a pretraining logs.

evaluate.knn, evaluate.probe, evaluate.knn_layer2     of the frozen features
evaluate.rankme, uniformity, feature_std              of the same, without labels
finetune, finetune.scratch                            the task's measure, of the first arm or of another
retrieve.precision@5, .mean_average_precision
pretrain.watch_knn, .watch_rankme, .loss, ...         the last value of a number that it logs
pretrain.accuracy                                     of the classifier that a method learns from labels
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from firstlight.pipeline.config.recipe import Evaluate, Finetune, Pretrain, Recipe, Retrieve, Strict
from firstlight.pipeline.errors import StopTraining, UserError, suggest_valid
from firstlight.pipeline.stages.pretrain import needs
from firstlight.pipeline.stages.stage import Instance
from firstlight.pipeline.train.metrics import METRICS, read_metrics

SIGNALS = ("rankme", "uniformity", "feature_std", "dead_dimensions")
WATCHED = (*(f"watch_{name}" for name in SIGNALS), "watch_knn", "watch_alignment")


class Objective(Strict):
    """`measure`: <stage> or <stage>.<name>."""

    measure: str = Field(pattern=r"^[\w-]+(\.[\w@-]+)?$")
    mode: Literal["max", "min"] = "max"

    @property
    def sign(self) -> int:
        """Times this, larger is better."""
        return 1 if self.mode == "max" else -1


def measures(stage: Any) -> tuple[str, ...]:
    """The names of what a stage measures; of what a pretraining logs, those that are known before it is run."""
    if isinstance(stage, Evaluate):
        return tuple(f"{name}{ending}" for ending in stage.endings for name in ("knn", "probe", *SIGNALS))
    if isinstance(stage, Finetune):
        return stage.arms
    if isinstance(stage, Retrieve):
        return (*(f"precision@{k}" for k in stage.precision_at), "mean_average_precision")
    if isinstance(stage, Pretrain):
        return ("loss", *(("accuracy",) if needs(stage).labels else ()), *(WATCHED if stage.watch.every else ()))
    return ()


def check_measure(measure: str, where: str, recipe: Recipe) -> None:
    """There must be such a stage, and it must measure that.

    Raises:
        UserError: names the key, and what there is.
    """
    name, _, what = measure.partition(".")
    if name not in recipe.stages:
        raise UserError(f"{where}: {measure!r}: the recipe has no stage {name!r}; {suggest_valid(name, recipe.stages)}")
    stage = recipe.stages[name]
    has = tuple(f"{name}.{one}" for one in measures(stage))
    if not has:
        raise UserError(
            f"{where}: {measure!r}: a stage of kind {stage.kind} measures nothing; valid: evaluate, finetune, retrieve, pretrain"
        )
    if what.startswith("watch_") and isinstance(stage, Pretrain) and not stage.watch.every:
        raise UserError(
            f"{where}: {measure!r} is not logged: stages.{name}.watch.every is 0; valid: 1 or more, e.g. in overrides"
        )
    free = (
        isinstance(stage, Pretrain) and what and not what.startswith("watch_")
    )  # terms of a method's loss: known when it runs
    if measure not in has and not free and not (isinstance(stage, Finetune) and not what):
        raise UserError(f"{where}: {measure!r} is not measured; {suggest_valid(measure, has)}")


def is_logged(measure: str, recipe: Recipe) -> bool:
    """Whether its values come on the way, as rows of a pretraining."""
    name, _, what = measure.partition(".")
    stage = recipe.stages[name]
    return isinstance(stage, Pretrain) and not (what == "accuracy" and needs(stage).labels)


def by_seed(measure: str, recipe: Recipe, instances: Sequence[Instance]) -> list[float]:
    """What the finished instances of a stage have found, in the order of the recipe's seeds.

    Raises:
        StopTraining: a pretraining has not logged it; names what there is.
    """
    name, _, what = measure.partition(".")
    mine = [instance for instance in instances if instance.stage == name]
    return [_value(recipe.stages[name], what, instance) for instance in mine]


def _value(stage: Any, what: str, instance: Instance) -> float:
    result = instance.result
    assert result is not None
    if isinstance(stage, Evaluate):
        ending = next((e for e in stage.endings if e and what.endswith(e)), "")
        base = what.removesuffix(ending)
        found = result["pretrained"]
        return float(found[f"signals{ending}"][base] if base in SIGNALS else found[what]["val"])
    if isinstance(stage, Finetune):
        return float(result[what or stage.arms[0]]["val"])
    if isinstance(stage, Retrieve):
        name, _, k = what.partition("@")
        return float(result["pretrained"]["precision"][k] if k else result["pretrained"][name])
    if what == "accuracy" and needs(stage).labels:
        return float(result["accuracy"]["val"])
    return _logged(what, instance)


def _logged(what: str, instance: Instance) -> float:
    rows = read_metrics(instance.folder / METRICS)
    found = [row[what] for row in rows if what in row]
    if not found:
        skip = ("step", "of", "epoch", "time", "images_per_s", "data_wait", "lr")
        raise StopTraining(
            f"{instance.stage}.{what}: is not logged; {suggest_valid(what, {key for row in rows for key in row if key not in skip})}"
        )
    return float(found[-1])
