"""The few numbers by which a run is told from others, from what the stages log in MLflow."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from firstlight.pipeline.tracking.lineage import Run

LOOKS = re.compile(r"^(?:pretrained|random)/(knn|probe)(?:_layer(-?\d+))?_test$")
NAMES = {"knn": "kNN", "probe": "probe"}
RANDOM = "random"


@dataclass(frozen=True)
class Score:
    """A value, shown times `scale`, and that of the baseline beside it."""

    value: float
    against: float | None = None
    baseline: str = ""
    scale: float = 100.0
    unit: str = " %"


def scores(run: Run) -> dict[str, Score]:
    """By what they measure; on test images where the stage looks at some."""
    found: dict[str, Score] = {
        "pretrain": _of_pretraining,
        "evaluate": _of_evaluation,
        "finetune": _of_tuning,
        "retrieve": _of_retrieval,
    }.get(run.kind, _of_nothing)(run)
    return found


def _of_nothing(run: Run) -> dict[str, Score]:
    return {}


def _of_pretraining(run: Run) -> dict[str, Score]:
    told = {"loss": Score(run.metrics["loss"], scale=1.0, unit="")} if "loss" in run.metrics else {}
    for key, text in (("own_classifier/test", "own classifier"), ("watch_knn", "held-out kNN")):
        if key in run.metrics:
            told[text] = Score(run.metrics[key])
    return told


def _of_evaluation(run: Run) -> dict[str, Score]:
    told = {}
    for key in run.metrics:
        match = LOOKS.match(key)
        if match and key.startswith("pretrained/"):
            text = NAMES[match[1]] + (f" layer {match[2]}" if match[2] else "")
            told[text] = Score(run.metrics[key], run.metrics.get(f"{RANDOM}/{key.partition('/')[2]}"), RANDOM)
    return told


def _of_retrieval(run: Run) -> dict[str, Score]:
    key = "mean_average_precision"
    if f"pretrained/{key}" not in run.metrics:
        return {}
    return {"mAP": Score(run.metrics[f"pretrained/{key}"], run.metrics.get(f"{RANDOM}/{key}"), RANDOM)}


def _of_tuning(run: Run) -> dict[str, Score]:
    """Every arm beside the last."""
    arms = [arm for arm in re.findall(r"\w+", run.params.get("stage.arms", "")) if f"{arm}/test" in run.metrics]
    task = run.params.get("stage.task.name", "test")
    if not arms:
        return {}
    *ours, last = arms
    if not ours:
        return {f"{task}, {last}": Score(run.metrics[f"{last}/test"])}
    return {
        task if arm == "pretrained" else f"{task}, {arm}": Score(
            run.metrics[f"{arm}/test"], run.metrics[f"{last}/test"], last
        )
        for arm in ours
    }


def told(runs: Sequence[Run]) -> str:
    """The scores of the seeds of a stage in one line: their mean, and the standard deviation where there are several."""
    each = [scores(run) for run in runs]
    return ", ".join(
        f"{label} {_mean([one[label] for one in each if label in one])}" for label in (each[0] if each else ())
    )


def _mean(values: Sequence[Score]) -> str:
    first = values[0]
    digits = 1 if first.unit else 3
    spread = f" ± {first.scale * np.std([v.value for v in values], ddof=1):.{digits}f}" if len(values) > 1 else ""
    against = [v.against for v in values if v.against is not None]
    beside = f" ({first.baseline} {first.scale * np.mean(against):.{digits}f})" if against else ""
    return f"{first.scale * np.mean([v.value for v in values]):.{digits}f}{spread}{first.unit}{beside}"


def images(metrics: Mapping[str, float]) -> str:
    """The counts of a prepare run."""
    counts = {key.removeprefix("images_"): int(value) for key, value in metrics.items() if key.startswith("images_")}
    order = sorted(counts, key=lambda split: (split != "train", split))
    bad = int(metrics.get("quarantined", 0))
    return ", ".join([*(f"{split} {counts[split]:,}" for split in order), *([f"{bad:,} quarantined"] if bad else [])])
