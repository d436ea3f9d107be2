"""The files that a deletion removes, the reasons against one, and a recipe that makes deleted stages again."""

import fcntl
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from firstlight.pipeline.cli.delete import check_deletion, delete_runs, plan_deletion
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.tracking.lineage import Lineage, read_lineage
from firstlight.pipeline.tracking.location import parse_location
from tests.support import recipes
from tests.support.buckets import make_mirror, write_files
from tests.support.mlflow_runs import Past, chain

QUIET = Console(quiet=True)


def run_names(lineage: Lineage) -> list[str]:
    return sorted(run.name for run in lineage.runs.values())


def ids_by_name(storage: Path) -> dict[str, str]:
    return {run.name: run.id for run in read_lineage(parse_location([f"storage={storage}"]))[0].runs.values()}


def test_recipe_is_deleted_with_everything_below_it(tmp_path: Path) -> None:
    past, run_ids = chain(tmp_path)
    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    plan = plan_deletion(lineage, client, lineage.runs[run_ids["first"]])
    assert len(plan.runs) == 6
    assert [version.reference for version in plan.versions] == ["models:/digits-nat@current"]
    assert len(plan.models) == 2
    assert {path.relative_to(tmp_path).as_posix() for path in plan.paths} == {
        "first/recipes/0.json",
        *(
            f"first/{stage}-f"
            for stage in ("prepare-seed0", "pretrain-seed0", "pretrain-seed1", "evaluate-seed0", "evaluate-seed1")
        ),
    }
    name = f"evaluate seed 0 ({run_ids['other'][:8]}) of second"
    assert check_deletion(lineage, plan) == [f"{name} started from the encoder of pretrain seed 0"]
    summary = "\n".join(plan.summary_lines())
    assert "6 runs: first (" in summary
    assert "1 model version: models:/digits-nat@current (version 1)" in summary
    assert f"6 paths on disk, {plan.num_bytes / 1e6:.1f} MB:" in summary
    artifacts = [Path(run.artifact_uri) for run in plan.runs]
    assert any(path.exists() for path in artifacts)
    delete_runs(lineage, client, plan)
    after, _ = read_lineage(parse_location([f"storage={tmp_path}"]))
    assert run_names(after) == ["evaluate seed 0", "second"]
    assert after.versions == ()
    assert not [path for path in (*plan.paths, *artifacts) if path.exists()]
    assert not list((tmp_path / "mlartifacts").rglob("*.safetensors"))
    assert not past.client.search_registered_models()


def test_stages_that_started_from_an_encoder_are_named(lineage: Lineage, run_ids: dict[str, str]) -> None:
    _, client = read_lineage(lineage.location)
    dependants = check_deletion(lineage, plan_deletion(lineage, client, lineage.runs[run_ids["pretrain0"]]))
    assert [line.split(" (")[0] for line in dependants] == ["evaluate seed 0", "evaluate seed 0"]
    assert check_deletion(lineage, plan_deletion(lineage, client, lineage.runs[run_ids["evaluate1"]])) == []


def test_other_recipes_that_use_a_stage_are_named(tmp_path: Path) -> None:
    past, run_ids = chain(tmp_path)
    past.tracking.log_stage_runs(run_ids["second"], "evaluate", [run_ids["evaluate1"]])
    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    dependants = check_deletion(lineage, plan_deletion(lineage, client, lineage.runs[run_ids["evaluate1"]]))
    assert dependants == [f"the recipe second ({run_ids['second'][:8]}) also uses evaluate seed 1"]


@pytest.mark.fault(22, "deleted while it is run")
def test_recipe_that_a_process_runs_is_not_deleted(tmp_path: Path) -> None:
    past = Past(tmp_path)
    recipe = past.recipe("busy")
    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    plan = plan_deletion(lineage, client, lineage.runs[recipe])
    with open(tmp_path / "busy" / ".lock", "w") as file:
        file.write("4711")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="run: 'busy' is being run by process 4711"):
            check_deletion(lineage, plan)


@pytest.mark.timeout(600)
def test_deleted_stages_are_made_again_with_the_same_results(tmp_path: Path, undrawn_figures: None) -> None:
    recipe = recipes.recipe(tmp_path, **recipes.ONE_PROBE)
    del recipe.stages["finetune"]
    rows = run_recipe(recipe, QUIET).rows
    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    before = ids_by_name(tmp_path)
    delete_runs(lineage, client, plan_deletion(lineage, client, lineage.runs[before["pretrain seed 0"]]))
    assert run_recipe(recipe, QUIET).rows == rows
    after = ids_by_name(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"pretrain seed 0"}
    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    delete_runs(lineage, client, plan_deletion(lineage, client, lineage.find_run("small")))
    assert run_recipe(recipe, QUIET).rows == rows
    again = ids_by_name(tmp_path)
    assert set(again) == set(before)
    assert not set(again.values()) & set(after.values())


def test_deleted_run_is_deleted_in_its_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs on a machine that has nothing of the run."""
    mirror = make_mirror(tmp_path / "cache", "deleted", monkeypatch)
    _, run_ids = chain(tmp_path / "runs")
    location = [f"storage={mirror.uri}", f"tracking.uri=sqlite:///{tmp_path}/runs/mlflow.db"]
    for name in ("first", "second"):
        (tmp_path / "runs" / name).rename(mirror.root / name)
        for folder in (mirror.root / name).iterdir():
            mirror.push(folder)
    step = write_files(mirror.root / "first" / "pretrain-seed0-f" / "checkpoints" / "step-000000001-ab", x="x")
    mirror.seal(step, {"x": mirror.send_file(step, "x")})
    shutil.rmtree(mirror.root)
    lineage, client = read_lineage(parse_location(location))
    plan = plan_deletion(lineage, client, lineage.runs[run_ids["first"]])
    assert "  memory://deleted/runs/first/pretrain-seed0-f" in plan.summary_lines()
    assert plan.num_bytes == sum(
        len(mirror.bucket.read(name) or b"")
        for name in mirror.bucket.list_names("first")
        if not name.endswith("/contents.json")
    )
    before = mirror.bucket.list_names()
    assert any(name.startswith("first/pretrain-seed0-f/checkpoints/") for name in before)
    delete_runs(lineage, client, plan)
    left = mirror.bucket.list_names()
    assert [name for name in left if name.startswith("first/")] == ["first/recipes/contents.json"]
    assert [name for name in left if name.startswith("second/")] == [n for n in before if n.startswith("second/")]
