"""The numbers of a recipe's run in MLflow: the scores of its table by seed, and the gains over the baselines."""

import math
from collections.abc import Sequence

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.report.score_table import gain_metrics
from firstlight.pipeline.stages.score_rows import ScoreRow
from firstlight.pipeline.tracking.metric_keys import sanitize_metric_key


def list_summary_metrics(recipe: Recipe, rows: Sequence[ScoreRow]) -> dict[str, float]:
    """Returns the numbers of a table by key: `<stage>/<measure>/<arm>/seed<seed>`, and gains beside the seeds.

    Stages, measures and arms are called as in the recipe, not as in the table. Scores that do not exist are left out.
    Gains over given weights, where there is another baseline too, are below `against_given`.
    """
    found: dict[str, float] = {}
    for row in rows:
        own, baseline = (_make_prefix(row, arm) for arm in (row.arm, _find_baseline_arm(recipe, row)))
        for prefix, scores in ((own, row.pretrained), (baseline, row.baseline)):
            by_seed = zip(recipe.seeds, scores, strict=True) if scores else ()
            found |= {f"{prefix}/seed{seed}": score for seed, score in by_seed if math.isfinite(score)}
        if row.baseline:
            gained = f"{own}/against_{row.baseline_arm}" if row.is_beside else own
            found |= {f"{gained}/{name}": value for name, value in gain_metrics(row).items()}
    return found


def _make_prefix(row: ScoreRow, arm: str) -> str:
    return sanitize_metric_key(f"{row.stage}/{row.key}/{arm}")


def _find_baseline_arm(recipe: Recipe, row: ScoreRow) -> str:
    """Returns the arm that a row is compared with: the last one of its measure, if it does not say so itself."""
    return row.baseline_arm or next(
        measure.arms[-1] for measure in recipe.stages[row.stage].measures if measure.name == row.key
    )
