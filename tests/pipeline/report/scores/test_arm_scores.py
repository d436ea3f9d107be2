"""The scores of a table by measure and arm."""

from pathlib import Path

from firstlight.pipeline.report.scores.arm_scores import (
    arm_columns,
    describe_comparison,
    group_by_measure,
    has_arm_columns,
)
from firstlight.pipeline.stages.score_rows import ScoreRow, score_rows
from tests.support import recipes
from tests.support.stage_results import ARM_SCORES, evaluated, finish_arms, finished, with_given


def test_each_measure_has_the_scores_of_its_arms_in_order(tmp_path: Path) -> None:
    arms = ["pretrained", "pretrained_decoder", "given", "scratch"]
    recipe = with_given(tmp_path, stages__finetune__arms=arms)
    scores = {**ARM_SCORES, "pretrained_decoder": (0.5, 0.7, 0.6)}
    rows = score_rows(recipe, finish_arms(tmp_path, "finetune", scores))
    (found,) = group_by_measure(rows)
    assert (found.stage, found.label, list(found.arms)) == ("finetune", "classify, 40 labels", arms)
    assert found.arms == {arm: scores[arm] for arm in arms}
    assert [describe_comparison(row) for row in rows] == [
        "pretrained against given",
        "pretrained against scratch",
        "pretrained with the decoder against given",
        "pretrained with the decoder against scratch",
        "given against scratch",
    ]


def test_fresh_weights_share_the_last_column(tmp_path: Path) -> None:
    rows = score_rows(with_given(tmp_path), finish_arms(tmp_path, "finetune") + finish_arms(tmp_path, "evaluate"))
    assert has_arm_columns(rows)
    assert arm_columns(rows) == [
        ("pretrained", ("pretrained",)),
        ("given", ("given",)),
        ("random or scratch", ("random", "scratch")),
    ]
    assert arm_columns([row for row in rows if row.stage == "finetune"])[-1] == ("scratch", ("scratch",))


def test_two_arms_need_no_column_each(tmp_path: Path) -> None:
    plain = score_rows(recipes.recipe(tmp_path), [finished(tmp_path, "evaluate", 0, evaluated(0.0))])
    assert not has_arm_columns(plain)
    stages = {"finetune": recipes.RECIPE["stages"]["finetune"]}
    assert not has_arm_columns(score_rows(with_given(tmp_path, stages=stages), finish_arms(tmp_path, "finetune")))


def test_arms_without_given_weights_need_no_column_each(tmp_path: Path) -> None:
    several = recipes.recipe(tmp_path, stages__finetune__arms=["pretrained", "pretrained_decoder", "scratch"])
    rows = score_rows(several, finish_arms(tmp_path, "finetune", {**ARM_SCORES, "pretrained_decoder": (0.5, 0.7, 0.6)}))
    assert {row.arm for row in rows} == {"pretrained", "pretrained_decoder"}
    assert not has_arm_columns(rows)


def test_a_number_without_a_baseline_is_the_score_of_its_arm() -> None:
    (found,) = group_by_measure([ScoreRow("pretrain", "own classifier", "", (0.5,), (), "accuracy")])
    assert found.arms == {"pretrained": (0.5,)}
