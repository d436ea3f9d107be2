"""A run repeated from what MLflow has of it: what may differ, what is refused, and that the numbers are the same."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from firstlight.pipeline.cli import repeat
from firstlight.pipeline.cli.repeat import Compared, Number, Original, check_code, compare, original, recipe_of, table
from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.run.runner import run
from firstlight.pipeline.stages import stage
from firstlight.pipeline.tracking.lineage import read
from firstlight.pipeline.tracking.location import named
from tests.support import recipes
from tests.support.mlflow_runs import CODE, chain

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a recipe, and of another that takes its encoder by an alias."""
    storage = tmp_path_factory.mktemp("original")
    first = recipes.recipe(storage, stages__pretrain__register_as="small-nat")
    del first.stages["finetune"]
    run(first, QUIET)
    second = recipes.recipe(storage, name="second", stages__evaluate__encoder="models:/small-nat@current")
    del second.stages["finetune"], second.stages["pretrain"]
    run(second, QUIET)
    return storage


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["small", "second"])
def test_a_repetition_in_another_storage_has_the_same_numbers(storage: Path, tmp_path: Path, name: str) -> None:
    """Also of a recipe whose encoder is kept in the other MLflow."""
    found = original(named([f"storage={storage}"]), name)
    recipe = recipe_of(found, [f"storage={tmp_path}"])
    assert recipe.name == f"{name}-repeat"
    run(recipe, QUIET, repeats=found.repeats)
    compared = compare(found, recipe)
    assert compared.different == []
    compared.check()
    numbers = {(number.stage, number.key) for number in compared.numbers}
    assert ("evaluate seed 0", "pretrained/knn_test") in numbers
    assert (("pretrain seed 0", "loss") in numbers) == (name == "small")
    assert (("pretrain seed 0", "the encoder's bits") in numbers) == (name == "small")
    assert not [key for _, key in numbers if "images_per_s" in key]
    lineage, client = read(named([f"storage={tmp_path}"]))
    assert lineage.find(f"{name}-repeat").tags["firstlight.repeats"] == found.run.id
    assert not client.search_registered_models(), "a repetition takes no alias"


def test_other_images_are_refused(storage: Path, tmp_path: Path) -> None:
    found = original(named([f"storage={storage}"]), "small")
    other = Original(
        found.lineage, found.run, {**found.recipe, "dataset": {**found.recipe["dataset"], "test_fraction": 0.3}}
    )
    with pytest.raises(
        UserError,
        match=f"^repeat: the images differ: this store has sha256 [0-9a-f]{{64}}, that of the run had {found.run.store}",
    ):
        run(recipe_of(other, [f"storage={tmp_path}"]), QUIET, repeats=other.repeats)
    assert not list(tmp_path.glob("small-repeat/pretrain-*")), "nothing was trained"


def test_other_code_is_told_or_refused(tmp_path: Path) -> None:
    chain(tmp_path)
    found = original(named([f"storage={tmp_path}"]), "first")
    console = Console(file=io.StringIO(), width=300)
    check_code(found, console, exact=False)
    assert isinstance(console.file, io.StringIO)
    now = stage.code_version()[:12]
    told = f"the code differs: this is {now}, the run was made by {CODE[:12]}"
    assert console.file.getvalue() == f"note {told}; the numbers may differ\n"
    with pytest.raises(UserError, match=f"^--exact: {told}"):
        check_code(found, QUIET, exact=True)


def test_what_decides_the_numbers_cannot_differ(tmp_path: Path) -> None:
    chain(tmp_path)
    found = original(named([f"storage={tmp_path}"]), "first")
    assert recipe_of(found, ["scale.workers=2", "name=again", "dataset.root=/data"][:2]).name == "again"
    for word in ("stages.pretrain.epochs=3", "seeds=[1]", "scal=1", "datasets.root=x"):
        with pytest.raises(UserError, match="cannot differ in a repetition"):
            recipe_of(found, [word])


def test_a_stage_cannot_be_repeated(tmp_path: Path) -> None:
    _, runs = chain(tmp_path)
    with pytest.raises(UserError, match=f"is a run of kind evaluate; .* valid: its recipe first, {runs['first']}"):
        original(named([f"storage={tmp_path}"]), runs["evaluate0"])


def test_numbers_that_differ_are_named() -> None:
    numbers = [Number("evaluate seed 0", f"n{k}", 0.5, 0.5) for k in range(3)]
    numbers += [Number("evaluate seed 0", "knn", 0.5, 0.25), Number("finetune seed 0", "test", 0.5, None)]
    nan = float("nan")
    assert Number("x", "y", nan, nan).same
    assert not Number("x", "y", nan, 1.0).same
    found = Compared("a and b", tuple(numbers))
    console = Console(file=io.StringIO(), width=100)
    console.print(table(found))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "evaluate seed 0  knn: was 0.5, is 0.25" in shown
    assert "finetune seed 0  test: was 0.5, is missing" in shown
    with pytest.raises(StageFailed, match="2 of 5 numbers differ"):
        found.check()
    assert repeat.SPEED.search("pretrained-lr0.1/images_per_s")
    assert not repeat.SPEED.search("loss")
