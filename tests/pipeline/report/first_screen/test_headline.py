"""The headline says what the verdicts say, with the numbers of the largest and of the smallest gain."""

from pathlib import Path

import pytest

from firstlight.pipeline.config.measures import GIVEN_ARM
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.report.first_screen.headline import compose_headline, name_compared_measure
from firstlight.pipeline.stages.score_rows import ScoreRow
from tests.support import recipes
from tests.support.judged_rows import ALIKE, HIGH, WORSE, compared, judged, three_arms
from tests.support.stage_results import with_given


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipes.recipe(tmp_path, seeds=[0, 1, 2])


def test_one_measure_that_helps_has_all_its_numbers(recipe: Recipe) -> None:
    found = compose_headline(recipe, judged(compared(HIGH)))
    assert found.text == (
        "Pretraining helps in kNN (k=20): 81.0 % against 41.0 % with random weights, +40.0 points (95 % interval +37.5 "
        "to +42.5, 3 seeds)."
    )
    assert (found.tone, tuple(found.details)) == ("good", ())


def test_several_measures_have_the_largest_and_the_smallest_gain(recipe: Recipe) -> None:
    tuned = compared((0.50, 0.52, 0.51), label="classify, 40 labels", stage="finetune", against="scratch")
    found = compose_headline(recipe, judged(compared(HIGH), tuned))
    assert found.text.startswith("Pretraining helps in both measures, most in kNN (k=20): 81.0 % against 41.0 %")
    (least,) = found.details
    assert least.startswith("Least in classify, 40 labels: 51.0 % against 41.0 % from scratch, +10.0 points (95 %")


def test_headline_reports_a_loss_as_such(recipe: Recipe) -> None:
    slightly = compared((0.30, 0.32, 0.31), label="linear probe")
    found = compose_headline(recipe, judged(slightly, compared(WORSE)))
    assert found.text.startswith("Pretraining hurts in both measures, most in kNN (k=20): 21.0 % against 41.0 %")
    assert found.details[0].startswith("Least in linear probe")
    assert found.tone == "bad"


def test_undecided_measures_are_no_gain(recipe: Recipe) -> None:
    down = compared((0.40, 0.38, 0.43), label="linear probe")
    found = compose_headline(recipe, judged(compared(ALIKE), down))
    assert found.text.startswith(
        "Pretraining makes no clear difference in any of 2 measures; the largest gain is in kNN"
    )
    assert found.details[0].startswith("The largest loss is in linear probe: 40.3 % against 41.0 %")
    assert found.tone == "unsure"


def test_measures_that_disagree_are_counted_and_each_effect_has_its_numbers(recipe: Recipe) -> None:
    rows = judged(
        compared(HIGH),
        compared(HIGH, label="linear probe"),
        compared(WORSE, label="classify"),
        compared(ALIKE, label="x"),
    )
    found = compose_headline(recipe, rows)
    assert found.text.startswith("Pretraining helps in 2 of 4 measures, most in kNN (k=20): 81.0 %")
    hurts, none = found.details
    assert hurts.startswith("It hurts in 1 of 4 measures, most in classify: 21.0 %")
    assert none.startswith("It makes no clear difference in 1 of 4 measures; the largest gain is in x: 41.7 %")
    assert found.tone == "unsure"


def test_one_seed_has_numbers_and_no_verdict(recipe: Recipe) -> None:
    rows = judged(compared([0.5], [0.4]), compared([0.3], [0.4], label="linear probe"))
    found = compose_headline(recipe, rows)
    assert found.text == (
        "There is no verdict on pretraining (one seed); the largest gain is in kNN (k=20): 50.0 % against 40.0 % with "
        "random weights, +10.0 points."
    )
    assert found.details == (
        "The largest loss is in linear probe: 30.0 % against 40.0 % with random weights, -10.0 points.",
    )
    assert "helps" not in str(found)


def test_scores_that_are_missing_and_equal_gains_give_no_verdict(recipe: Recipe) -> None:
    nan = float("nan")
    assert compose_headline(recipe, judged(compared((nan, 0.5, 0.5)))).text == (
        "There is no verdict on pretraining (a score is missing)."
    )
    equal = compose_headline(recipe, judged(compared((0.5, 0.5, 0.5), (0.4, 0.4, 0.4)), compared(HIGH, label="probe")))
    assert equal.text.startswith("Pretraining helps in probe: 81.0 %")
    assert equal.details == ("There is no verdict in 1 measure more: equal gains.",)


def test_given_weights_that_are_as_good_come_before_the_gain_over_random_weights(tmp_path: Path) -> None:
    found = compose_headline(with_given(tmp_path), three_arms((0.81, 0.80, 0.82)))
    assert found.text.startswith("Continued pretraining makes no clear difference to the given weights in kNN (k=20):")
    given, pretrained = found.details
    assert given.startswith("The given weights help in kNN (k=20): 81.0 % against 41.0 % with random weights")
    assert pretrained.startswith("Pretraining helps in kNN (k=20)")
    assert found.tone == "unsure"


def test_given_weights_that_are_better_are_named_so(tmp_path: Path) -> None:
    found = compose_headline(with_given(tmp_path), three_arms((0.60, 0.62, 0.62)))
    assert found.text.startswith(
        "Continued pretraining is worse than the given weights in kNN (k=20): 61.3 % against 81.0 %"
    )
    better = compose_headline(with_given(tmp_path), three_arms((0.90, 0.92, 0.92)))
    assert better.text.startswith("Continued pretraining is better than the given weights in kNN (k=20): 91.3 %")
    assert (found.tone, better.tone) == ("bad", "good")


def test_given_weights_alone_are_the_subject(tmp_path: Path) -> None:
    found = compose_headline(with_given(tmp_path), judged(compared(HIGH, arm=GIVEN_ARM)))
    assert found.text.startswith("The given weights help in kNN (k=20)")


def test_fresh_weights_of_another_kind_are_no_pretraining(recipe: Recipe) -> None:
    drawn = compared(HIGH, arm="gaussian", label="classify, gaussian")
    found = compose_headline(recipe, judged(drawn, compared(WORSE, label="classify")))
    assert found.text.startswith("Pretraining hurts in classify: 21.0 %")
    assert found.details == ()


@pytest.mark.parametrize(
    ("changes", "rows", "text"),
    [
        ({}, [], "Nothing is measured yet."),
        ({"score_test": False}, [], "The test images were left alone: nothing says yet whether pretraining helped."),
        (
            {},
            [ScoreRow("evaluate", "kNN", "", (0.5, 0.6), (), label="kNN")],
            "There are scores, and nothing to compare them with.",
        ),
    ],
)
def test_without_a_comparison_nothing_is_claimed(
    tmp_path: Path, changes: dict[str, object], rows: list[ScoreRow], text: str
) -> None:
    found = compose_headline(recipes.recipe(tmp_path, **changes), rows)
    assert found.text == text
    assert found.tone == ""
    assert found.details == (("On test images: kNN 55.00 ± 7.07 %.",) if rows else ())


def test_recipe_without_evaluation_says_that_nothing_scores(tmp_path: Path) -> None:
    raw = {**recipes.RECIPE, "stages": {"pretrain": recipes.RECIPE["stages"]["pretrain"]}}
    found = compose_headline(recipes.parse_recipe({**raw, "storage": str(tmp_path)}), [])
    assert found.text == "Nothing says whether pretraining helped: no stage scores what was learned."


def test_measure_names_its_stage_where_another_stage_has_the_same() -> None:
    first, second = compared(HIGH), compared(HIGH, stage="evaluate_late")
    assert name_compared_measure(first, [first, second]) == "kNN (k=20) (evaluate)"
    assert name_compared_measure(first, [first]) == "kNN (k=20)"
    decoder = compared(HIGH, label="segment", arm="pretrained_decoder")
    assert name_compared_measure(decoder, [decoder]) == "segment, with the decoder"
