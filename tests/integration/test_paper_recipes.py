"""Every recipe loads, says what it needs and what the paper reports, and has a trial run; three trials are run."""

import re
from pathlib import Path

import pytest
import torch

from firstlight.pipeline.config.catalog import RECIPES_FOLDER, list_recipes
from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.config.stages import DownstreamStage
from firstlight.pipeline.stages.pretraining.section import Pretrain
from firstlight.pipeline.stages.sections.finetune import Finetune
from tests.scripts import smoke
from tests.support.paths import WITHOUT_ROOT

NAMES = [recipe.name for recipe in list_recipes()]
# The tables of results of each paper; that of Clustering and Locality Penalties has none, but a figure.
TABLES = {"nat": range(1, 5), "spatial_contrasting": range(1, 3), "dae": range(2, 9), "super_and": range(1, 6)}
# All numbers of the papers' own rows of these tables, and of baselines that are methods here: those of `expected`.
PRINTED: dict[str, list[float]] = {
    "nat/table1": [59.2, 58.4],
    "nat/table2": [59.7, 58.5, 57.4],
    "nat/table3": [36.0, 12.0],
    "nat/table4": [56.7, 65.3, 49.4, 78.9, 79.9, 56.8],
    "spatial_contrasting/table1": [81.34, 72.6],
    "spatial_contrasting/table2": [79.2, 72.4],
    "dae/table2": [93.95, 93.67, 93.60, 94.93, 73.89, 72.15, 72.9, 75.41, 67.11, 66.71, 67.27, 69.87],
    "dae/table3": [
        75.68,
        76.35,
        95.08,
        93.95,
        73.89,
    ],  # and 75.41, 94.93 of table 2; 75.82 is of images that were withdrawn; Gaussian is of table 2
    "dae/table4": [67.1, 71.3],
    "dae/table5": [80.60, 59.81],  # section 4.2.3
    "dae/table6": [22.19, 23.50, 68.94, 69.38, 71.25, 67.11],  # and 23.87 of dae/imagenet; without pretraining: table 7
    "dae/table7": [67.11, 68.20, 69.23, 69.44, 68.24, 68.25, 69.08, 69.87, 71.25],
    "dae/table8": [67.02, 76.87, 67.11, 73.04, 79.04, 70.77, 72.17, 80.00, 70.93],
    "super_and/table1": [
        *(80.8, 60.3, 50.7, 32.7, 93.6, 79.8),  # Instance
        *(86.3, 74.8, 57.2, 41.5, 94.4, 90.9),  # AND
        *(89.2, 75.6, 61.5, 42.7, 94.9, 91.9),  # Super-AND
        87.4,  # figure 4, from the authors' log
    ],
    "super_and/table2": [27.0, 11.6, 32.3, 14.4, 39.0, 17.6],
    "super_and/table3": [90.5],  # 75.6 and 89.2 are of table 1
    "super_and/table4": [89.2, 88.7, 88.3, 86.4],
    "super_and/table5": [89.2, 87.5, 89.1],
}


def opened(name: str, trial: bool = False) -> Recipe:
    return load_recipe(
        RECIPES_FOLDER / f"{name}.yaml", () if name in WITHOUT_ROOT else ("dataset.root=/data",), smoke=trial
    )


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_needs_and_a_trial_of_the_same_network(name: str) -> None:
    recipe, trial = opened(name), opened(name, trial=True)
    assert recipe.name == name.replace("/", "-").replace("_", "-") or "/" not in name
    assert recipe.description
    assert recipe.needs is not None
    assert set(recipe.needs.after) <= set(NAMES)
    assert (trial.name, trial.seeds, trial.scale.workers) == (f"{recipe.name}-smoke", (0,), 0)
    assert trial.encoder == recipe.encoder, "the paper's network, in the trial too"
    assert list(trial.stages) == list(recipe.stages)


@pytest.mark.parametrize("name", NAMES)
def test_expected_number_is_listed_once(name: str) -> None:
    """Loading the recipe checks that the number is measured."""
    recipe = opened(name)
    assert len({(row.stage, row.measure, row.arm) for row in recipe.expected}) == len(recipe.expected)


def test_every_table_of_results_has_its_printed_numbers() -> None:
    assert set(PRINTED) == {f"{paper}/table{number}" for paper, numbers in TABLES.items() for number in numbers}


@pytest.mark.parametrize("table", PRINTED)
def test_recipes_expect_exactly_the_numbers_the_paper_prints(table: str) -> None:
    rows = [row for recipe in list_recipes() if re.fullmatch(rf"{table}(_.*)?", recipe.name) for row in recipe.expected]
    assert {number for row in rows for number in (row.paper, row.against) if number is not None} == set(PRINTED[table])
    assert all(row.source for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_encoders_a_recipe_takes_are_registered_by_recipes_it_needs(name: str) -> None:
    recipe = opened(name)
    assert recipe.needs is not None
    taken = {
        stage.encoder for stage in recipe.stages.values() if isinstance(stage, DownstreamStage) and stage.takes_encoder
    } - {"previous"}
    sources = [opened(before) for before in recipe.needs.after]
    given = {
        s.register_as
        for source in sources
        for s in source.stages.values()
        if isinstance(s, Pretrain | Finetune) and s.register_as
    }
    assert {re.sub(r"^models:/(.*)@current$", r"\1", reference) for reference in taken} <= given
    assert all(source.encoder == recipe.encoder for source in sources)


@pytest.mark.parametrize(("paper", "tables"), TABLES.items())
def test_every_table_has_a_recipe(paper: str, tables: range) -> None:
    found = {int(number) for name in NAMES for number in re.findall(rf"^{paper}/table(\d+)", name)}
    assert found == set(tables)


def test_recipes_run_after_those_they_need() -> None:
    order = smoke.in_order(["dae/table3_cifar100"])
    assert order == ["dae/table2_cifar10", "dae/imagenet_32", "dae/table3_cifar100"]


@pytest.mark.parametrize("name", ["quickstart", "dae/table2_cifar10", "super_and/table1_cifar10_resnet18"])
def test_trial_run_ends_with_a_table(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert smoke.trial(name, tmp_path) > 0
