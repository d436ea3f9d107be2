"""Main scores of a run in one line, from what the stages log in MLflow."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from firstlight.pipeline.tracking.lineage import Run

SCORE_KEY = re.compile(r"^(?:pretrained|random)/(knn|probe)(?:_layer(-?\d+))?_test$")
MEASURE_NAMES = {"knn": "kNN", "probe": "probe"}
RANDOM_ARM = "random"


@dataclass(frozen=True)
class RunScore:
    """A value and that of its baseline, if any; both are multiplied by `scale` for display."""

    value: float
    baseline_value: float | None = None
    baseline_name: str = ""
    scale: float = 100.0
    unit: str = " %"


def find_scores(run: Run) -> dict[str, RunScore]:
    """Returns the scores of a stage's run by measure; those of test images if the stage logs any."""
    readers = {
        "pretrain": _pretraining_scores,
        "evaluate": _evaluation_scores,
        "finetune": _finetuning_scores,
        "retrieve": _retrieval_scores,
    }
    return readers[run.kind](run) if run.kind in readers else {}


def _pretraining_scores(run: Run) -> dict[str, RunScore]:
    found = {"loss": RunScore(run.metrics["loss"], scale=1.0, unit="")} if "loss" in run.metrics else {}
    for key, label in (("own_classifier/test", "own classifier"), ("watch_knn", "held-out kNN")):
        if key in run.metrics:
            found[label] = RunScore(run.metrics[key])
    return found


def _evaluation_scores(run: Run) -> dict[str, RunScore]:
    found = {}
    for key in run.metrics:
        match = SCORE_KEY.match(key)
        if match and key.startswith("pretrained/"):
            label = MEASURE_NAMES[match[1]] + (f" layer {match[2]}" if match[2] else "")
            found[label] = _against_random(run, key.partition("/")[2])
    return found


def _retrieval_scores(run: Run) -> dict[str, RunScore]:
    key = "mean_average_precision"
    return {"mAP": _against_random(run, key)} if f"pretrained/{key}" in run.metrics else {}


def _against_random(run: Run, key: str) -> RunScore:
    """Returns a score of the pretrained encoder, with that of random weights as its baseline."""
    return RunScore(run.metrics[f"pretrained/{key}"], run.metrics.get(f"{RANDOM_ARM}/{key}"), RANDOM_ARM)


def _finetuning_scores(run: Run) -> dict[str, RunScore]:
    """Returns the score of every arm but the last, with the last as the baseline; a single arm has no baseline."""
    arms = [arm for arm in re.findall(r"\w+", run.params.get("stage.arms", "")) if f"{arm}/test" in run.metrics]
    task = run.params.get("stage.task.name", "test")
    if not arms:
        return {}
    *compared, last = arms
    if not compared:
        return {f"{task}, {last}": RunScore(run.metrics[f"{last}/test"])}
    return {
        task if arm == "pretrained" else f"{task}, {arm}": RunScore(
            run.metrics[f"{arm}/test"], run.metrics[f"{last}/test"], last
        )
        for arm in compared
    }


def format_scores(runs: Sequence[Run]) -> str:
    """Returns the scores of a stage's seeds in one line: the mean, and the standard deviation of several seeds."""
    scores = [find_scores(run) for run in runs]
    return ", ".join(
        f"{label} {_format_mean([one[label] for one in scores if label in one])}"
        for label in (scores[0] if scores else ())
    )


def _format_mean(scores: Sequence[RunScore]) -> str:
    first = scores[0]
    digits = 1 if first.unit else 3
    values = [score.value for score in scores]
    baselines = [score.baseline_value for score in scores if score.baseline_value is not None]
    deviation = f" ± {first.scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    baseline = f" ({first.baseline_name} {first.scale * np.mean(baselines):.{digits}f})" if baselines else ""
    return f"{first.scale * np.mean(values):.{digits}f}{deviation}{first.unit}{baseline}"


def format_image_counts(metrics: Mapping[str, float]) -> str:
    """Returns the number of images of each split of a prepare run, and how many are quarantined."""
    counts = {key.removeprefix("images_"): int(value) for key, value in metrics.items() if key.startswith("images_")}
    order = sorted(counts, key=lambda split: (split != "train", split))
    quarantined = int(metrics.get("quarantined", 0))
    excluded = [f"{quarantined:,} quarantined"] if quarantined else []
    return ", ".join([*(f"{split} {counts[split]:,}" for split in order), *excluded])
