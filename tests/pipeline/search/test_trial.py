"""A trial below Ray: what it tells on the way, how it ends, and that it goes on where it was."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.errors import StageFailed, StopTraining, UserError
from firstlight.pipeline.files import write_atomically
from firstlight.pipeline.run.runner import Place
from firstlight.pipeline.search import trial as module
from firstlight.pipeline.search.trial import LOG, OUTCOME, Reporter, Wanted, attempt, drive, weight, write_job
from firstlight.pipeline.tracking.retry import Unpublished
from firstlight.pipeline.train.loop import STOP
from tests.support import recipes

WANTED = Wanted(("evaluate.knn", "pretrain.loss"), "pretrain.loss", "pretrain")


def of_trial(storage: Path, **changes: Any) -> Recipe:
    recipe = recipes.recipe(storage, score_test=False, **changes)
    return recipe.model_copy(update={"stages": {name: recipe.stages[name] for name in ("pretrain", "evaluate")}})


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray Tune is told, without one."""
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(Reporter, "_report", lambda self, report: reports.append(report))
    return reports


def begun(tmp_path: Path, recipe: Recipe) -> Path:
    store: Store = recipes.store(tmp_path)
    write_job(tmp_path / "trial", recipe, store.path, {"firstlight.kind": "trial"}, WANTED)
    return tmp_path / "trial"


def outcome_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / OUTCOME).read_text()))


def test_to_its_end(tmp_path: Path, told: list[dict[str, Any]]) -> None:
    folder = begun(tmp_path, of_trial(tmp_path))
    drive({"folder": str(folder)})
    outcome = outcome_of(folder)
    assert (outcome["state"], outcome["reason"]) == ("done", "")
    assert [len(scores) for scores in outcome["scores"]] == [1, 1]
    assert 0.05 < outcome["scores"][0][0] <= 1.0
    assert [epochs for epochs, _ in outcome["seen"]] == pytest.approx([k / 3 for k in range(1, 7)]), (
        "3 steps an epoch, a row each"
    )
    assert [report["value"] for report in told if "value" in report] == [value for _, value in outcome["seen"]]
    assert outcome["seen"][-1][1] == outcome["scores"][1][0]
    assert "pretrain: done" in (folder / LOG).read_text()
    assert not list(folder.glob("finetune*"))


def test_asked_to_stop_it_stops_and_stays_stopped(
    tmp_path: Path, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path, of_trial(tmp_path, stages__pretrain__epochs=200))

    def ask(self: Reporter, report: dict[str, Any]) -> None:
        if "training" in report:
            write_atomically(Path(report["training"]) / STOP, b"behind others")

    monkeypatch.setattr(Reporter, "_report", ask)
    for _ in range(2):
        drive({"folder": str(folder)})
        outcome = outcome_of(folder)
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
def test_whatever_goes_wrong_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def explode(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(module, "run_in", explode)
    console = Console(file=io.StringIO())
    outcome = attempt(of_trial(tmp_path), WANTED, Place(tmp_path, {}), console)
    assert outcome == {"state": "failed", "reason": reason}


def test_where_mlflow_stays_away_it_is_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*arguments: Any) -> None:
        raise Unpublished("evaluate seed 0 is not in MLflow: connection refused")

    monkeypatch.setattr(module, "run_in", away)
    outcome = attempt(of_trial(tmp_path), WANTED, Place(tmp_path, {}), Console(file=io.StringIO()))
    assert (outcome["state"], outcome["again"]) == ("failed", True)


@pytest.mark.fault(37, "a loss that is not finite, in a trial")
def test_a_loss_that_is_not_finite_is_the_trials_own(tmp_path: Path, told: list[dict[str, Any]]) -> None:
    folder = begun(tmp_path, of_trial(tmp_path, stages__pretrain__optimizer__lr=1e38))
    drive({"folder": str(folder)})
    outcome = outcome_of(folder)
    assert outcome["state"] == "failed"
    assert "is not finite" in outcome["reason"]


def test_progress_goes_by_the_length_of_the_stages(tmp_path: Path, told: list[dict[str, Any]]) -> None:
    recipe = recipes.recipe(tmp_path)
    weights = [weight(stage) for stage in recipe.stages.values()]
    assert weights == [3.0 * 2, 2.0, 3.0 * 1 * 2 * 2]
    reporter = Reporter(recipe, Wanted(("finetune",), None, "pretrain"))
    for stage, share in (("pretrain", 0.5), ("evaluate", 1.0), ("finetune", 1.0)):
        reporter.told = -10.0
        reporter(stage, share, tmp_path / f"{stage}-seed0-x" / "metrics.jsonl", [{"step": 1, "of": 2, "loss": 0.25}])
    assert [report["progress"] for report in told] == pytest.approx([3 / 20, 8 / 20, 1.0])
    assert told[0]["so_far"] == "loss 0.25"


def test_only_the_first_seed_decides_and_no_step_twice(tmp_path: Path, told: list[dict[str, Any]]) -> None:
    reporter = Reporter(recipes.recipe(tmp_path, seeds=[3, 4]), WANTED)
    row = {"step": 3, "of": 6, "loss": 0.5}
    for seed, rows in ((3, [row]), (4, [row]), (3, [row, {**row, "step": 6, "loss": 0.25}])):
        reporter("pretrain", 0.5, tmp_path / f"pretrain-seed{seed}-x" / "metrics.jsonl", rows)
    assert reporter.seen == [(1.0, 0.5), (2.0, 0.25)]
    assert next(report for report in reversed(told) if "value" in report)["last"]
