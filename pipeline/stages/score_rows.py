"""The rows of the table at the end of a run, from the measures of the stages and the results of their instances."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from firstlight.pipeline.config.measures import GIVEN_ARM, WEIGHTS_TITLES, Measure, is_pretrained_arm
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.schemas.paper_results import ExpectedResult
from firstlight.pipeline.config.stages import StageConfig
from firstlight.pipeline.stages.registry import stage_kind
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.stages.verdicts import Verdict, judge_gains

# The words of the table for an arm, after the name of the measure; other arms are called by their names.
ARM_LABELS = {"pretrained": "", "pretrained_decoder": "with the decoder", "scratch": "from scratch"}


@dataclass(frozen=True)
class ScoreRow:
    """Test scores (0..1) of one measure, by seed; NaN where the test images gave none.

    `measure` names the row, and is another for each row of a stage. `pretrained` are the scores of `arm`, and
    `against` names the baseline; it is "", and `baseline` is (), where there is none. `key` and `arm` are what a
    recipe's `expected` calls the row.
    `scale` is the factor between a score and its displayed value. `verdict` is None where there is no baseline.
    """

    stage: str
    measure: str
    against: str
    pretrained: tuple[float, ...]
    baseline: tuple[float, ...]
    key: str = ""
    arm: str = "pretrained"
    scale: float = 100.0
    verdict: Verdict | None = None
    # The arm that is the baseline; "" where there is none.
    baseline_arm: str = ""
    # True if the baseline is the given weights, and the measure has another baseline besides: its last arm.
    is_beside: bool = False
    # The name of the measure in tables, whatever is compared.
    label: str = ""

    @property
    def is_scored(self) -> bool:
        """False if the test images gave no score, for some seed: then there is no number to compare."""
        return bool(np.isfinite([*self.pretrained, *self.baseline]).all())

    @property
    def mean(self) -> float:
        return self.scale * float(np.mean(self.pretrained))

    @property
    def gain(self) -> np.ndarray:
        """The (seeds,) differences from the baseline, in percent."""
        return np.asarray(100 * (np.asarray(self.pretrained) - np.asarray(self.baseline)))

    @property
    def continues_given(self) -> bool:
        """True for a row that compares a pretrained arm with the given weights that it may have started from."""
        return self.baseline_arm == GIVEN_ARM and is_pretrained_arm(self.arm)


def score_rows(recipe: Recipe, instances: Sequence[StageInstance]) -> list[ScoreRow]:
    """Returns the rows of all finished `instances`, in the order of the recipe's stages, with their verdicts.

    There are none where the test split is left alone.
    """
    out: list[ScoreRow] = []
    for name, stage in recipe.stages.items() if recipe.score_test else ():
        finished = [instance for instance in instances if instance.stage == name and instance.result is not None]
        expected = [row for row in recipe.expected if row.stage == name]
        for measure in _shown_measures(stage, expected) if finished else ():
            out += _measure_rows(name, stage, measure, finished, expected)
    return judge_rows(out)


def judge_rows(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Returns the rows of a table with a verdict on each one that has a baseline."""
    verdicts = iter(judge_gains([row.gain for row in rows if row.baseline]))
    return [replace(row, verdict=next(verdicts)) if row.baseline else row for row in rows]


def _shown_measures(stage: StageConfig, expected: Sequence[ExpectedResult]) -> list[Measure]:
    """Returns the measures that the table shows; those that are shown only if the recipe expects them stand in its
    order.
    """
    wanted = {measure.name: measure for measure in stage.measures if measure.only_if_expected}
    always = [measure for measure in stage.measures if not measure.only_if_expected]
    return [*always, *(wanted[row.measure] for row in expected if row.measure in wanted)]


def _measure_rows(
    name: str,
    stage: StageConfig,
    measure: Measure,
    finished: Sequence[StageInstance],
    expected: Sequence[ExpectedResult],
) -> list[ScoreRow]:
    """Returns a row for every pair of arms; for the last arm too, if it is alone or the recipe expects its number."""
    kind, last = stage_kind(stage), measure.arms[-1]
    values = {
        arm: [kind.read_score(stage, measure, arm, "test", instance) for instance in finished] for arm in measure.arms
    }
    scores = {arm: tuple(value for value in found if value is not None) for arm, found in values.items()}
    result = finished[0].result
    assert result is not None
    label = kind.label_measure(stage, measure, result)
    rows = []
    for arm, baseline in measure.pairs:
        title = WEIGHTS_TITLES.get(baseline, baseline)
        row = ScoreRow(
            name,
            _with_arm(label, arm) if baseline == last else f"{_with_arm(label, arm)}, against {baseline}",
            (measure.baseline_label or title) if baseline == last else title,
            *(scores[arm], scores[baseline], measure.name, arm, measure.scale),
            baseline_arm=baseline,
            is_beside=baseline != last,
            label=label,
        )
        rows.append(row)
    if len(measure.arms) == 1 or any((row.arm, row.measure) == (last, measure.name) for row in expected):
        own = label if measure.only_if_expected else f"{label}, {ARM_LABELS.get(last) or last}"
        rows.append(ScoreRow(name, own, "", scores[last], (), measure.name, last, measure.scale, label=label))
    return [row for row in rows if row.pretrained]


def _with_arm(label: str, arm: str) -> str:
    how = ARM_LABELS.get(arm, arm)
    return f"{label}, {how}" if how else label
