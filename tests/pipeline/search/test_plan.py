"""The recipe of a trial: what it runs, what it takes from the search, and that it does not change during a search."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline import ROOT
from firstlight.pipeline.config import load
from firstlight.pipeline.config.scale import ScaleOptions
from firstlight.pipeline.config.stages import TrainingLength
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.search.plan import RECIPE_FOLDER, SearchPlan, load_plan
from tests.support.searches import LR, PERIOD, make_plan, write_files


def test_trial_runs_stages_of_its_objectives_without_test_split(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, stages={"pretrain": {"register_as": "digits"}})
    trial: Any = plan.trial_recipe({LR: 0.25, PERIOD: 3})
    assert list(trial.stages) == ["pretrain", "evaluate"]
    assert (trial.stages["pretrain"].optimizer.lr, trial.stages["pretrain"].method.permutation_period) == (0.25, 3)
    assert not trial.score_test
    assert trial.stages["pretrain"].register_as is None, "a trial must not replace a model that a run has registered"
    assert plan.encoder_stage(trial) == "pretrain"


def test_trials_share_the_cpus_and_the_best_recipe_has_all_of_them(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "scale.threads=auto")
    assert plan.trial_recipe({LR: 0.25, PERIOD: 3}).scale.threads == 1
    assert plan.full_recipe({LR: 0.25, PERIOD: 3}).scale.threads == "auto"


def test_trial_registers_no_fine_tuned_encoder(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, objectives=[{"measure": "finetune"}], stages={"finetune": {"register_as": "tuned"}})
    trial: Any = plan.trial_recipe({LR: 0.25, PERIOD: 3})
    assert trial.stages["finetune"].register_as is None
    recipe: Any = plan.full_recipe({LR: 0.25, PERIOD: 3})
    assert recipe.stages["finetune"].register_as == "tuned"


def test_full_recipe_has_all_stages_and_the_test_split(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, stages={"pretrain": {"register_as": "digits"}})
    recipe: Any = plan.full_recipe({LR: 0.25, PERIOD: 3})
    assert list(recipe.stages) == ["pretrain", "evaluate", "finetune"]
    assert recipe.score_test
    assert (recipe.stages["pretrain"].register_as, recipe.stages["pretrain"].optimizer.lr) == ("digits", 0.25)


def test_references_replace_encoders_of_a_trial(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "space": {"stages.finetune.epochs": {"choice": [1, 2]}},
        "objectives": [{"measure": "finetune"}],
        "stages": {"finetune": {"encoder": "models:/digits@best"}},
    }
    plan = make_plan(tmp_path, **changes)
    trial: Any = plan.trial_recipe({"stages.finetune.epochs": 1}, {"finetune": "models:/digits/1"})
    assert list(trial.stages) == ["finetune"], "the pretraining of another run is not repeated"
    assert trial.stages["finetune"].encoder == "models:/digits/1"
    assert plan.encoder_stage(trial) is None


def test_budget_applies_to_trials_only_and_overrides_replace_it(tmp_path: Path) -> None:
    plan = make_plan(
        tmp_path,
        "stages.pretrain.batch_size=16",
        "trials=9",
        overrides={"stages.pretrain.epochs": 1, "stages.pretrain.batch_size": 8},
    )
    values = {LR: 0.1, PERIOD: 1}
    trial: Any = plan.trial_recipe(values).stages["pretrain"]
    full: Any = plan.full_recipe(values).stages["pretrain"]
    assert (trial.epochs, trial.batch_size, plan.search.num_trials) == (1, 16, 9)
    assert (full.epochs, full.batch_size) == (2, 16)


def test_making_recipes_does_not_change_listed_sections(tmp_path: Path) -> None:
    methods = [{"name": "nat", "dim": dim, "hidden": [], "pool": "avg"} for dim in (8, 4)]
    plan = make_plan(tmp_path, space={"stages.pretrain.method": {"choice": methods}})
    stages: list[Any] = [plan.trial_recipe(values).stages["pretrain"] for values in plan.corner_values()]
    assert [stage.method.dim for stage in stages] == [8, 4]
    assert list(plan.search.space["stages.pretrain.method"].listed_values) == methods


def test_edited_recipe_does_not_change_later_trials(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    fingerprint = plan.fingerprint()
    first: Any = plan.trial_recipe({LR: 0.1, PERIOD: 1})
    file = tmp_path / "recipe.yaml"
    file.write_text(file.read_text().replace('"batch_size": 32', '"batch_size": 8'))
    second: Any = plan.trial_recipe({LR: 0.2, PERIOD: 1})
    assert first.stages["pretrain"].batch_size == second.stages["pretrain"].batch_size == 32
    assert plan.full_recipe({}).stages["evaluate"].batch_size == 32  # type: ignore[attr-defined]
    assert plan.fingerprint() == fingerprint
    edited: Any = load_plan(tmp_path / "search.yaml").trial_recipe({LR: 0.1, PERIOD: 1})
    assert edited.stages["pretrain"].batch_size == 8, "the next command reads the file again"
    file.unlink()
    assert plan.trial_recipe({LR: 0.1, PERIOD: 1}) == first


def test_edited_conf_file_does_not_change_later_trials(tmp_path: Path) -> None:
    """The files of `conf` that a recipe starts from are part of it."""
    conf = tmp_path / "conf"
    for group in ("method", "task", "dataset", "scale"):
        shutil.copytree(ROOT / "conf" / group, conf / group)
    (conf / "recipe").mkdir()
    search = write_files(conf / "recipe")
    plan = load_plan(search)
    first: Any = plan.trial_recipe({LR: 0.1, PERIOD: 1})
    file = conf / "method" / "nat.yaml"
    file.write_text(file.read_text() + "dropout: 0.25\n")
    second: Any = plan.trial_recipe({LR: 0.2, PERIOD: 1})
    again: Any = load_plan(search).trial_recipe({LR: 0.2, PERIOD: 1})
    assert second.stages["pretrain"].method == first.stages["pretrain"].method
    assert again.stages["pretrain"].method.dropout == 0.25
    file.unlink()
    assert plan.trial_recipe({LR: 0.1, PERIOD: 1}) == first


def test_each_recipe_is_validated_once(tmp_path: Path) -> None:
    """In the process of the search: a trial's recipe, and the recipe with the same values and all its stages."""
    plan = make_plan(tmp_path)
    load._validate_recipe.cache_clear()
    for _ in range(3):
        plan.trial_recipe({LR: 0.1, PERIOD: 1})
    assert load._validate_recipe.cache_info().misses == 2


def test_corners_contain_every_end_of_the_space(tmp_path: Path) -> None:
    corners = make_plan(tmp_path).corner_values()
    assert corners == [{LR: 0.01, PERIOD: 1}, {LR: 1.0, PERIOD: 1}, {LR: 0.01, PERIOD: 2}, {LR: 0.01, PERIOD: 3}]


def test_warnings_are_those_that_hold_for_every_corner(tmp_path: Path) -> None:
    method = {"name": "clustering_locality", "supervised": False, "beta": 0.1}
    beta = "stages.pretrain.method.beta"
    for space, count in (
        ({LR: {"choice": [0.1, 0.2]}}, 1),
        ({beta: {"uniform": [0.0, 1.0]}}, 0),
        ({"stages.pretrain.method.alpha": {"uniform": [0.0, 1.0]}}, 0),
    ):
        found = make_plan(tmp_path, space=space, stages={"pretrain": {"method": method}}).list_warnings()
        assert len(found) == count
        assert all(line.startswith(f"{beta}: 0.1 is less than alpha: 0.8") for line in found)


def test_max_length_is_that_of_the_longest_corner(tmp_path: Path) -> None:
    space = {"stages.pretrain.epochs": {"choice": [3, 7, 5]}}
    scheduler = {"name": "asha", "measure": "pretrain.loss", "mode": "min"}
    assert make_plan(tmp_path, space=space, scheduler=scheduler).max_length == TrainingLength(7, "epochs")
    assert make_plan(tmp_path, space=space).max_length == TrainingLength(1, "epochs")
    in_steps = {"stages.pretrain.steps": {"choice": [30, 70]}}
    plan = make_plan(tmp_path, space=in_steps, scheduler=scheduler, overrides={"stages.pretrain.epochs": None})
    assert plan.max_length == TrainingLength(70, "steps")


def test_corners_are_composed_once_for_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = {"name": "asha", "measure": "pretrain.loss", "mode": "min"}
    plan = make_plan(tmp_path, scheduler=scheduler)
    monkeypatch.setattr(SearchPlan, "trial_recipe", lambda *_: pytest.fail("is composed again"))
    assert plan.max_length == TrainingLength(2, "epochs")


def test_error_of_a_recipe_names_the_searched_key(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    values = {LR: 0.1, PERIOD: 1}
    assert plan.explain_error(f"{LR}: 0.1 is not valid", values) == f"space.{LR}: 0.1 is not valid"
    assert plan.explain_error("stages.pretrain.optimizer: wrong", values).startswith("space.stages.pretrain.optimizer:")
    assert plan.explain_error("seeds: wrong", values) == f"space: with {LR}: 0.1, {PERIOD}: 1: seeds: wrong"


def test_fingerprint_depends_on_what_decides_the_trials(tmp_path: Path) -> None:
    same = {"trials": 9, "concurrency": 1, "description": "other", "retrain": True, "promote": {"name": "x"}}
    before = make_plan(tmp_path).fingerprint()
    assert make_plan(tmp_path, **same).fingerprint() == before
    assert make_plan(tmp_path, "scale.cpus=4", f"storage={tmp_path / 'other'}").fingerprint() == before
    assert make_plan(tmp_path, "stream.tasks=3", "stream.resident=off").fingerprint() == before, "of no effect"
    assert make_plan(tmp_path, "stream.shuffle=windowed").fingerprint() != before
    for change in (
        {"seed": 1},
        {"algorithm": "random"},
        {"objectives": [{"measure": "evaluate.probe"}]},
        {"overrides": {"seeds": [1]}},
    ):
        assert make_plan(tmp_path, **change).fingerprint() != before, change


def test_trials_have_the_workers_and_the_object_store_that_were_chosen(tmp_path: Path) -> None:
    scale = ScaleOptions(name="local", workers=(1, 2), gpus_per_worker=0.5, object_store_mb=405)
    found = make_plan(tmp_path).at_scale(scale).trial_recipe({LR: 0.1, PERIOD: 1}).scale
    assert (found.workers, found.gpus_per_worker, found.object_store_mb) == ((1, 2), 0.5, 405)


def test_fingerprint_of_a_population_depends_on_its_size(tmp_path: Path) -> None:
    scheduler = {"name": "pbt", "measure": "pretrain.loss", "mode": "min", "interval": 1}
    changes: dict[str, Any] = {"algorithm": "random", "scheduler": scheduler}
    four, five = (make_plan(tmp_path, trials=trials, **changes).fingerprint() for trials in (4, 5))
    assert four != five
    assert make_plan(tmp_path, trials=4).fingerprint() == make_plan(tmp_path, trials=5).fingerprint()


def test_recipe_beside_the_search_hides_a_shipped_one_of_its_name(tmp_path: Path) -> None:
    search = write_files(tmp_path, recipe="quickstart.yaml")
    shipped = load_plan(search)
    (tmp_path / "recipe.yaml").rename(tmp_path / "quickstart.yaml")
    own = load_plan(search)
    assert (shipped.files.path, own.files.path) == (RECIPE_FOLDER / "quickstart.yaml", tmp_path / "quickstart.yaml")


def test_search_in_conf_names_a_recipe_of_this_conf(tmp_path: Path) -> None:
    """The file beside it that has the name is a search, as conf/search/quickstart.yaml of Firstlight itself."""
    folder = tmp_path / "conf" / "search"
    folder.mkdir(parents=True)
    search = write_files(folder, recipe="search.yaml")
    recipe = tmp_path / "conf" / "recipe" / "search.yaml"
    recipe.parent.mkdir()
    (folder / "recipe.yaml").rename(recipe)
    assert load_plan(search).files.path == recipe


def test_unknown_recipe_file_names_similar_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^recipe: 'nat/tabel3\.yaml' is neither .* did you mean 'nat/table3\.yaml'"):
        make_plan(tmp_path, recipe="nat/tabel3.yaml")
