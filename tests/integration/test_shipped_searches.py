"""Every shipped search file loads and resolves at every end of its space; every method and curve of a paper has one."""

from functools import cache
from typing import Any

import pytest

from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.search.checks import load_checked_plan
from firstlight.pipeline.search.plan import SearchPlan
from firstlight.pipeline.stages.sections.pretrain import Pretrain
from firstlight.tasks.pretrain import METHODS
from tests.support.paths import ROOT

FOLDER = ROOT / "conf" / "search"
STUDY_FOLDER = FOLDER / "study"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
STUDY_NAMES = sorted(file.stem for file in STUDY_FOLDER.glob("*.yaml"))
# The settings that each search must contain: keys of the pretraining stage.
SEARCHED = {
    "nat": {"method.permutation_period", "method.dim", "optimizer.lr"},
    "spatial_contrasting": {"method.layers", "method.patch_size", "method.patches"},
    "spatial_contrasting_pixel": {"method.layers", "method.patch_size", "method.patches"},
    "clustering_locality": {"method.alpha", "method.beta", "method.gamma", "labelled_per_batch"},
    "dae": {"method.corruption", "method.sigma", "method.blocks", "method.shortcuts"},
    "distill": {"method.map_weight", "method.hidden", "optimizer.lr"},
    "fixmatch": {"method.threshold", "method.cutoff", "method.consistency_weight", "batch_size"},
    "super_and": {"method.temperature", "method.ue_step", "method.ue_period", "method.momentum", "method.rounds"},
    "simclr": {"method.temperature", "method.decoupled", "method.dim", "batch_size"},
    "byol": {"method.momentum", "method.hidden", "method.dim", "optimizer.lr"},
    "vicreg": {"method.invariance", "method.variance", "method.covariance", "method.dim"},
    "lejepa": {"method.coefficient", "method.dim", "method.global_views", "method.directions"},
    "mae": {"method.mask_ratio", "method.normalize_pixels", "method.decoder_dim", "method.decoder_depth"},
    "dino": {"method.teacher_temperature", "method.momentum", "method.local_views", "method.prototypes"},
}


@cache
def open_search(name: str) -> SearchPlan:
    """Loads a search once: every test looks at all of them."""
    return load_checked_plan(FOLDER / f"{name}.yaml", () if name.startswith("quickstart") else ("dataset.root=/data",))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_search_loads_and_resolves_at_every_end(name: str) -> None:
    """`load_checked_plan` resolves a trial at every end of the space."""
    plan = open_search(name)
    assert plan.search.name == f"{name.replace('_', '-')}-search"
    assert plan.search.description
    assert len(plan.corner_values()) >= 2
    trial = plan.trial_recipe(plan.corner_values()[0])
    assert not trial.score_test
    assert plan.search.num_trials <= 40


@pytest.mark.parametrize("name", [name for name in NAMES if "figure" in name])
def test_curve_of_a_paper_is_a_grid_over_one_key(name: str) -> None:
    search = open_search(name).search
    assert (search.algorithm, len(search.space)) == ("grid", 1)
    (dimension,) = search.space.values()
    assert list(dimension.listed_values) == sorted(dimension.listed_values)
    assert all(isinstance(value, int) for value in dimension.listed_values)


def test_every_method_has_a_search_of_its_settings() -> None:
    assert set(SEARCHED) <= set(NAMES)
    assert {trial_method(name).name for name in SEARCHED} == set(METHODS)
    for name, keys in SEARCHED.items():
        plan = open_search(name)
        stage = plan.encoder_stage(plan.budget_recipe())
        assert {f"stages.{stage}.{key}" for key in keys} <= set(plan.search.space)


def trial_method(name: str) -> Any:
    """Returns the method of the trials of a search."""
    plan = open_search(name)
    stages: Any = plan.trial_recipe(plan.corner_values()[0]).stages
    return stages[str(plan.encoder_stage(plan.budget_recipe()))].method


def test_no_loss_is_compared_across_temperatures() -> None:
    """The scale of a loss changes with its temperature: the same embeddings have another value."""
    searches = {name: open_search(name).search for name in NAMES}
    warm = {name: one for name, one in searches.items() if any("temperature" in key for key in one.space)}
    assert warm.keys() >= {"quickstart", "simclr", "super_and"}
    assert not [name for name, one in warm.items() for found in one.objectives if "loss" in found.measure]


@pytest.mark.parametrize("name", NAMES)
def test_reconstructions_are_compared_for_one_corruption_and_on_held_out_images(name: str) -> None:
    """The ratio of a trial's own corruption says how hard that corruption is, not what the network has learned."""
    plan = open_search(name)
    for objective in plan.search.objectives:
        stage, _, what = objective.measure.partition(".")
        if what == "psnr":
            trials = [plan.trial_recipe(values) for values in plan.corner_values()]
            sections: list[Any] = [trial.stages[stage] for trial in trials]
            assert {section.kind for section in sections} == {"reconstruct"}
            assert all(section == sections[0] for section in sections)
            assert sections[0].images == "val"
    assert name != "dae" or "dae_reconstruct.psnr" in {one.measure for one in plan.search.objectives}


def test_every_pretraining_of_the_study_has_a_search_that_tried_its_setting() -> None:
    recipe = load_recipe(ROOT / "conf/recipe/study.yaml", ("dataset.root=/data",))
    tried = set()
    for name in STUDY_NAMES:
        search = load_checked_plan(STUDY_FOLDER / f"{name}.yaml", ("dataset.root=/data",)).search
        assert (search.name, search.recipe) == (f"study-{name.replace('_', '-')}-search", "study.yaml")
        assert search.overrides["seeds"] not in [[seed] for seed in recipe.seeds], "a seed that the study does not have"
        ((key, dimension),) = search.space.items()
        stage, what = key.removeprefix("stages.").split(".", 1)
        assert what == "optimizer.lr"
        # Settings are the same for both numbers of labels.
        stages = [other for other in recipe.stages if other in (stage, stage.replace("_400", "_40"))]
        for pretraining in stages:
            made = recipe.stages[pretraining]
            assert isinstance(made, Pretrain)
            assert made.optimizer.lr in dimension.listed_values
        tried |= set(stages)
    assert tried == {name for name, stage in recipe.stages.items() if isinstance(stage, Pretrain)}
