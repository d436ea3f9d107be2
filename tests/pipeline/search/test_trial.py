"""A trial without Ray: what it reports, how it ends, and that it resumes."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.config import load
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StageFailed, StopTraining, UserError
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.run.publishing import ParentRun
from firstlight.pipeline.search import trial as module
from firstlight.pipeline.search.ledger import OUTCOME_FILE
from firstlight.pipeline.search.trial import (
    TRIAL_LOG_FILE,
    Report,
    TrialReporter,
    TrialRequest,
    explain_death,
    run_stages,
    run_trial,
    weigh_stage,
    write_trial_file,
)
from firstlight.pipeline.stages.stage import StageInstance
from firstlight.pipeline.tracking.outbox import Unpublished
from firstlight.pipeline.train.loop import STOP_FILE
from tests.support import recipes

pytestmark = pytest.mark.usefixtures("undrawn_figures")

LENGTH = {"epochs": None, "steps": 15}
REQUEST = TrialRequest(("evaluate.knn", "pretrain.loss"), "pretrain.loss", "pretrain")


def make_recipe(storage: Path, **changes: Any) -> Recipe:
    recipe = recipes.recipe(storage, score_test=False, **changes)
    return recipe.model_copy(update={"stages": {name: recipe.stages[name] for name in ("pretrain", "evaluate")}})


def write_trial(folder: Path, store: Store, **changes: Any) -> Path:
    recipe = make_recipe(folder, **changes)
    write_trial_file(folder / "trial", recipe, store.path, {"firstlight.kind": "trial"}, REQUEST)
    return folder / "trial"


def read_outcome(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / OUTCOME_FILE).read_text()))


def make_instance(folder: Path, stage: str, seed: int = 0) -> StageInstance:
    return StageInstance(stage, seed, "f", folder / f"{stage}-{seed}")


def test_finished_trial_reports_and_writes_its_scores(tmp_path: Path, digits: Store) -> None:
    folder = write_trial(tmp_path, digits)
    reports: list[Report] = []
    load._validate_recipe.cache_clear()
    assert run_trial(folder, reports.append) == {"progress": 1.0, "stage": "done"}
    assert load._validate_recipe.cache_info().misses == 1, "its recipe is validated once in its process"
    outcome = read_outcome(folder)
    assert (outcome["state"], outcome["reason"]) == ("done", "")
    assert [len(scores) for scores in outcome["scores"]] == [1, 1]
    assert 0.05 < outcome["scores"][0][0] <= 1.0
    epochs = [epochs for epochs, _ in outcome["seen"]]
    assert epochs == pytest.approx([k / 3 for k in range(1, 7)]), "3 steps an epoch, a row each"
    assert [report["value"] for report in reports if "value" in report] == [value for _, value in outcome["seen"]]
    assert outcome["seen"][-1][1] == outcome["scores"][1][0]
    assert Path(outcome["training"]).parent == folder
    assert "pretrain: done" in (folder / TRIAL_LOG_FILE).read_text()
    assert not list(folder.glob("finetune*"))


def test_trial_that_is_asked_to_stop_stays_stopped(tmp_path: Path, digits: Store) -> None:
    folder = write_trial(tmp_path, digits, stages__pretrain__epochs=200)

    def request_stop(report: Report) -> None:
        if "training" in report:
            write_atomically(Path(report["training"]) / STOP_FILE, b"behind others")

    for _ in range(2):
        run_trial(folder, request_stop)
        outcome = read_outcome(folder)
        assert (outcome["state"], outcome["reason"]) == ("stopped", "behind others")
        assert outcome["seen"][-1][0] < 200


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("stages.pretrain.batch_size: too large"), "stages.pretrain.batch_size: too large"),
        (StopTraining("the loss of step 3\nis not finite"), "the loss of step 3 is not finite"),
        (StageFailed("rank 1: died"), "rank 1: died"),
        (MemoryError(), "MemoryError: no reason given"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines"),
            "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB",
        ),
    ],
)
def test_error_becomes_a_reason_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(module, "run_recipe", fail)
    outcome = run_stages(make_recipe(tmp_path), REQUEST, ParentRun(tmp_path, {}), Console(file=io.StringIO()))
    assert outcome == {"state": "failed", "reason": reason}


def test_trial_resumes_after_mlflow_was_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise Unpublished("evaluate seed 0 is not in MLflow: connection refused")

    monkeypatch.setattr(module, "run_recipe", fail)
    outcome = run_stages(make_recipe(tmp_path), REQUEST, ParentRun(tmp_path, {}), Console(file=io.StringIO()))
    assert (outcome["state"], outcome["again"]) == ("failed", True)


@pytest.mark.fault(37, "a loss that is not finite, in a trial")
def test_nonfinite_loss_fails_the_trial(tmp_path: Path, digits: Store) -> None:
    folder = write_trial(tmp_path, digits, stages__pretrain__optimizer__lr=1e38)
    run_trial(folder, lambda report: None)
    outcome = read_outcome(folder)
    assert outcome["state"] == "failed"
    assert "is not finite" in outcome["reason"]


def test_progress_is_weighted_by_the_length_of_stages(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path)
    weights = [weigh_stage(stage, 120) for stage in recipe.stages.values()]
    assert weights == [3.0 * 2, 2.0, 3.0 * 1 * 2 * 2]
    reports: list[Report] = []
    reporter = TrialReporter(recipe, TrialRequest(("finetune",), None, "pretrain"), 120, reports.append)
    for stage, share in (("pretrain", 0.5), ("evaluate", 1.0), ("finetune", 1.0)):
        reporter.last_report = -10.0
        reporter(make_instance(tmp_path, stage), share, [{"step": 1, "of": 2, "loss": 0.25}])
    assert [report["progress"] for report in reports] == pytest.approx([3 / 20, 8 / 20, 1.0])
    assert reports[0]["so_far"] == "loss 0.25"


def test_trial_of_a_training_in_steps_reports_its_steps(tmp_path: Path, digits: Store) -> None:
    folder = write_trial(tmp_path, digits, stages__pretrain__epochs=None, stages__pretrain__steps=4)
    reports: list[Report] = []
    run_trial(folder, reports.append)
    assert [step for step, _ in read_outcome(folder)["seen"]] == [1, 2, 3, 4]
    values = [report for report in reports if "value" in report]
    assert {report["unit"] for report in values} == {"steps"}
    assert [report["last"] for report in values] == [False, False, False, True]


def test_stage_in_steps_weighs_its_passes_over_the_images(tmp_path: Path) -> None:
    changes = {f"stages__{name}__{key}": value for name in ("pretrain", "finetune") for key, value in LENGTH.items()}
    stages = recipes.recipe(tmp_path, **changes).stages
    assert weigh_stage(stages["pretrain"], 120) == pytest.approx(3 * 15 * 32 / 120)
    assert weigh_stage(stages["finetune"], 120) == pytest.approx(3 * 15 * 20 / 120 * 2 * 2), "two arms, two rates"


def test_only_new_values_of_the_first_seed_are_reported(tmp_path: Path) -> None:
    reports: list[Report] = []
    reporter = TrialReporter(recipes.recipe(tmp_path, seeds=[3, 4]), REQUEST, 120, reports.append)
    row = {"step": 3, "of": 6, "loss": 0.5}
    for seed, rows in ((3, [row]), (4, [row]), (3, [row, {**row, "step": 6, "loss": 0.25}])):
        reporter(make_instance(tmp_path, "pretrain", seed), 0.5, rows)
    assert reporter.seen == [(1.0, 0.5), (2.0, 0.25)]
    assert reporter.training == str(tmp_path / "pretrain-3")
    values = [report for report in reports if "value" in report]
    assert [report["last"] for report in values] == [False, True]


def test_reason_of_a_dead_process_names_memory() -> None:
    error = "ActorDiedError:\n  the worker was killed due to the node running low on memory.\nmore"
    assert explain_death(error).endswith(
        "because memory ran out: the worker was killed due to the node running low on memory."
    )
    assert explain_death("ActorDiedError: exit code 1") == "its process was killed, or ended without an error message"
