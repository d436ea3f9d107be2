"""Repeated runs: what may differ, what is refused, and that the numbers are equal."""

from pathlib import Path

import pytest
from rich.console import Console

from firstlight.pipeline.cli import repeat
from firstlight.pipeline.cli.repeat import (
    ComparedNumber,
    Comparison,
    OriginalRun,
    check_code,
    compare_numbers,
    comparison_table,
    find_original,
    recipe_to_repeat,
)
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.stages.code_version import code_version
from firstlight.pipeline.tracking.lineage import read_lineage
from firstlight.pipeline.tracking.location import parse_location
from tests.support import recipes
from tests.support.mlflow_runs import CODE, chain
from tests.support.rendering import render_text

pytestmark = pytest.mark.usefixtures("undrawn_figures")

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a recipe, and of another that takes its encoder by an alias."""
    storage = tmp_path_factory.mktemp("original")
    run_recipe(recipes.recipe(storage, stages__pretrain__register_as="small-nat", **recipes.QUICK), QUIET)
    second = recipes.recipe(
        storage, name="second", stages__evaluate__encoder="models:/small-nat@current", **recipes.QUICK
    )
    del second.stages["finetune"], second.stages["pretrain"]
    run_recipe(second, QUIET)
    return storage


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["small", "second"])
def test_repetition_in_another_storage_has_equal_numbers(storage: Path, tmp_path: Path, name: str) -> None:
    found = find_original(parse_location([f"storage={storage}"]), name)
    recipe = recipe_to_repeat(found, [f"storage={tmp_path}"])
    assert recipe.name == f"{name}-repeat"
    run_recipe(recipe, QUIET, repeats=found.repeats)
    compared = compare_numbers(found, recipe)
    assert compared.differing == []
    compared.raise_if_different()
    numbers = {(number.stage, number.key) for number in compared.numbers}
    assert ("evaluate seed 0", "pretrained/knn_test") in numbers
    assert (("pretrain seed 0", "loss") in numbers) == (name == "small")
    assert (("pretrain seed 0", "the encoder's bits") in numbers) == (name == "small")
    assert (("finetune seed 0", "the model's bits") in numbers) == (name == "small")
    assert not [key for _, key in numbers if "images_per_s" in key]
    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    assert lineage.find_run(f"{name}-repeat").tags["firstlight.repeats"] == found.run.id
    assert not client.search_registered_models()


def test_other_images_are_refused_before_the_training(storage: Path, tmp_path: Path) -> None:
    found = find_original(parse_location([f"storage={storage}"]), "small")
    other = OriginalRun(
        found.lineage, found.run, {**found.recipe, "dataset": {**found.recipe["dataset"], "test_fraction": 0.3}}
    )
    with pytest.raises(
        UserError,
        match=rf"^repeat: the images differ: .* sha256 [0-9a-f]{{64}}, .* {found.run.store}",
    ):
        run_recipe(recipe_to_repeat(other, [f"storage={tmp_path}"]), QUIET, repeats=other.repeats)
    assert not list(tmp_path.glob("small-repeat/pretrain-*"))


def test_other_code_is_a_note_or_refused_with_exact(tmp_path: Path) -> None:
    chain(tmp_path)
    found = find_original(parse_location([f"storage={tmp_path}"]), "first")
    console = Console(width=300)
    with console.capture() as capture:
        check_code(found, console, exact=False)
    now = code_version()[:12]
    message = f"the code differs: this is {now}, the run was made by {CODE[:12]}"
    assert capture.get() == f"note {message}; the numbers may differ\n"
    with pytest.raises(UserError, match=f"^--exact: {message}"):
        check_code(found, QUIET, exact=True)


def test_override_of_a_key_that_decides_the_numbers_is_refused(tmp_path: Path) -> None:
    chain(tmp_path)
    found = find_original(parse_location([f"storage={tmp_path}"]), "first")
    assert recipe_to_repeat(found, ["scale.workers=2", "name=again", "dataset.root=/data"][:2]).name == "again"
    for word in ("stages.pretrain.epochs=3", "seeds=[1]", "scal=1", "datasets.root=x"):
        with pytest.raises(UserError, match="cannot differ in a repetition"):
            recipe_to_repeat(found, [word])


def test_run_of_a_stage_names_the_run_that_can_be_repeated(tmp_path: Path) -> None:
    _, runs = chain(tmp_path)
    with pytest.raises(UserError, match=f"is a run of kind evaluate; .*; valid: its recipe first, {runs['first']}"):
        find_original(parse_location([f"storage={tmp_path}"]), runs["evaluate0"])


def test_differing_numbers_are_listed_and_raise() -> None:
    numbers = [ComparedNumber("evaluate seed 0", f"n{k}", 0.5, 0.5) for k in range(3)]
    numbers += [
        ComparedNumber("evaluate seed 0", "knn", 0.5, 0.25),
        ComparedNumber("finetune seed 0", "test", 0.5, None),
    ]
    nan = float("nan")
    assert ComparedNumber("x", "y", nan, nan).is_same
    assert not ComparedNumber("x", "y", nan, 1.0).is_same
    found = Comparison("a and b", tuple(numbers))
    text = render_text(comparison_table(found), width=100)
    assert "evaluate seed 0  knn: was 0.5, is 0.25" in text
    assert "finetune seed 0  test: was 0.5, is missing" in text
    with pytest.raises(StageFailed, match="2 of 5 numbers differ"):
        found.raise_if_different()
    assert repeat.SPEED_METRIC.search("pretrained-lr0.1/images_per_s")
    assert not repeat.SPEED_METRIC.search("loss")
