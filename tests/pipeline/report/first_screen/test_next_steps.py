"""The advised next steps follow from the measurements, case by case."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.config import yaml_reader
from firstlight.pipeline.config.load import load_recipe, parse_recipe
from firstlight.pipeline.config.measures import GIVEN_ARM
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import TrainingLength
from firstlight.pipeline.report.first_screen.next_steps import MAX_STEPS, MeasuredRun, choose_next_steps
from firstlight.pipeline.report.first_screen.training_trend import RisingTraining
from firstlight.pipeline.stages.score_rows import ScoreRow
from tests.support import recipes
from tests.support.judged_rows import ALIKE, HIGH, WORSE, compared, judged, three_arms
from tests.support.stage_results import with_given

RISING = RisingTraining("pretrain", TrainingLength(20, "epochs"), (15.0, 20.0), 0.471, 0.503)


def measured(recipe: Recipe, rows: list[ScoreRow], **facts: Any) -> MeasuredRun:
    """A run of three stages that has finished on many images."""
    run = MeasuredRun(
        *(recipe, rows, Path("/runs/small/recipe.yaml"), 9, 9, 5000, 2000, True),
        encoders={"pretrain": Path("/runs/small/pretrain-seed0-ab/encoder")},
        run_ids={"pretrain": "abc"},
    )
    return replace(run, **facts)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipes.recipe(tmp_path, seeds=[0, 1, 2])


def without_stages(tmp_path: Path, *names: str, **changes: Any) -> Recipe:
    stages = {name: stage for name, stage in recipes.RECIPE["stages"].items() if name not in names}
    return parse_recipe({**recipes.RECIPE, "stages": stages, "storage": str(tmp_path), **changes})


def test_gain_leads_to_the_encoder_and_to_the_stages_that_hand_it_on(recipe: Recipe) -> None:
    (step,) = choose_next_steps(measured(recipe, judged(compared(HIGH))))
    assert step.text == "Use the encoder of pretrain, in Python, as vectors of the images, or in other software:"
    assert step.command.splitlines() == [
        'fl.load_encoder("/runs/small/pretrain-seed0-ab/encoder")',
        "firstlight run /runs/small/recipe.yaml 'stages.embed={}'",
        "firstlight run /runs/small/recipe.yaml 'stages.export={}'",
    ]


def test_stages_that_the_recipe_has_are_not_added(tmp_path: Path) -> None:
    recipe = recipes.recipe(
        tmp_path, seeds=[0, 1, 2], stages__out={"kind": "export"}, stages__vectors={"kind": "embed"}
    )
    (step,) = choose_next_steps(measured(recipe, judged(compared(HIGH))))
    assert step.text == "Use the encoder of pretrain, in Python."
    assert step.command == 'fl.load_encoder("/runs/small/pretrain-seed0-ab/encoder")'


def test_encoder_is_that_of_the_largest_gain_by_its_run_where_a_later_one_exists(tmp_path: Path) -> None:
    stages = dict(recipes.RECIPE["stages"])
    stages |= {"second": stages["pretrain"], "evaluate_second": stages["evaluate"]}
    recipe = recipes.recipe(tmp_path, seeds=[0, 1, 2], stages=stages)
    rows = judged(compared(HIGH), compared((0.60, 0.62, 0.61), stage="evaluate_second"))
    encoders = {"pretrain": Path("/first"), "second": Path("/second")}
    (step,) = choose_next_steps(measured(recipe, rows, encoders=encoders))
    assert step.text.startswith("Use the encoder of pretrain")
    assert "'stages.export={encoder: runs:/abc/encoder}'" in step.command
    (unknown,) = choose_next_steps(measured(recipe, rows, encoders=encoders, run_ids={}))
    assert unknown.command == 'fl.load_encoder("/first")', "nothing in the recipe or in MLflow names it"


def test_commands_that_add_a_stage_are_valid(recipe: Recipe, tmp_path: Path) -> None:
    unscored, stages = without_stages(tmp_path, "evaluate", "finetune"), dict(recipes.RECIPE["stages"])
    two = recipes.recipe(tmp_path, seeds=[0, 1, 2], stages={**stages, "second": stages["pretrain"]})
    helping = judged(compared(HIGH))
    for run, added in (
        (measured(recipe, helping), ["embed", "export"]),
        (measured(two, helping, encoders={"pretrain": Path("/first")}), ["embed", "export"]),
        (measured(with_given(tmp_path), three_arms((0.81, 0.80, 0.82))), ["embed", "export"]),
        (measured(unscored, []), ["evaluate"]),
        (measured(unscored, [], num_train=300), ["evaluate"]),
    ):
        (step,) = choose_next_steps(run)
        (tmp_path / "recipe.yaml").write_text(yaml_reader.dump_yaml(run.recipe.dump()))
        commands = [line for line in step.command.splitlines() if line.startswith("firstlight run ")]
        changed = [load_recipe(tmp_path / "recipe.yaml", shlex.split(command)[3:]) for command in commands]
        assert [one.stages.keys() - run.recipe.stages.keys() for one in changed] == [{name} for name in added]


def test_one_seed_asks_for_three_and_keeps_it(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, seeds=[1])
    (step,) = choose_next_steps(measured(recipe, judged(compared([0.5], [0.4])), num_done=3, num_wanted=3))
    assert step.text.startswith("1 seed cannot tell a gain from chance: a verdict needs 3.")
    assert step.command == "firstlight run /runs/small/recipe.yaml 'seeds=[1,0,2]'"
    (tmp_path / "recipe.yaml").write_text(yaml_reader.dump_yaml(recipe.dump()))
    assert load_recipe(tmp_path / "recipe.yaml", ["seeds=[1,0,2]"]).seeds == (1, 0, 2)


def test_undecided_gain_tells_how_many_seeds_would_decide(recipe: Recipe) -> None:
    rows = judged(compared((0.42, 0.46, 0.48)))
    assert rows[0].verdict is not None
    assert rows[0].verdict.text == "no clear difference"
    more, advice = choose_next_steps(measured(recipe, rows))
    assert more.text.startswith("If mean and spread stay as they are, 4 seeds would make kNN (k=20) clear.")
    assert more.command.endswith("'seeds=[0,1,2,3]'")
    assert advice.command == "firstlight recipes"


def test_gain_that_ten_seeds_would_not_show_leads_to_the_advice_alone(recipe: Recipe) -> None:
    (step,) = choose_next_steps(measured(recipe, judged(compared(ALIKE))))
    assert step.command == "firstlight recipes"


def test_loss_leads_to_the_advice(recipe: Recipe) -> None:
    (step,) = choose_next_steps(measured(recipe, judged(compared(WORSE))))
    assert step.command == "firstlight recipes"
    assert "Use the encoder" not in step.text


def test_some_hundred_images_lead_to_weights_that_exist(recipe: Recipe, tmp_path: Path) -> None:
    (step,) = choose_next_steps(measured(recipe, judged(compared(WORSE)), num_train=720))
    assert step.text.startswith("720 images are few to learn from without labels.")
    assert step.command == "", "the digits are in no folder"
    changes = {"dataset__source": "folder", "dataset__root": "/my photos", "dataset__test_fraction": 0.2}
    folder = recipes.recipe(tmp_path, seeds=[0, 1, 2], **changes)
    (step,) = choose_next_steps(measured(folder, judged(compared(WORSE)), num_train=720))
    assert step.command == "firstlight run photos 'dataset.root=/my photos'"


def test_given_weights_that_are_as_good_are_taken_as_they_came(tmp_path: Path) -> None:
    recipe = with_given(tmp_path)
    (step,) = choose_next_steps(measured(recipe, three_arms((0.81, 0.80, 0.82))))
    assert step.text.startswith("Continuing was not clearly better than the given weights in any measure: take them")
    assert step.command.splitlines() == [
        "firstlight run /runs/small/recipe.yaml 'stages.embed={encoder: given}'",
        "firstlight run /runs/small/recipe.yaml 'stages.export={encoder: given}'",
    ]
    (step,) = choose_next_steps(measured(recipe, three_arms((0.90, 0.92, 0.92))))
    assert step.text.startswith("Use the encoder of pretrain")


def test_given_weights_alone_are_taken_if_they_help(tmp_path: Path) -> None:
    encoder = {**recipes.RECIPE["encoder"], "weights": "/w.safetensors"}
    recipe = without_stages(tmp_path, "pretrain", encoder=encoder, seeds=[0, 1, 2])
    helping = judged(compared(HIGH, arm=GIVEN_ARM))
    (step,) = choose_next_steps(measured(recipe, helping, encoders={}))
    assert step.text.startswith("The given weights are worth more than fresh ones: take them as they came")
    assert choose_next_steps(measured(recipe, judged(compared(ALIKE, arm=GIVEN_ARM)), encoders={})) == []


def test_run_that_stopped_goes_on_first(recipe: Recipe) -> None:
    finish, use = choose_next_steps(measured(recipe, judged(compared(HIGH)), num_done=8))
    assert finish.text == "1 of 9 parts is missing. Run it again: what is finished is kept."
    assert finish.command == "firstlight run /runs/small/recipe.yaml"
    assert use.text.startswith("Use the encoder")
    (alone,) = choose_next_steps(measured(recipe, [], num_done=3))
    assert alone.text.startswith("6 of 9 parts are missing")


def test_pretraining_that_nothing_scores_is_scored(tmp_path: Path) -> None:
    recipe = without_stages(tmp_path, "evaluate", "finetune")
    (step,) = choose_next_steps(measured(recipe, []))
    assert step.text == "Score the features beside those of random weights, by kNN and a linear probe."
    assert step.command == "firstlight run /runs/small/recipe.yaml 'stages.evaluate={}'"
    (few,) = choose_next_steps(measured(recipe, [], num_train=300, num_test=0))
    assert few.command.endswith("'stages.evaluate={knn_k: 20}'")
    assert few.text.endswith("so the pretraining runs again without them.")
    (unlabelled,) = choose_next_steps(measured(recipe, [], has_labels=False))
    assert (unlabelled.text[:28], unlabelled.command) == ("The images have no labels, s", "")


def test_test_images_that_were_left_alone_are_scored(tmp_path: Path) -> None:
    (step,) = choose_next_steps(measured(recipes.recipe(tmp_path, score_test=False), []))
    assert step.command == "firstlight run /runs/small/recipe.yaml score_test=true"


def test_recipe_without_pretraining_and_scores_has_no_step(tmp_path: Path) -> None:
    recipe = without_stages(tmp_path, "pretrain", encoder={**recipes.RECIPE["encoder"], "weights": "/w.safetensors"})
    assert choose_next_steps(measured(recipe, [])) == []


def test_curve_that_still_rises_asks_for_twice_the_length_and_compares(recipe: Recipe) -> None:
    _, step = choose_next_steps(measured(recipe, judged(compared(HIGH)), rising=[RISING]))
    assert "rose from 47.1 % after 15 epochs to 50.3 % after 20, in every seed" in step.text
    assert step.command.splitlines() == [
        "firstlight run /runs/small/recipe.yaml name=small-longer stages.pretrain.epochs=40",
        f"firstlight compare small small-longer storage={recipe.storage}",
    ]


def test_collapse_comes_before_more_seeds(tmp_path: Path) -> None:
    rows = judged(compared([0.5], [0.4]))
    first, second = choose_next_steps(measured(recipes.recipe(tmp_path), rows, collapsed=["pretrain"]))
    assert first.text.startswith("The features have collapsed during pretrain")
    assert second.command.endswith("'seeds=[0,1,2]'")


def test_few_test_images_have_the_interval_of_their_score(recipe: Recipe) -> None:
    _, step = choose_next_steps(measured(recipe, judged(compared((0.50, 0.52, 0.51), (0.1, 0.11, 0.13))), num_test=100))
    assert step.text.startswith("100 test images are few: on others of the same kind, kNN (k=20) could be 41 to 61 %")
    assert "instead of 51.0 %" in step.text
    other = compared(HIGH, key="mAP", label="detect mAP")
    assert len(choose_next_steps(measured(recipe, judged(other), num_test=100))) == 1, "mAP is no share of images"


def test_at_most_three_steps_are_shown(recipe: Recipe) -> None:
    run = measured(recipe, judged(compared(HIGH)), num_done=8, rising=[RISING], num_test=50, collapsed=["pretrain"])
    assert len(choose_next_steps(run)) == MAX_STEPS == 3
