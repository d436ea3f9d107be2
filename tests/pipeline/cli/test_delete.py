"""What is deleted, what keeps it from being deleted, and that a recipe makes anew what is gone."""

import fcntl
from pathlib import Path

import pytest
from rich.console import Console

from firstlight.pipeline.cli.delete import check, delete, doomed
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run
from firstlight.pipeline.tracking.lineage import Lineage, read
from firstlight.pipeline.tracking.location import named
from tests.support import recipes
from tests.support.mlflow_runs import Past, chain

QUIET = Console(quiet=True)


def names(lineage: Lineage) -> list[str]:
    return sorted(run.name for run in lineage.runs.values())


@pytest.mark.timeout(600)
def test_a_recipe_is_deleted_with_all_that_is_below_it(tmp_path: Path) -> None:
    past, runs = chain(tmp_path)
    lineage, client = read(named([f"storage={tmp_path}"]))
    found = doomed(lineage, client, lineage.runs[runs["first"]])
    assert len(found.runs) == 6
    assert [version.reference for version in found.versions] == ["models:/digits-nat@current"]
    assert len(found.models) == 2
    assert {place.relative_to(tmp_path).as_posix() for place in found.places} == {
        "first/recipes/0.json",
        *(
            f"first/{stage}-f"
            for stage in ("prepare-seed0", "pretrain-seed0", "pretrain-seed1", "evaluate-seed0", "evaluate-seed1")
        ),
    }
    resting = check(lineage, found)
    assert resting == [f"evaluate seed 0 ({runs['other'][:8]}) of second started from the encoder of pretrain seed 0"]
    told = "\n".join(found.lines())
    assert "6 runs: first (" in told
    assert "1 model version: models:/digits-nat@current (version 1)" in told
    artifacts = [Path(one.artifacts) for one in found.runs]
    assert any(place.exists() for place in artifacts)
    delete(lineage, client, found)
    after, _ = read(named([f"storage={tmp_path}"]))
    assert names(after) == ["evaluate seed 0", "second"]
    assert after.versions == ()
    assert not [place for place in (*found.places, *artifacts) if place.exists()]
    assert not list((tmp_path / "mlartifacts").rglob("*.safetensors"))
    assert not past.client.search_registered_models()


def test_a_stage_that_others_started_from(tmp_path: Path) -> None:
    _, runs = chain(tmp_path)
    lineage, client = read(named([f"storage={tmp_path}"]))
    resting = check(lineage, doomed(lineage, client, lineage.runs[runs["pretrain0"]]))
    assert [line.split(" (")[0] for line in resting] == ["evaluate seed 0", "evaluate seed 0"]
    assert check(lineage, doomed(lineage, client, lineage.runs[runs["evaluate1"]])) == []


def test_a_stage_that_another_recipe_is_made_of_too(tmp_path: Path) -> None:
    past, runs = chain(tmp_path)
    past.tracking.log_stage(runs["second"], "evaluate", [runs["evaluate1"]])
    lineage, client = read(named([f"storage={tmp_path}"]))
    resting = check(lineage, doomed(lineage, client, lineage.runs[runs["evaluate1"]]))
    assert resting == [f"the recipe second ({runs['second'][:8]}) is made of evaluate seed 1 too"]


@pytest.mark.fault(22, "deleted while it is run")
def test_what_is_being_run_is_not_deleted(tmp_path: Path) -> None:
    past = Past(tmp_path)
    recipe = past.recipe("busy")
    lineage, client = read(named([f"storage={tmp_path}"]))
    with open(tmp_path / "busy" / ".lock", "w") as file:
        file.write("4711")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="run: 'busy' is being run by process 4711"):
            check(lineage, doomed(lineage, client, lineage.runs[recipe]))


@pytest.mark.timeout(600)
def test_what_was_deleted_is_made_anew_and_the_rest_stays(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path)
    del recipe.stages["finetune"]
    rows = run(recipe, QUIET)
    lineage, client = read(named([f"storage={tmp_path}"]))
    before = {one.name: one.id for one in lineage.runs.values()}
    delete(lineage, client, doomed(lineage, client, lineage.runs[before["pretrain seed 0"]]))
    assert run(recipe, QUIET) == rows
    after = {one.name: one.id for one in read(named([f"storage={tmp_path}"]))[0].runs.values()}
    assert {name for name in before if before[name] != after[name]} == {"pretrain seed 0"}
    lineage, client = read(named([f"storage={tmp_path}"]))
    delete(lineage, client, doomed(lineage, client, lineage.find("small")))
    assert run(recipe, QUIET) == rows
    again = {one.name: one.id for one in read(named([f"storage={tmp_path}"]))[0].runs.values()}
    assert set(again) == set(before)
    assert not set(again.values()) & set(after.values())
