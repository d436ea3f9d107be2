"""The scores of a table by measure and arm, for tables and figures that have a place for each arm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from firstlight.pipeline.config.measures import GIVEN_ARM
from firstlight.pipeline.stages.score_rows import ScoreRow

# The arms of fresh weights, of frozen features and of fine-tunings: they share a column.
FRESH_ARMS = ("random", "scratch")
# The names of arms in tables; others have their own names.
ARM_WORDS = {"pretrained_decoder": "pretrained with the decoder"}


@dataclass(frozen=True)
class ArmScores:
    """The test scores of one measure of a stage, by arm and seed. `label` is what tables call the measure."""

    stage: str
    label: str
    scale: float
    arms: Mapping[str, tuple[float, ...]]


def group_by_measure(rows: Sequence[ScoreRow]) -> list[ArmScores]:
    """Returns the scores of each measure of a table, with its arms in order."""
    groups: dict[tuple[str, str, str], list[ScoreRow]] = {}
    for row in rows:
        groups.setdefault((row.stage, row.key, row.label or row.measure), []).append(row)
    found = []
    for (stage, _, label), group in groups.items():
        arms = {row.arm: row.pretrained for row in group if row.baseline}
        arms |= {row.baseline_arm: row.baseline for row in group if row.baseline and row.baseline_arm not in arms}
        arms |= {row.arm: row.pretrained for row in group if not row.baseline}
        found.append(ArmScores(stage, label, group[0].scale, arms))
    return found


def has_arm_columns(rows: Sequence[ScoreRow]) -> bool:
    """Returns True if the table has a column for each arm, as given weights stand beside pretrained ones."""
    arms = {row.arm for row in rows if row.baseline}
    return GIVEN_ARM in arms and len(arms) > 1


def describe_comparison(row: ScoreRow) -> str:
    """Returns the two arms of a row in words, such as `pretrained against given`."""
    arms = [ARM_WORDS.get(arm, arm) for arm in (row.arm, row.baseline_arm) if arm]
    return " against ".join(arms)


def arm_columns(rows: Sequence[ScoreRow]) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the columns of a table with one for each arm: the heading, and the arms that it has. Fresh weights are
    the last.
    """
    arms = dict.fromkeys(arm for scores in group_by_measure(rows) for arm in scores.arms)
    fresh = tuple(arm for arm in FRESH_ARMS if arm in arms)
    columns = [(ARM_WORDS.get(arm, arm), (arm,)) for arm in arms if arm not in fresh]
    return [*columns, *([(" or ".join(fresh), fresh)] if fresh else [])]
