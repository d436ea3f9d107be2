"""Every recipe: loads, says what it needs and what the paper has, and has a trial run; three of those are run."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.config import Evaluate, Finetune, Pretrain, Recipe, load
from pipeline.recipes import FOLDER, listed
from tasks.downstream import TASKS
from tests import smoke

NAMES = [recipe.name for recipe in listed()]
# The tables of results of each paper; that of Clustering and Locality Penalties has none, but a figure.
TABLES = {"nat": range(1, 5), "spatial_contrasting": range(1, 3), "dae": range(2, 9), "super_and": range(1, 6)}
LOGGED = {"psnr": "dae", "consistency": "super_and"}  # of a pretraining, and whose


def opened(name: str, trial: bool = False) -> Recipe:
    return load(FOLDER / f"{name}.yaml", () if name == "quickstart" else ("dataset.root=/data",), smoke=trial)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_whole(name: str) -> None:
    recipe, trial = opened(name), opened(name, trial=True)
    assert recipe.name == name.replace("/", "-").replace("_", "-") or "/" not in name
    assert recipe.description
    assert recipe.needs is not None
    assert set(recipe.needs.after) <= set(NAMES)
    assert (trial.name, trial.seeds, trial.scale.workers) == (f"{recipe.name}-smoke", (0,), 0)
    assert trial.encoder == recipe.encoder, "the paper's network, in the trial too"
    assert list(trial.stages) == list(recipe.stages)


@pytest.mark.parametrize("name", NAMES)
def test_expected_numbers_can_be_measured(name: str) -> None:
    recipe = opened(name)
    assert len({(row.stage, row.measure, row.arm) for row in recipe.expected}) == len(recipe.expected), "a number stands twice"
    for row in recipe.expected:
        stage = recipe.stages[row.stage]
        if isinstance(stage, Finetune):
            assert row.measure == TASKS[stage.task.name].measure
        elif isinstance(stage, Evaluate):
            assert re.match(r"(knn|probe)", row.measure)
        elif isinstance(stage, Pretrain):
            assert row.measure == "accuracy" or LOGGED[row.measure] == stage.method.name


@pytest.mark.parametrize("name", NAMES)
def test_models_that_a_recipe_takes_are_registered_by_those_it_needs(name: str) -> None:
    recipe = opened(name)
    assert recipe.needs is not None
    taken = {stage.encoder for stage in recipe.stages.values() if isinstance(stage, Evaluate | Finetune) and stage.takes_encoder} - {"previous"}
    sources = [opened(before) for before in recipe.needs.after]
    given = {s.register_as for source in sources for s in source.stages.values() if isinstance(s, Pretrain) and s.register_as}
    assert {re.sub(r"^models:/(.*)@current$", r"\1", reference) for reference in taken} <= given
    assert all(source.encoder == recipe.encoder for source in sources)


@pytest.mark.parametrize(("paper", "tables"), TABLES.items())
def test_every_table_has_a_recipe(paper: str, tables: range) -> None:
    found = {int(number) for name in NAMES for number in re.findall(rf"^{paper}/table(\d+)", name)}
    assert found == set(tables)


def test_a_recipe_comes_behind_those_that_it_needs() -> None:
    order = smoke.in_order(["dae/table3_cifar100"])
    assert order == ["dae/table2_cifar10", "dae/imagenet_32", "dae/table3_cifar100"]


@pytest.mark.parametrize("name", ["quickstart", "dae/table2_cifar10", "super_and/table1_cifar10_resnet18"])
def test_trial(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert smoke.trial(name, tmp_path) > 0
