"""A search: its trials, those that fail, how it goes on when it was killed, what MLflow then holds. Below Ray, and (marked ray) on it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console

from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.run import nodes
from firstlight.pipeline.run.nodes import Node
from firstlight.pipeline.run.ray_session import Session
from firstlight.pipeline.run.runner import run
from firstlight.pipeline.search import search as module
from firstlight.pipeline.search import tune
from firstlight.pipeline.search.ledger import LEDGER, OUTCOME, Ledger
from firstlight.pipeline.search.search import Found, search
from firstlight.pipeline.search.space import Plan
from firstlight.pipeline.search.trial import JOB, LOG, Reporter, drive
from firstlight.pipeline.tracking.client import Tracking, tracking_uri
from firstlight.pipeline.tracking.figures import Album
from tests.support import recipes, searches
from tests.support.searches import LR, PERIOD, plan

RATES = {LR: {"choice": [0.1, 0.2, 0.4, 1e38]}}  # the last is too large: a loss that is not finite
Trials = tune.Trials


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a store and MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("begun") / "runs"
    folder.mkdir()
    recipes.store(folder)
    Tracking(recipes.recipe(folder))
    return folder


@pytest.fixture(autouse=True)
def storage(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "runs")


def in_turn(trials: Trials, scheduler: Any, left: int, room: Any, folder: Path) -> None:
    while begun := trials.begin():
        drive({"folder": str(begun[1])})
        trials.ended(begun[0], "")


@pytest.fixture
def below_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials one after the other in this process."""
    monkeypatch.setattr(tune, "run_trials", in_turn)
    monkeypatch.setattr(Session, "start", lambda self, always=False: False)
    monkeypatch.setattr(nodes, "alive", lambda: [Node(2.0, 0.0)])
    monkeypatch.setattr(Reporter, "_report", lambda self, report: None)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all else."""
    monkeypatch.setattr(Album, "add", lambda self, name, figure, title: None)


def told(plan: Plan) -> tuple[Found, str]:
    console = Console(file=io.StringIO(), width=300)
    found = search(plan, console)
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def told_of(trial: Any) -> tuple[Any, ...]:
    """All that does not depend on when and how fast it was run."""
    parts = [(part.epochs, part.values, part.value, part.origin) for part in trial.parts]
    return trial.number, trial.state, trial.values, trial.scores, parts, trial.before, trial.seen


def runs_of(plan: Plan) -> list[Any]:
    client = mlflow.MlflowClient(tracking_uri(plan.base()))
    experiment = client.get_experiment_by_name("firstlight")
    return list(client.search_runs([experiment.experiment_id]))


def ledger_of(plan: Plan) -> dict[str, Any]:
    return dict(json.loads((folder_of(plan) / LEDGER).read_text()))


def folder_of(plan: Plan) -> Path:
    return plan.base().storage / plan.search.name / plan.fingerprint()


def test_trials_their_tree_and_the_promoted_model(tmp_path: Path, below_ray: None) -> None:
    wanted = plan(
        tmp_path,
        objectives=[{"measure": "evaluate.knn"}, {"measure": "pretrain.loss", "mode": "min"}],
        promote={"name": "digits"},
        trials=5,
    )
    found, lines = told(wanted)
    assert [trial.state for trial in found.trials] == ["done"] * 5
    assert found.best.means[0] == max(trial.means[0] for trial in found.trials)
    runs = {
        run.info.run_name: run for run in runs_of(wanted) if not run.info.run_name.startswith(("pretrain", "evaluate"))
    }
    assert set(runs) == {"small-search", "prepare", *(f"trial 00{k}" for k in range(5))}
    top = runs["small-search"]
    assert (top.info.status, top.data.tags["firstlight.kind"], top.data.tags["firstlight.best"]) == (
        "FINISHED",
        "search",
        str(found.best.number),
    )
    for trial in found.trials:
        mine = runs[f"trial {trial.name}"]
        assert (mine.info.status, mine.data.tags["mlflow.parentRunId"], mine.data.tags["firstlight.kind"]) == (
            "FINISHED",
            top.info.run_id,
            "trial",
        )
        assert float(mine.data.params[LR]) == trial.values[LR]
        assert mine.data.metrics["evaluate.knn"] == trial.means[0]
        below = {
            run.info.run_name for run in runs_of(wanted) if run.data.tags.get("mlflow.parentRunId") == mine.info.run_id
        }
        assert below == {"pretrain seed 0", "evaluate seed 0"}
    client = mlflow.MlflowClient(tracking_uri(wanted.base()))
    pictures = {file.path for file in client.list_artifacts(top.info.run_id, "figures")}
    assert {
        f"figures/{name}.png" for name in ("objective", "objective_pretrain.loss", "parallel", "pareto")
    } <= pictures
    assert not [
        name
        for run in runs_of(wanted)
        for name in run.data.metrics
        if "test" in name and not name.startswith(("images_", "of_train"))
    ]
    assert found.promoted == "models:/digits@best"
    assert client.get_model_version_by_alias("digits", "best").run_id == found.best.encoder
    assert (
        client.get_run(str(found.best.encoder)).data.tags["mlflow.parentRunId"]
        == runs[f"trial {found.best.name}"].info.run_id
    )
    assert "trial 004 done after" in lines
    assert found.report == folder_of(wanted) / "report.html"
    assert f"run {runs['trial 004'].info.run_id}" in found.report.read_text("utf-8")
    assert "report.html" in {file.path for file in client.list_artifacts(top.info.run_id)}


def test_done_before_nothing_is_run_and_the_promoted_model_is_the_same(
    tmp_path: Path, below_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(tmp_path, promote={"name": "digits"}, trials=2)
    before, _ = told(wanted)
    monkeypatch.setattr(tune, "run_trials", lambda *arguments: pytest.fail("a trial was run"))
    after, lines = told(wanted)
    assert (after.trials, after.promoted) == (before.trials, before.promoted)
    assert "note 2 trials have ended before, 0 go on where they were stopped" in lines
    client = mlflow.MlflowClient(tracking_uri(wanted.base()))
    assert len(client.search_model_versions("name = 'digits'")) == 1


def test_more_trials_are_added_to_those_that_there_are(tmp_path: Path, below_ray: None) -> None:
    before, _ = told(plan(tmp_path, trials=2))
    after, _ = told(plan(tmp_path, "trials=3"))
    assert after.trials[:2] == before.trials
    assert len(after.trials) == 3


def test_a_failed_trial_is_recorded_and_the_search_goes_on(tmp_path: Path, below_ray: None) -> None:
    wanted = plan(tmp_path, space=RATES, algorithm="grid", trials=None)
    found, lines = told(wanted)
    assert [trial.state for trial in found.trials] == ["done", "done", "done", "failed"]
    assert "is not finite" in found.trials[3].reason
    assert "trial 003 failed after" in lines
    (failed,) = [run for run in runs_of(wanted) if run.info.run_name == "trial 003"]
    assert failed.info.status == "FAILED"
    assert "is not finite" in failed.data.tags["firstlight.reason"]
    assert {r.info.status for r in runs_of(wanted) if r.data.tags.get("mlflow.parentRunId") == failed.info.run_id} == {
        "FAILED"
    }


def test_settings_that_do_not_go_together_fail_alone(tmp_path: Path, below_ray: None) -> None:
    space = {"stages.pretrain.batch_size": {"grid": [32, 8]}, "stages.pretrain.accumulate": {"grid": [1, 16]}}
    found, _ = told(plan(tmp_path, space=space, algorithm="grid", trials=None))
    assert [trial.state for trial in found.trials] == ["done", "done", "done", "failed"]
    assert found.trials[3].reason.startswith("stages.pretrain.batch_size: 8 is not valid")


def test_all_fail(tmp_path: Path, below_ray: None) -> None:
    wanted = plan(tmp_path, space={LR: {"choice": [1e38, 2e38]}}, trials=2)
    console = Console(file=io.StringIO(), width=300)
    with pytest.raises(StageFailed, match=r"none of the 2 trials has come to its end; \d of them: .*is not finite"):
        search(wanted, console)
    report = folder_of(wanted) / "report.html"
    assert f"what is known so far: {report}" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "none of the 2 trials has come to its end" in report.read_text("utf-8")
    (top,) = [run for run in runs_of(wanted) if run.info.run_name == "small-search"]
    assert top.info.status == "FAILED"
    client = mlflow.MlflowClient(tracking_uri(wanted.base()))
    assert "report.html" in {file.path for file in client.list_artifacts(top.info.run_id)}


def test_the_best_setting_is_run_whole_and_its_encoder_promoted(tmp_path: Path, below_ray: None) -> None:
    overrides = {"stages.pretrain.epochs": 1}
    wanted = plan(
        tmp_path,
        "seeds=[0,1]",
        overrides=overrides,
        trials=2,
        retrain=True,
        promote={"name": "digits", "alias": "champion"},
    )
    found, _ = told(wanted)
    assert found.retrained is not None
    assert found.retrained.stages["pretrain"].epochs == 2  # type: ignore[union-attr]
    assert [row.stage for row in found.rows] == ["evaluate", "evaluate", "finetune"]
    assert found.report is not None
    assert "classify, 40 labels" in found.report.read_text("utf-8"), "the table of the recipe's run"
    assert all(len(row.pretrained) == 2 for row in found.rows)
    client = mlflow.MlflowClient(tracking_uri(wanted.base()))
    promoted = client.get_run(client.get_model_version_by_alias("digits", "champion").run_id)
    best = client.get_run(promoted.data.tags["mlflow.parentRunId"])
    assert best.data.tags["firstlight.kind"] == "retrain"
    taken = searches.files(tmp_path).parent / "taken.json"
    taken.write_text((tmp_path / "recipe.yaml").read_text())
    recipe = wanted.whole(found.best.values)
    stages = {"finetune": recipe.stages["finetune"].model_copy(update={"encoder": str(found.promoted)})}
    rows = run(recipe.model_copy(update={"stages": stages, "name": "next"}), Console(quiet=True))
    assert rows[0].stage == "finetune"


def killed(plan: Plan, trials: int) -> None:
    """As a search is when its process is gone at the end of its last trials: the ledger does not know how they ended."""
    ledger = Ledger(folder_of(plan), ledger_of(plan)["store"])
    for trial in ledger.trials[-trials:]:
        trial.state, trial.scores, trial.reason, trial.seconds = "running", [], "", 0.0
    ledger.save()


def test_trials_that_ended_unseen_are_taken_over_and_those_that_did_not_go_on(tmp_path: Path, below_ray: None) -> None:
    wanted = plan(tmp_path, trials=3, algorithm="random")
    whole, _ = told(wanted)
    ids = {run.info.run_id for run in runs_of(wanted)}
    killed(wanted, trials=2)
    cut = folder_of(wanted) / "trials" / "002"
    (cut / OUTCOME).unlink()
    for file in (*cut.glob("evaluate*/result.json"), *cut.glob("evaluate*/published.json")):
        file.unlink()
    again, lines = told(wanted)
    assert "note 2 trials have ended before, 1 go on where they were stopped" in lines
    assert [(t.number, t.values, t.state, t.scores) for t in again.trials] == [
        (t.number, t.values, t.state, t.scores) for t in whole.trials
    ]
    assert {run.info.run_id for run in runs_of(wanted)} == ids
    assert "pretrain seed 0: finished before, unchanged" in (cut / LOG).read_text()


def test_a_trial_that_failed_by_what_was_around_it_goes_on(tmp_path: Path, below_ray: None, no_pictures: None) -> None:
    wanted = plan(tmp_path, trials=2, algorithm="random")
    whole, _ = told(wanted)
    ledger = Ledger(folder_of(wanted), ledger_of(wanted)["store"])
    ledger.trials[1].state, ledger.trials[1].scores, ledger.trials[1].again = "failed", [], True
    ledger.save()
    again, lines = told(wanted)
    assert "note 1 trials have ended before, 1 go on where they were stopped" in lines
    assert [told_of(trial) for trial in again.trials] == [told_of(trial) for trial in whole.trials]


def test_a_process_that_died_is_a_failed_trial(
    tmp_path: Path, below_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_turn(trials: Trials, scheduler: Any, left: int, room: Any, folder: Path) -> None:
        first = trials.begin()
        assert first
        trials.ended(first[0], "ActorDiedError: the worker was killed due to the node running low on memory.")
        while begun := trials.begin():
            drive({"folder": str(begun[1])})
            trials.ended(begun[0], "")

    monkeypatch.setattr(tune, "run_trials", in_turn)
    found, _ = told(plan(tmp_path, trials=2))
    assert [trial.state for trial in found.trials] == ["failed", "done"]
    assert found.trials[0].reason.startswith("its process was ended for want of memory: ")


def test_an_alias_is_pinned_when_the_search_begins(tmp_path: Path, below_ray: None) -> None:
    made, _ = told(plan(tmp_path, trials=1, promote={"name": "digits"}))
    changes: dict[str, Any] = {
        "space": {"stages.finetune.epochs": {"choice": [1, 2]}},
        "objectives": [{"measure": "finetune"}],
        "trials": 1,
    }
    wanted = plan(tmp_path, stages={"finetune": {"encoder": made.promoted}}, name="tuned", **changes)
    told(wanted)
    assert ledger_of(wanted)["references"] == {"finetune": "models:/digits/1"}
    job = json.loads((folder_of(wanted) / "trials" / "000" / JOB).read_text())
    assert job["recipe"]["stages"]["finetune"]["encoder"] == "models:/digits/1"
    assert list(job["recipe"]["stages"]) == ["finetune"]


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({}, ("scale.workers=2", "scale.cpus=2"), "scale: the 2 workers of a trial x 1 CPUs"),
        ({"space": {"stages.pretrain.batch_size": {"choice": [32, 33]}}}, ("scale.workers=2", "scale.cpus=8"), "space.stages.pretrain.batch_size:"),
        ({"space": {"stages.pretrain.batch_size": {"choice": [32, 5000]}}}, (), "space.stages.pretrain.batch_size: 5000 is more than the 100 images"),
        ({"space": {"encoder.depth": {"choice": [2, 9]}}}, (), "space: with encoder.depth: 9: dataset.image_size: 8"),
        ({}, ("tracking.uri=file:///tmp/x",), "tracking.uri: 'file:///tmp/x' is not valid"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_before_the_first_trial(
    tmp_path: Path,
    below_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    overrides: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(tune, "run_trials", lambda *arguments: pytest.fail("a trial was run"))
    with pytest.raises(UserError) as caught:
        search(plan(tmp_path, *overrides, **changes), Console(quiet=True))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


def test_halving_asks_and_does_not_forget(tmp_path: Path) -> None:
    """The worst of those that came to the first rung is asked to stop, also where the others came there before the search was stopped."""
    changes: dict[str, Any] = {
        "overrides": {"stages.pretrain.watch.every": 1},
        "objectives": [{"measure": "pretrain.watch_rankme"}],
        "scheduler": "asha",
    }
    wanted = plan(tmp_path, **changes).search
    before = [searches.done(k, {}, 0.5, seen=[(1.0, value), (3.0, value)]) for k, value in enumerate((0.9, 0.8, 0.7))]
    for known, stops in ((before, True), ([], False)):
        halving: Any = tune.scheduler(wanted, known, max_epochs=9)
        trial: Any = type("Trial", (), {"trial_id": "new"})()
        halving.on_trial_add(None, trial)
        file = tmp_path / str(stops) / "stop"
        file.parent.mkdir()
        report = {
            "epochs": 1.0,
            "value": 0.1,
            "so_far": "watch_rankme 0.1",
            "training": str(file.parent),
            "last": False,
        }
        assert halving.on_trial_result(None, trial, report) == "CONTINUE", "Tune ends no process"
        assert file.exists() == stops
        if stops:
            assert (
                halving.on_trial_result(None, trial, {**report, "epochs": 3.0, "so_far": "until it stops"})
                == "CONTINUE"
            )
    assert (tmp_path / "True" / "stop").read_text() == "behind others at 1 epochs: watch_rankme 0.1"


POPULATION: dict[str, Any] = {
    "algorithm": "random",
    "scheduler": {"name": "pbt", "measure": "pretrain.watch_knn", "interval": 2, "quantile": 0.5},
    "overrides": {"stages.pretrain.epochs": 6, "stages.pretrain.watch.every": 1, "stages.pretrain.watch.images": 20},
    "trials": 4,
}


def test_a_population(tmp_path: Path, below_ray: None, no_pictures: None) -> None:
    """Its trials train together; half of them go on from the others, twice."""
    wanted = plan(tmp_path, promote={"name": "digits"}, **POPULATION)
    found, lines = told(wanted)
    assert [trial.state for trial in found.trials] == ["done"] * 4
    assert [[part.epochs for part in trial.parts] for trial in found.trials] == [[2, 4]] * 4
    assert lines.count("goes on from trial") == 4
    assert sum(trial.parts[1].origin is not None for trial in found.trials) == 2
    for trial in found.trials:
        assert [epochs for epochs, _ in trial.seen] == pytest.approx([1, 2, 3, 4, 5, 6]), (
            "of a whole training, whoever began it"
        )
        first = trial if trial.parts[1].origin is None else found.trials[trial.parts[1].origin]
        assert trial.parts[0].values != trial.parts[1].values or first is trial
        began = trial if trial.origin is None else found.trials[trial.origin]
        assert trial.seen[3][1] == began.parts[1].value
        mine = next(run for run in runs_of(wanted) if run.info.run_name == f"trial {trial.name}")
        below = [run for run in runs_of(wanted) if run.data.tags.get("mlflow.parentRunId") == mine.info.run_id]
        changes = (trial.parts[1].origin is not None) + (trial.origin is not None)
        assert (
            sorted(run.info.status for run in below if run.info.run_name == "pretrain seed 0")
            == ["FINISHED"] + ["KILLED"] * changes
        )
        assert mine.data.metrics[f"space.{LR}"] == trial.parts[1].values[LR]
    assert not list(folder_of(wanted).glob("trials/*/handed/*")), "checkpoints that nobody goes on from any more"
    again, _ = told(wanted)
    assert [told_of(trial) for trial in again.trials] == [told_of(trial) for trial in found.trials]
    assert again.promoted == "models:/digits@best"


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_population_that_was_killed_ends_as_one_that_was_not(
    tmp_path: Path, below_ray: None, no_pictures: None, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """After so many of its six parts: in the middle of a round, and behind an exchange. The part after them was not seen to end."""
    changes = {**POPULATION, "trials": 2, "objectives": [{"measure": "pretrain.watch_knn"}]}
    whole, _ = told(plan(tmp_path, name="whole", **changes))
    assert whole.trials[0].origin is not None or whole.trials[1].origin is not None
    wanted = plan(tmp_path, **changes)
    with monkeypatch.context() as cut:

        def in_turn(trials: Trials, scheduler: Any, left: int, room: Any, folder: Path) -> None:
            for part in range(after + 1):
                begun = trials.begin()
                assert begun
                drive({"folder": str(begun[1])})
                if part == after:
                    raise KeyboardInterrupt
                trials.ended(begun[0], "")

        cut.setattr(tune, "run_trials", in_turn)
        with pytest.raises(KeyboardInterrupt):
            search(wanted, Console(quiet=True))
    found, _ = told(wanted)
    assert [told_of(trial) for trial in found.trials] == [told_of(trial) for trial in whole.trials]


def test_a_population_goes_on_without_one_that_fails(tmp_path: Path, below_ray: None, no_pictures: None) -> None:
    found, _ = told(plan(tmp_path, **{**POPULATION, "space": {LR: {"choice": [0.1, 0.2, 0.4, 1e38]}}, "seed": 1}))
    states = [trial.state for trial in found.trials]
    assert set(states) == {"done", "failed"}
    assert all(len(trial.parts) == 2 for trial in found.trials if trial.state == "done")


def wait_for(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if true():
            return
        time.sleep(0.2)
    process.kill()
    raise AssertionError(
        f"it did not come to that: {process.communicate(timeout=5) if process.returncode is not None else 'timeout'}"
    )


@pytest.mark.fault(8, "a search is killed, under Ray")
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_killed_in_the_middle_it_goes_on_to_the_same_trials(tmp_path: Path, ray_free: None) -> None:
    """Beside one that is not killed, run below Ray. One trial of four fails on purpose."""
    changes: dict[str, Any] = {
        "space": {**RATES, PERIOD: {"choice": [1, 2]}},
        "algorithm": "random",
        "trials": 4,
        "seed": 3,
    }
    changes |= {"overrides": {"stages.pretrain.epochs": 30, "stages.pretrain.checkpoint_every": 3}, "concurrency": 2}
    wanted = plan(tmp_path, **changes)
    program = [sys.executable, "-m", "pipeline", "search", str(tmp_path / "search.yaml")]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)

    def in_the_middle() -> bool:
        ended = len(list(folder_of(wanted).glob(f"trials/*/{OUTCOME}")))
        begun = len(list(folder_of(wanted).glob("trials/*/pretrain-seed0-*/checkpoints/*")))
        return ended >= 1 and begun > ended

    wait_for(process, in_the_middle)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {t["number"]: t for t in ledger_of(wanted)["trials"] if t["state"] != "running"}
    ids = {run.info.run_name: run.info.run_id for run in runs_of(wanted) if run.info.run_name.startswith("trial")}
    found, lines = told(wanted)
    assert [trial.number for trial in found.trials] == [0, 1, 2, 3]
    assert "go on where they were stopped" in lines
    for number, row in before.items():
        assert found.trials[number].ended == row["ended"], "a trial that had ended was run again"
    after = {run.info.run_name: run for run in runs_of(wanted) if run.info.run_name.startswith("trial")}
    assert len(after) == 4
    assert all(after[name].info.run_id == run_id for name, run_id in ids.items())
    assert {trial.state for trial in found.trials} == {"done", "failed"}
    for trial in found.trials:
        assert after[f"trial {trial.name}"].info.status == ("FINISHED" if trial.state == "done" else "FAILED")
        assert (trial.values[LR] == 1e38) == (trial.state == "failed")


@pytest.mark.fault(15, "trials with workers of their own, under Ray")
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_trial_with_workers_is_stopped_and_leaves_nothing_behind(
    tmp_path: Path, ray_free: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials one after the other, each with a trainer of its own; the second is worse, and is asked to stop."""
    changes: dict[str, Any] = {
        "space": {LR: {"grid": [0.1, 0.0001]}},
        "algorithm": "grid",
        "trials": None,
        "concurrency": 1,
        "objectives": [{"measure": "pretrain.loss", "mode": "min"}],
        "scheduler": {"name": "asha", "measure": "pretrain.loss", "mode": "min", "grace": 1},
        "overrides": {"stages.pretrain.epochs": 40},
    }
    groups: list[dict[str, Any]] = []
    real = module._Search.end

    def end(self: Any) -> Found:
        import ray

        groups.extend(group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED")
        return real(self)

    monkeypatch.setattr(module._Search, "end", end)
    wanted = plan(tmp_path, "scale.workers=1", "scale.cpus=3", "scale.cpus_per_worker=0.5", **changes)
    found, _ = told(wanted)
    assert [trial.state for trial in found.trials] == ["done", "stopped"]
    assert found.trials[1].reason.startswith("behind others at 1 epochs: loss ")
    assert groups == [], "neither of its trial's process nor of its trainer"
    statuses = {run.info.run_name: run.info.status for run in runs_of(wanted)}
    assert statuses["trial 001"] == "KILLED"
    assert {run.info.status for run in runs_of(wanted)} == {"FINISHED", "KILLED"}


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_population_on_ray_is_the_one_below_it(
    tmp_path: Path, ray_free: None, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of its three trials at a time, which wait for each other."""
    changes: dict[str, Any] = {**POPULATION, "trials": 3, "concurrency": 2}
    found, _ = told(plan(tmp_path, "scale.cpus=2", **changes))
    assert [trial.state for trial in found.trials] == ["done"] * 3
    assert sum(trial.parts[1].origin is not None for trial in found.trials) == 1
    monkeypatch.setattr(tune, "run_trials", in_turn)
    below, _ = told(plan(tmp_path, "scale.cpus=2", name="below", **changes))
    assert [told_of(trial) for trial in below.trials] == [told_of(trial) for trial in found.trials]
