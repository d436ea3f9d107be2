"""Main scores of a run in one line, from what the stages log in MLflow."""

from collections.abc import Mapping, Sequence

import numpy as np

from firstlight.pipeline.config.measures import GIVEN_ARM
from firstlight.pipeline.report.publish.summaries import Score, summarise_run
from firstlight.pipeline.tracking.lineage import Run


def format_scores(runs: Sequence[Run]) -> str:
    """Returns the scores of a stage's seeds in one line: the mean, and the standard deviation of several seeds."""
    scores = [summarise_run(run) for run in runs]
    return ", ".join(
        f"{label} {_format_mean([one[label] for one in scores if label in one])}"
        for label in (scores[0] if scores else ())
    )


def _format_mean(scores: Sequence[Score]) -> str:
    first = scores[0]
    digits = 1 if first.unit else 3
    values = [score.value for score in scores]
    others = {
        GIVEN_ARM: [score.given_value for score in scores if score.given_value is not None],
        first.baseline_name: [score.baseline_value for score in scores if score.baseline_value is not None],
    }
    deviation = f" ± {first.scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    means = [f"{name} {first.scale * np.mean(found):.{digits}f}" for name, found in others.items() if found]
    compared = f" ({', '.join(means)})" if means else ""
    return f"{first.scale * np.mean(values):.{digits}f}{deviation}{first.unit}{compared}"


def format_image_counts(metrics: Mapping[str, float]) -> str:
    """Returns the number of images of each split of a prepare run, and how many are quarantined."""
    counts = {key.removeprefix("images_"): int(value) for key, value in metrics.items() if key.startswith("images_")}
    order = sorted(counts, key=lambda split: (split != "train", split))
    quarantined = int(metrics.get("quarantined", 0))
    excluded = [f"{quarantined:,} quarantined"] if quarantined else []
    return ", ".join([*(f"{split} {counts[split]:,}" for split in order), *excluded])
