"""Trial runs: the section `smoke` laid over a recipe; and the sections `expected` and `needs`, which decide nothing."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.config.load import load_recipe
from firstlight.pipeline.errors import UserError
from firstlight.pipeline.run.runner import run_recipe
from tests.support import recipes

pytestmark = pytest.mark.usefixtures("blank_figures")
RECIPE = """
name: mine
seeds: [3, 4]
storage: /shared
dataset: {name: digits, max_train: 500}
encoder: {name: convnet}
scale: {name: cluster, workers: 8}
defaults:
  pretrain: {epochs: 100, batch_size: 64, optimizer: {name: SGD, lr: 1.0}}
  evaluate: {encoder: models:/digits@current}
stages:
  first: {kind: pretrain, method: instance, register_as: digits}
  tuned: {kind: evaluate}
  seventh: {kind: evaluate, encoder: models:/digits/7}
smoke:
  dataset.max_train: 50
  defaults: {pretrain: {epochs: 1}}
  stages: {first: {batch_size: 16}}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE)
    return file


def test_overrides_win_over_smoke_and_smoke_over_the_recipe(mine: Path) -> None:
    whole, trial = load_recipe(mine), load_recipe(mine, ("dataset.max_train=60",), smoke=True)
    assert (whole.name, whole.seeds, whole.scale.workers, whole.dataset.max_train) == ("mine", (3, 4), 8, 500)
    assert (trial.name, trial.seeds, trial.storage, trial.dataset.max_train) == ("mine-smoke", (0,), Path("runs"), 60)
    assert (trial.scale.name, trial.scale.workers, trial.scale.gpus_per_worker) == ("local", 0, "auto")
    first: Any = trial.stages["first"]
    assert (first.epochs, first.batch_size, first.optimizer.lr, first.method.rounds) == (1, 16, 1.0, 1)


def test_trial_registers_models_under_other_names(mine: Path) -> None:
    """Else a minute's training would take the place of `digits@current`."""
    stages: Any = load_recipe(mine, smoke=True).stages
    assert stages["first"].register_as == "digits-smoke"
    assert (stages["tuned"].encoder, stages["seventh"].encoder) == (
        "models:/digits-smoke@current",
        "models:/digits-smoke/7",
    )
    whole: Any = load_recipe(mine).stages
    assert (whole["first"].register_as, whole["tuned"].encoder) == ("digits", "models:/digits@current")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("smoke:\n", "other:\n"), "smoke: is missing"),
        (("{first: {batch_size", "{fisrt: {batch_size"), "stages.fisrt.kind: 'fisrt' is unknown"),
        (("dataset.max_train: 50", "dataset.max_trian: 50"), "dataset.max_trian: unknown key"),
    ],
)
def test_wrong_smoke_section_is_a_one_line_error(mine: Path, change: tuple[str, str], told: str) -> None:
    mine.write_text(RECIPE.replace(*change))
    with pytest.raises(UserError) as error:
        load_recipe(mine, smoke=True)
    assert str(error.value).startswith(told)


EXPECTED = "expected: [{stage: tuned, measure: knn, paper: 90.0, source: table 1}]\n"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("stage: tuned", "stage: tund"), "expected.0.stage: 'tund' is no stage of this recipe; did you mean 'tuned'?"),
        (("measure: knn", "arm: he, measure: knn"), "expected.0.arm: 'he' is no arm of stages.tuned"),
        (
            ("measure: knn", "measure: top1"),
            "expected.0.measure: 'top1' is not measured by stages.tuned; valid: knn, probe",
        ),
        (("paper: 90.0", "paper: ninety"), 'expected.0.paper: "ninety" is not valid'),
        ((", source: table 1", ""), "expected.0.source: is missing"),
    ],
)
def test_wrong_expected_number_is_a_one_line_error(mine: Path, change: tuple[str, str], told: str) -> None:
    mine.write_text(RECIPE + EXPECTED)
    assert load_recipe(mine).expected[0].paper == 90.0
    mine.write_text(RECIPE + EXPECTED.replace(*change))
    with pytest.raises(UserError) as error:
        load_recipe(mine)
    assert str(error.value).startswith(told)


def test_expected_numbers_change_no_stage(tmp_path: Path) -> None:
    """The stages of a run are found again when numbers of the paper are added to its recipe."""
    told: dict[str, Any] = {"stage": "evaluate", "measure": "knn", "paper": 1.0, "source": "here"}
    plain = recipes.recipe(tmp_path, stages__pretrain__epochs=1)
    plain = plain.model_copy(update={"stages": {name: plain.stages[name] for name in ("pretrain", "evaluate")}})
    run_recipe(plain, Console(file=io.StringIO()))
    folders = set((tmp_path / plain.name).glob("*-seed*"))
    with_paper = recipes.recipe(tmp_path, stages__pretrain__epochs=1, expected=[told])
    with_paper = with_paper.model_copy(update={"stages": plain.stages})
    rows = run_recipe(with_paper, Console(file=io.StringIO())).rows
    assert [row.key for row in rows] == ["knn", "probe"]
    assert set((tmp_path / plain.name).glob("*-seed*")) == folders


def test_scratch_arm_alone_needs_no_pretraining(tmp_path: Path) -> None:
    stages = {"finetune": {**recipes.RECIPE["stages"]["finetune"], "arms": ["scratch"]}}
    assert list(recipes.recipe(tmp_path, stages=stages).stages) == ["finetune"]
    stages["finetune"]["arms"] = ["pretrained", "scratch"]
    with pytest.raises(UserError, match=r"stages\.finetune\.encoder: 'previous' needs a pretrain stage"):
        recipes.recipe(tmp_path, stages=stages)
