"""A kind of stage that trains an encoder and is not one of Firstlight's: it is treated like a pretraining, by what its
section and its `StageKind` say.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from firstlight.pipeline.cli.delete import plan_deletion
from firstlight.pipeline.cli.main import cli
from firstlight.pipeline.cli.promote import promote_encoder
from firstlight.pipeline.config.load import parse_recipe
from firstlight.pipeline.config.recipe import EncoderSource, Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.data_notes import describe_problems
from firstlight.pipeline.report.first_screen.next_steps import MeasuredRun
from firstlight.pipeline.run.bounded_store import find_recipe_side
from firstlight.pipeline.run.launching import side_processes
from firstlight.pipeline.run.launching.side_processes import is_long
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.run.teacher_weights import resolve_teachers
from firstlight.pipeline.search import pbt
from firstlight.pipeline.search.checks import check_search_images, load_checked_plan
from firstlight.pipeline.search.plan import SearchPlan
from firstlight.pipeline.search.trial import weigh_stage
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.lineage import read_lineage
from firstlight.pipeline.tracking.location import parse_location
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes
from tests.support.own_training import SECTION, OwnTrainingStage, know_own_training

pytestmark = pytest.mark.usefixtures("undrawn_figures")


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with know_own_training():
        yield


def make_recipe(storage: Path, **keys: Any) -> Recipe:
    stages = {"own": {**SECTION, **keys}, "evaluate": recipes.RECIPE["stages"]["evaluate"]}
    return recipes.recipe(storage, stages=stages, **recipes.ONE_PROBE)


def make_plan(folder: Path, interval: int = 2, measure: str = "own.loss", **changes: Any) -> SearchPlan:
    raw = json.loads(make_recipe(folder / "runs").model_dump_json())
    raw["stages"]["own"] |= changes.pop("own", {})
    (folder / "recipe.yaml").write_text(json.dumps(parse_recipe(raw).dump()))
    search = {
        "name": "small-search",
        "recipe": "recipe.yaml",
        "space": {"stages.own.optimizer.lr": {"loguniform": [0.01, 1.0]}},
        "objectives": [{"measure": "own.loss", "mode": "min"}],
        "trials": 4,
        "algorithm": "random",
        "scheduler": {"name": "pbt", "measure": measure, "mode": "min", "interval": interval},
    }
    (folder / "search.yaml").write_text(json.dumps({**search, **changes}))
    return load_checked_plan(folder / "search.yaml")


def test_its_encoder_is_scored_logged_promoted_and_listed(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    assert recipe.encoder_source("evaluate") == EncoderSource(stage="own")
    rows = run_recipe(recipe, Console(quiet=True)).rows
    assert {row.stage for row in rows} == {"evaluate"}

    lineage, client = read_lineage(parse_location([f"storage={tmp_path}"]))
    (run,) = (run for run in lineage.runs.values() if run.kind == "own_training")
    assert (run.artifact, run.model is None) == ("encoder", False)
    whole = lineage.find_run(recipe.name)
    assert promote_encoder(lineage, client, whole, "best", "current") == "models:/best@current"

    listed = CliRunner().invoke(cli, ["runs", f"storage={tmp_path}"])
    assert listed.exit_code == 0, listed.output
    assert "models:/best@current" in listed.output
    assert plan_deletion(lineage, client, whole).models == (run.model,)


def test_its_views_decide_the_side_of_the_store(tmp_path: Path) -> None:
    crop = [{"op": "random_resized_crop", "scale": [0.25, 1.0]}]
    own = make_recipe(tmp_path).model_dump(mode="json")
    sides = []
    for stages in (own["stages"], {"evaluate": {**own["stages"]["evaluate"], "encoder": "runs:/abc/encoder"}}):
        changed = {**own, "storage": str(tmp_path), "stages": stages}
        changed["dataset"] = {**changed["dataset"], "train_augment": crop, "image_size": 64}
        sides.append(find_recipe_side(parse_recipe(changed)))
    assert sides == [256, 128], "twice the pixels"


def test_its_length_and_its_trainings_count(tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # The digits have 8 x 8 pixels.
    monkeypatch.setattr(side_processes, "LONG_PASSES", 20_000 / 4**2)
    recipe = make_recipe(tmp_path)
    assert weigh_stage(recipe.stages["own"], 120) == 3.0 * 3 * 5
    splits = StageContext.create(recipe, digits, on_ray=False).splits
    for epochs, expected in ((20, False), (21, True)):
        two_seeds = make_recipe(tmp_path, epochs=epochs).model_copy(update={"seeds": (0, 1)})
        assert is_long(two_seeds, splits) == expected, "five trainings of a seed, 96 of 110 images in an epoch"


def test_its_notes_and_uses_are_told(tmp_path: Path, digits: Store) -> None:
    recipe = make_recipe(tmp_path)
    assert "stages.own.kind: sees images of 8 pixels twice as large" in describe_problems(recipe, digits)
    other = recipes.recipe(tmp_path)
    run = MeasuredRun(other, (), tmp_path, 0, 0, 0, 0, True, {}, {})
    assert run.list_missing_uses() == {
        "embed": "as vectors of the images",
        "export": "in other software",
        "own_training": "by magic",
    }


def test_its_teacher_is_resolved(tmp_path: Path) -> None:
    assert resolve_teachers(make_recipe(tmp_path), TrackingClient(make_recipe(tmp_path))) == ({}, [])
    taught = make_recipe(tmp_path, taught=True)
    with pytest.raises(UserError, match=r"^stages\.own\.method\.teacher\.weights: is needed"):
        resolve_teachers(taught, TrackingClient(taught))


def test_a_population_is_checked_by_what_the_kind_says(
    tmp_path: Path, digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tmp_path)
    assert str(plan.max_length) == "3 epochs"
    assert pbt.max_segments(plan) == 2
    with pytest.raises(UserError, match=r"space\.stages\.own\.every: cannot change .* valid: keys of stages\.own\.opt"):
        make_plan(tmp_path, space={"stages.own.every": {"choice": [1, 2]}})
    with pytest.raises(UserError, match=r"own\.sharpness is known every 2 epochs \(stages\.own\.every\)"):
        make_plan(tmp_path, interval=1, measure="own.sharpness")
    wide = make_plan(tmp_path, space={"stages.own.width": {"choice": [4, 8]}})
    with pytest.raises(UserError, match=r"space\.stages\.own\.width: .*weight is 8 x 10 with 8 and 4 x 10 with 4"):
        pbt.check_networks(wide, 10)
    monkeypatch.setattr(OwnTrainingStage, "count_epoch_images", lambda *_: (108, 32))
    in_steps = make_plan(tmp_path, interval=4, measure="own.sharpness", own={"epochs": None, "steps": 20})
    with pytest.raises(UserError, match=r"known every 6 steps, 2 epochs \(stages\.own\.every\)"):
        check_search_images(in_steps, digits)


def test_a_kind_whose_settings_stay_is_no_population(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnTrainingStage.section, "changeable_keys", ())
    with pytest.raises(UserError, match=r"^scheduler: pbt is not valid: no setting of stages\.own, of kind own_train"):
        make_plan(tmp_path)
