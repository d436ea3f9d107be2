"""Every search file that ships: loads, and resolves at every end of its space; every method has one, and every curve of a paper that is one."""

from typing import Any

import pytest

from firstlight.pipeline.search.checks import read
from firstlight.pipeline.search.space import Plan
from firstlight.tasks.pretrain import METHODS
from tests.support.paths import ROOT

FOLDER = ROOT / "conf" / "search"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
# What the issue of each method's paper is about: keys below the pretraining stage.
SEARCHED = {
    "nat": {"method.permutation_period", "method.dim", "optimizer.lr"},
    "spatial_contrasting": {"method.layers", "method.patch_size", "method.patches"},
    "spatial_contrasting_pixel": {"method.layers", "method.patch_size", "method.patches"},
    "clustering_locality": {"method.alpha", "method.beta", "method.gamma", "labelled_per_batch"},
    "dae": {"method.corruption", "method.sigma", "method.blocks", "method.shortcuts"},
    "super_and": {"method.temperature", "method.ue_step", "method.ue_period", "method.momentum", "method.rounds"},
}


def opened(name: str) -> Plan:
    return read(FOLDER / f"{name}.yaml", () if name.startswith("quickstart") else ("dataset.root=/data",))


@pytest.mark.parametrize("name", NAMES)
def test_a_search_is_whole(name: str) -> None:
    """`read` resolves a trial at every end of the space."""
    plan = opened(name)
    assert plan.search.name == f"{name.replace('_', '-')}-search"
    assert plan.search.description
    assert len(plan.corners()) >= 2
    trial = plan.trial(plan.corners()[0])
    assert not trial.score_test
    assert plan.search.total <= 40


@pytest.mark.parametrize("name", [name for name in NAMES if "figure" in name])
def test_a_curve_of_a_paper_is_a_grid_over_one_key(name: str) -> None:
    search = opened(name).search
    assert (search.algorithm, len(search.space)) == ("grid", 1)
    (dimension,) = search.space.values()
    assert list(dimension.listed) == sorted(dimension.listed)
    assert all(isinstance(value, int) for value in dimension.listed)


def test_every_method_has_a_search_of_its_settings() -> None:
    assert set(SEARCHED) <= set(NAMES)
    assert {plan_of(name).name for name in SEARCHED} == set(METHODS)
    for name, keys in SEARCHED.items():
        stage = name.removesuffix("_pixel")
        assert {f"stages.{stage}.{key}" for key in keys} <= set(opened(name).search.space)


def plan_of(name: str) -> Any:
    """The method of the trials of a search."""
    plan = opened(name)
    stages: Any = plan.trial(plan.corners()[0]).stages
    return stages[str(plan.maker(plan.base()))].method
