"""The scores that lists of runs show, read from what publishers have logged in MLflow. Needs no torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from firstlight.pipeline.config.measures import BANK_MEASURE, GIVEN_ARM, is_pretrained_arm
from firstlight.pipeline.tracking.lineage import Run

# The keys of the scores on test images: the measure, and the layer if it is not the deepest.
SCORE_KEY = re.compile(r"^(pretrained|given)/((knn_bank|knn|probe)(?:_layer(-?\d+))?_test)\Z")
SCORER_NAMES = {BANK_MEASURE: "kNN of the bank", "knn": "kNN", "probe": "probe"}
RANDOM_ARM = "random"


@dataclass(frozen=True)
class Score:
    """A value of a run and that of its baseline, if it has one; both are multiplied by `scale` for display.

    `given_value` is that of given weights, which stand between the two.
    """

    value: float
    baseline_value: float | None = None
    baseline_name: str = ""
    scale: float = 100.0
    unit: str = " %"
    given_value: float | None = None


def summarise_pretraining(run: Run) -> dict[str, Score]:
    """Returns the loss, and the accuracies of the own classifier and of kNN on held-out images."""
    scores = {"loss": Score(run.metrics["loss"], scale=1.0, unit="")} if "loss" in run.metrics else {}
    for key, label in (("own_classifier/test", "own classifier"), ("watch_knn", "held-out kNN")):
        if key in run.metrics:
            scores[label] = Score(run.metrics[key])
    return scores


def summarise_evaluation(run: Run) -> dict[str, Score]:
    """Returns the scores of each layer, of the pretrained or the given weights."""
    found = [match for key in run.metrics if (match := SCORE_KEY.match(key))]
    first = "pretrained" if any(match[1] == "pretrained" for match in found) else GIVEN_ARM
    scores: dict[str, Score] = {}
    for match in found:
        if match[1] == first:
            label = SCORER_NAMES[match[3]] + (f" layer {match[4]}" if match[4] else "")
            scores |= _compare_arms(run, match[1], label, match[2])
    return scores


def summarise_retrieval(run: Run) -> dict[str, Score]:
    """Returns the mean average precision of the pretrained or the given weights."""
    key = "mean_average_precision"
    arms = [arm for arm in ("pretrained", GIVEN_ARM) if f"{arm}/{key}" in run.metrics]
    return _compare_arms(run, arms[0], "mAP", key) if arms else {}


def _compare_arms(run: Run, arm: str, label: str, key: str) -> dict[str, Score]:
    """Returns the score of an arm, with that of random weights as its baseline, which have no memory bank."""
    given = run.metrics.get(f"{GIVEN_ARM}/{key}") if arm != GIVEN_ARM else None
    baseline = run.metrics.get(f"{RANDOM_ARM}/{key.replace(BANK_MEASURE, 'knn')}")
    name = f"{label}, {GIVEN_ARM}" if arm == GIVEN_ARM else label
    return {name: Score(run.metrics[f"{arm}/{key}"], baseline, RANDOM_ARM, given_value=given)}


def summarise_finetuning(run: Run) -> dict[str, Score]:
    """Returns the score of every arm but the last, with the last as the baseline; a single arm has no baseline.

    Given weights are a baseline too where there is a pretrained arm.
    """
    arms = [arm for arm in re.findall(r"\w+", run.params.get("stage.arms", "")) if f"{arm}/test" in run.metrics]
    task = run.params.get("stage.task.name", "test")
    if not arms:
        return {}
    *compared, last = arms
    if not compared:
        return {f"{task}, {last}": Score(run.metrics[f"{last}/test"])}
    continued = [arm for arm in compared if is_pretrained_arm(arm)] if GIVEN_ARM in compared else []
    return {
        task if arm == "pretrained" else f"{task}, {arm}": Score(
            run.metrics[f"{arm}/test"],
            run.metrics[f"{last}/test"],
            last,
            given_value=run.metrics[f"{GIVEN_ARM}/test"] if arm in continued else None,
        )
        for arm in compared
        if arm != GIVEN_ARM or not continued
    }


def summarise_reconstruction(run: Run) -> dict[str, Score]:
    """Returns the ratio on test images, or on held-out ones."""
    found = [run.metrics[key] for key in ("psnr_test", "psnr_val") if key in run.metrics]
    return {"PSNR": Score(found[0], scale=1.0, unit=" dB")} if found else {}


def summarise_measures(run: Run) -> dict[str, Score]:
    """Returns the scores that lists of runs show, by the name of their measure; of test images if there are any."""
    arms: dict[str, dict[str, float]] = {}
    for key, value in run.metrics.items():
        if match := re.fullmatch(r"([\w-]+)/(\w+)_test", key):
            arms.setdefault(match[2], {})[match[1]] = value
    scores = {}
    for measure, values in arms.items():
        value = values.pop("pretrained") if "pretrained" in values else values.popitem()[1]
        given = values.pop(GIVEN_ARM) if len(values) > 1 and GIVEN_ARM in values else None
        baseline = next(iter(values), "")
        scores[measure] = Score(value, values.get(baseline), baseline, given_value=given)
    return scores


# The functions by kind of stage; `summarise_measures` serves the others.
SUMMARIES: dict[str, Callable[[Run], dict[str, Score]]] = {
    "pretrain": summarise_pretraining,
    "evaluate": summarise_evaluation,
    "finetune": summarise_finetuning,
    "retrieve": summarise_retrieval,
    "reconstruct": summarise_reconstruction,
}


def summarise_run(run: Run) -> dict[str, Score]:
    """Returns the scores of a stage's run by the name of their measure; of test images if there are any."""
    return SUMMARIES.get(run.kind, summarise_measures)(run)
