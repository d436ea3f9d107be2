"""A search: its trials, those that fail, how it resumes, and what MLflow has. Without Ray, and (marked ray) on it."""

import io
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console

from firstlight.pipeline.errors import StageFailed, UserError
from firstlight.pipeline.run import nodes
from firstlight.pipeline.run.nodes import Node
from firstlight.pipeline.run.ray_session import RaySession
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.search import search as module
from firstlight.pipeline.search import tune
from firstlight.pipeline.search.ledger import LEDGER_FILE, OUTCOME_FILE, SearchState
from firstlight.pipeline.search.plan import SearchPlan
from firstlight.pipeline.search.search import SearchResult, run_search
from firstlight.pipeline.search.trial import TRIAL_FILE, TRIAL_LOG_FILE, run_trial
from firstlight.pipeline.search.tune import TrialSource
from firstlight.pipeline.tracking.client import TrackingClient
from firstlight.pipeline.tracking.location import TrackingLocation
from tests.support import command, recipes
from tests.support.searches import LR, PERIOD, make_plan
from tests.support.trials_in_turn import run_in_turn

pytestmark = pytest.mark.usefixtures("undrawn_figures")

# The last rate makes the loss infinite.
RATES = {LR: {"choice": [0.1, 0.2, 0.4, 1e38]}}
ONE_EPOCH = {"stages.pretrain.epochs": 1}
# No search here is judged by the linear probe.
ONE_PROBE = {"stages.evaluate.probe_weight_decays": [0.001]}
ONE_RATE: dict[str, Any] = {"learning_rates": []}
FINISHED: dict[str, Any] = {
    "objectives": [{"measure": "evaluate.knn"}, {"measure": "pretrain.loss", "mode": "min"}],
    "promote": {"name": "digits"},
    "algorithm": "random",
    "overrides": ONE_PROBE,
    "trials": 3,
}
POPULATION: dict[str, Any] = {
    "algorithm": "random",
    "scheduler": {"name": "pbt", "measure": "pretrain.watch_knn", "interval": 2, "quantile": 0.5},
    "overrides": {
        **{"stages.pretrain.epochs": 6, "stages.pretrain.watch.every": 1, "stages.pretrain.watch.images": 20},
        **ONE_PROBE,
    },
    "trials": 4,
}
PAIR: dict[str, Any] = {**POPULATION, "trials": 2, "objectives": [{"measure": "pretrain.watch_knn"}]}
# Needs no stage after the pretraining.
BY_LOSS: dict[str, Any] = {"objectives": [{"measure": "pretrain.loss", "mode": "min"}], "overrides": ONE_EPOCH}


@contextmanager
def trials_in_process() -> Iterator[None]:
    """Runs trials one after the other in this process, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "run_trials", run_in_turn)
        patch.setattr(RaySession, "start", lambda self, always=False: False)
        patch.setattr(nodes, "list_live_nodes", lambda: [Node(2.0, 0.0)])
        yield


@pytest.fixture
def without_ray() -> Iterator[None]:
    with trials_in_process():
        yield


@dataclass(frozen=True)
class Finished:
    """A finished search without Ray, in a folder of its own."""

    folder: Path
    plan: SearchPlan
    result: SearchResult
    lines: str


@pytest.fixture(scope="module")
def empty_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a store and MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("empty") / "runs"
    folder.mkdir()
    recipes.store(folder)
    TrackingClient(recipes.recipe(folder))
    return folder


@pytest.fixture(autouse=True)
def storage(empty_storage: Path, tmp_path: Path) -> None:
    shutil.copytree(empty_storage, tmp_path / "runs")


def finish_search(folder: Path, empty_storage: Path, **changes: Any) -> Finished:
    shutil.copytree(empty_storage, folder / "runs")
    plan = make_plan(folder, **changes)
    with trials_in_process():
        return Finished(folder, plan, *search_quietly(plan))


@pytest.fixture(scope="module")
def finished(empty_storage: Path, undrawn_figures: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish_search(tmp_path_factory.mktemp("finished"), empty_storage, **FINISHED)


@pytest.fixture(scope="module")
def finished_pair(empty_storage: Path, undrawn_figures: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A population of two trials."""
    return finish_search(tmp_path_factory.mktemp("pair"), empty_storage, **PAIR)


@pytest.fixture
def copy_of_finished(finished: Finished, storage: None, tmp_path: Path, without_ray: None) -> SearchPlan:
    """The plan of a copy of the finished search, which the same command resumes."""
    shutil.rmtree(tmp_path / "runs")
    shutil.copytree(finished.folder / "runs", tmp_path / "runs")
    return make_plan(tmp_path, **FINISHED)


def search_quietly(plan: SearchPlan) -> tuple[SearchResult, str]:
    console = Console(file=io.StringIO(), width=300)
    result = run_search(plan, console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def comparable_fields(trial: Any) -> tuple[Any, ...]:
    """Returns all that does not depend on when and how fast a trial was run."""
    parts = [(part.end, part.values, part.value, part.origin) for part in trial.parts]
    return trial.number, trial.state, trial.values, trial.scores, parts, trial.before, trial.seen


def make_client(plan: SearchPlan) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(TrackingLocation.of(plan.budget_recipe()).uri)


def find_runs(plan: SearchPlan) -> list[Any]:
    client = make_client(plan)
    return list(client.search_runs([client.get_experiment_by_name("firstlight").experiment_id]))


def find_child_runs(plan: SearchPlan, parent: Any) -> list[Any]:
    return [run for run in find_runs(plan) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def find_folder(plan: SearchPlan) -> Path:
    return plan.budget_recipe().storage / plan.search.name / plan.fingerprint()


def read_ledger(plan: SearchPlan) -> dict[str, Any]:
    return dict(json.loads((find_folder(plan) / LEDGER_FILE).read_text()))


def open_state(plan: SearchPlan) -> SearchState:
    return SearchState(find_folder(plan), read_ledger(plan)["store"])


def named_runs(plan: SearchPlan) -> dict[str, Any]:
    """Returns the runs of a search by name, without those of stages."""
    stages = ("pretrain", "evaluate")
    return {run.info.run_name: run for run in find_runs(plan) if not run.info.run_name.startswith(stages)}


def test_runs_of_a_search_form_a_tree(finished: Finished) -> None:
    result, runs = finished.result, named_runs(finished.plan)
    assert [trial.state for trial in result.trials] == ["done"] * 3
    assert set(runs) == {"small-search", "prepare", *(f"trial 00{k}" for k in range(3))}
    top = runs["small-search"]
    assert top.info.status == "FINISHED"
    assert top.data.tags["firstlight.kind"] == "search"
    assert top.data.tags["firstlight.best"] == str(result.best.number)
    for trial in result.trials:
        run = runs[f"trial {trial.name}"]
        assert run.info.status == "FINISHED"
        assert (run.data.tags["mlflow.parentRunId"], run.data.tags["firstlight.kind"]) == (top.info.run_id, "trial")
        assert float(run.data.params[LR]) == trial.values[LR]
        assert run.data.metrics["evaluate.knn"] == trial.means[0]
        children = {child.info.run_name for child in find_child_runs(finished.plan, run)}
        assert children == {"pretrain seed 0", "evaluate seed 0"}


def test_no_run_of_a_search_scores_the_test_split(finished: Finished) -> None:
    names = [name for run in find_runs(finished.plan) for name in run.data.metrics]
    assert names
    assert not [name for name in names if "test" in name and not name.startswith(("images_", "of_train"))]


def test_best_trial_is_promoted(finished: Finished) -> None:
    result, client = finished.result, make_client(finished.plan)
    assert result.best.means[0] == max(trial.means[0] for trial in result.trials)
    assert result.promoted == "models:/digits@best"
    assert client.get_model_version_by_alias("digits", "best").run_id == result.best.encoder
    trial_run = named_runs(finished.plan)[f"trial {result.best.name}"].info.run_id
    assert client.get_run(str(result.best.encoder)).data.tags["mlflow.parentRunId"] == trial_run


def test_figures_and_report_are_logged(finished: Finished) -> None:
    client, runs = make_client(finished.plan), named_runs(finished.plan)
    top, report = runs["small-search"].info.run_id, finished.result.report
    figures = {Path(file.path).stem for file in client.list_artifacts(top, "figures")}
    assert {"objective", "objective_pretrain.loss", "parallel", "pareto"} <= figures
    assert "trial 002 done after" in finished.lines
    assert report == find_folder(finished.plan) / "report.html"
    assert f"run {runs['trial 002'].info.run_id}" in report.read_text("utf-8")
    assert "report.html" in {file.path for file in client.list_artifacts(top)}


def test_finished_search_runs_nothing_and_promotes_the_same_model(
    finished: Finished, copy_of_finished: SearchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "run_trials", lambda *arguments: pytest.fail("a trial was run"))
    result, lines = search_quietly(copy_of_finished)
    assert (result.trials, result.promoted) == (finished.result.trials, finished.result.promoted)
    assert "note 3 trials have ended before, 0 resume" in lines
    assert len(make_client(copy_of_finished).search_model_versions("name = 'digits'")) == 1


def test_larger_number_of_trials_adds_trials(finished: Finished, copy_of_finished: SearchPlan, tmp_path: Path) -> None:
    result, _ = search_quietly(make_plan(tmp_path, "trials=4", **FINISHED))
    assert result.trials[:3] == finished.result.trials
    assert [trial.state for trial in result.trials] == ["done"] * 4


def forget_last_ends(plan: SearchPlan, trials: int) -> None:
    """Leaves the ledger as if the search was killed before it saw the outcome of its last trials."""
    state = open_state(plan)
    for trial in state.trials[-trials:]:
        trial.state, trial.scores, trial.reason, trial.seconds = "running", [], "", 0.0
    state.save()


def test_killed_search_loads_unseen_outcomes_and_resumes_the_others(
    finished: Finished, copy_of_finished: SearchPlan
) -> None:
    ids = {run.info.run_id for run in find_runs(copy_of_finished)}
    forget_last_ends(copy_of_finished, trials=2)
    cut = find_folder(copy_of_finished) / "trials" / "002"
    (cut / OUTCOME_FILE).unlink()
    for file in (*cut.glob("evaluate*/result.json"), *cut.glob("evaluate*/published.json")):
        file.unlink()
    result, lines = search_quietly(copy_of_finished)
    assert "note 2 trials have ended before, 1 resume" in lines
    assert [(t.number, t.values, t.state, t.scores) for t in result.trials] == [
        (t.number, t.values, t.state, t.scores) for t in finished.result.trials
    ]
    assert {run.info.run_id for run in find_runs(copy_of_finished)} == ids
    assert "pretrain seed 0: finished before, unchanged" in (cut / TRIAL_LOG_FILE).read_text()


def test_trial_that_failed_from_outside_resumes(finished: Finished, copy_of_finished: SearchPlan) -> None:
    state = open_state(copy_of_finished)
    state.trials[1].state, state.trials[1].scores, state.trials[1].again = "failed", [], True
    state.save()
    result, lines = search_quietly(copy_of_finished)
    assert "note 2 trials have ended before, 1 resume" in lines
    assert [*map(comparable_fields, result.trials)] == [*map(comparable_fields, finished.result.trials)]


def test_failed_trial_is_recorded_and_the_search_continues(tmp_path: Path, without_ray: None) -> None:
    plan = make_plan(tmp_path, space={LR: {"choice": [0.1, 1e38]}}, algorithm="grid", trials=None, **BY_LOSS)
    result, lines = search_quietly(plan)
    assert [trial.state for trial in result.trials] == ["done", "failed"]
    assert "is not finite" in result.trials[1].reason
    assert "trial 001 failed after" in lines
    run = named_runs(plan)["trial 001"]
    assert run.info.status == "FAILED"
    assert "is not finite" in run.data.tags["firstlight.reason"]
    assert {child.info.status for child in find_child_runs(plan, run)} == {"FAILED"}


def test_settings_that_are_invalid_together_fail_one_trial(tmp_path: Path, without_ray: None) -> None:
    space = {"stages.pretrain.batch_size": {"grid": [32, 8]}, "stages.pretrain.accumulate": {"grid": [1, 16]}}
    plan = make_plan(tmp_path, space=space, algorithm="grid", trials=None, **BY_LOSS)
    result, _ = search_quietly(plan)
    assert [trial.state for trial in result.trials] == ["done", "done", "done", "failed"]
    assert result.trials[3].reason.startswith("stages.pretrain.batch_size: 8 is not valid")


def test_search_without_a_finished_trial_fails_with_a_report(tmp_path: Path, without_ray: None) -> None:
    plan = make_plan(tmp_path, space={LR: {"choice": [1e38, 2e38]}}, trials=2)
    console = Console(file=io.StringIO(), width=300)
    with pytest.raises(StageFailed, match=r"none of the 2 trials has finished; \d of them: .*is not finite"):
        run_search(plan, console)
    report = find_folder(plan) / "report.html"
    assert f"what is known so far: {report}" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "none of the 2 trials has finished" in report.read_text("utf-8")
    top = named_runs(plan)["small-search"]
    assert top.info.status == "FAILED"
    assert "report.html" in {file.path for file in make_client(plan).list_artifacts(top.info.run_id)}


def test_recipe_is_run_with_the_best_setting_and_its_encoder_promoted(tmp_path: Path, without_ray: None) -> None:
    promote = {"name": "digits", "alias": "champion"}
    stages = {"finetune": ONE_RATE, "evaluate": {"probe_weight_decays": [0.001]}}
    changes: dict[str, Any] = {**BY_LOSS, "stages": stages}
    plan = make_plan(tmp_path, "seeds=[0,1]", trials=2, retrain=True, promote=promote, **changes)
    result, _ = search_quietly(plan)
    assert result.retrained is not None
    pretrain: Any = result.retrained.stages["pretrain"]
    assert pretrain.epochs == 2, "without the budget of a trial"
    assert [row.stage for row in result.rows] == ["evaluate", "evaluate", "finetune"]
    assert all(len(row.pretrained) == 2 for row in result.rows)
    assert result.report is not None
    assert "classify, 40 labels" in result.report.read_text("utf-8"), "the table of the recipe's run"
    client = make_client(plan)
    promoted = client.get_run(client.get_model_version_by_alias("digits", "champion").run_id)
    parent = client.get_run(promoted.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["firstlight.kind"] == "retrain"
    recipe = plan.full_recipe(result.best.values)
    tuned = recipe.stages["finetune"].model_copy(update={"encoder": str(result.promoted)})
    following = recipe.model_copy(update={"stages": {"finetune": tuned}, "name": "next", "seeds": (0,)})
    rows = run_recipe(following, Console(quiet=True)).rows
    assert rows[0].stage == "finetune", "another recipe can use the promoted encoder"


def test_dead_process_fails_its_trial(tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_after_a_death(source: TrialSource, *arguments: Any) -> None:
        first = source.begin_trial()
        assert first
        source.end_trial(first[0], "ActorDiedError: the worker was killed due to the node running low on memory.")
        run_in_turn(source, *arguments)

    monkeypatch.setattr(tune, "run_trials", run_after_a_death)
    result, _ = search_quietly(make_plan(tmp_path, trials=2, **BY_LOSS))
    assert [trial.state for trial in result.trials] == ["failed", "done"]
    assert result.trials[0].reason.startswith("its process was killed because memory ran out: ")


def test_given_weights_are_pinned_when_the_search_begins(copy_of_finished: SearchPlan, tmp_path: Path) -> None:
    overrides = {**ONE_EPOCH, "encoder.weights": "models:/digits@best"}
    changes: dict[str, Any] = {**BY_LOSS, "trials": 1, "overrides": overrides}
    plan = make_plan(tmp_path, name="continued", **changes)
    search_quietly(plan)
    assert read_ledger(plan)["references"] == {"encoder.weights": "models:/digits/1"}
    fields = json.loads((find_folder(plan) / "trials" / "000" / TRIAL_FILE).read_text())
    assert fields["recipe"]["encoder"]["weights"] == "models:/digits/1"


def test_alias_is_resolved_when_the_search_begins(copy_of_finished: SearchPlan, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "space": {"stages.finetune.epochs": {"choice": [1, 2]}},
        "objectives": [{"measure": "finetune"}],
        "trials": 1,
    }
    stages = {"finetune": {"encoder": "models:/digits@best", **ONE_RATE}}
    plan = make_plan(tmp_path, stages=stages, name="tuned", **changes)
    search_quietly(plan)
    assert read_ledger(plan)["references"] == {"finetune": "models:/digits/1"}
    fields = json.loads((find_folder(plan) / "trials" / "000" / TRIAL_FILE).read_text())
    assert fields["recipe"]["stages"]["finetune"]["encoder"] == "models:/digits/1"
    assert list(fields["recipe"]["stages"]) == ["finetune"]


BATCH_SIZE = "stages.pretrain.batch_size"


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({}, ("scale.workers=2", "scale.cpus=2"), "scale: the 2 workers of a trial x 1 CPUs"),
        (
            {"space": {BATCH_SIZE: {"choice": [32, 33]}}},
            ("scale.workers=2", "scale.cpus=8"),
            f"space.{BATCH_SIZE}:",
        ),
        ({"space": {BATCH_SIZE: {"choice": [32, 5000]}}}, (), f"space.{BATCH_SIZE}: 5000 is more than the 110 images"),
        ({"space": {"encoder.depth": {"choice": [2, 9]}}}, (), "space: with encoder.depth: 9: dataset.image_size: 8"),
        ({}, ("tracking.uri=file:///tmp/x",), "tracking.uri: 'file:///tmp/x' is not valid"),
    ],
)
def test_invalid_search_is_refused_before_its_first_trial(
    tmp_path: Path,
    without_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    overrides: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(tune, "run_trials", lambda *arguments: pytest.fail("a trial was run"))
    with pytest.raises(UserError) as caught:
        run_search(make_plan(tmp_path, *overrides, **changes), Console(quiet=True))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


IN_STEPS = {"stages.pretrain.epochs": None, "stages.pretrain.steps": 10}


def test_population_of_trainings_in_steps_pauses_inside_epochs(tmp_path: Path, without_ray: None) -> None:
    """Epochs have three steps. The trials that keep their networks end as a training that never pauses.

    Two of four trials take the networks of the others at each exchange.
    """
    scheduler = {"name": "pbt", "measure": "pretrain.loss", "mode": "min", "interval": 4, "quantile": 0.5}
    changes = {**POPULATION, **BY_LOSS, "overrides": IN_STEPS, "scheduler": scheduler}
    plan = make_plan(tmp_path, **changes)
    result, lines = search_quietly(plan)
    assert [trial.state for trial in result.trials] == ["done"] * 4
    assert [([part.end for part in trial.parts], trial.unit) for trial in result.trials] == [([4, 8], "steps")] * 4
    assert all([step for step, _ in trial.seen] == list(range(1, 11)) for trial in result.trials)
    assert len(re.findall(r"trial \d+ continues from trial \d+ at 4 steps, with", lines)) == 2
    assert len(re.findall(r"trial \d+ continues from trial \d+ at 8 steps, with", lines)) == 2
    assert lines.count("continues from trial") == 4
    assert sum(trial.parts[1].origin is not None for trial in result.trials) == 2


def test_interval_of_steps_that_misses_the_ends_of_epochs_is_refused(
    tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "run_trials", lambda *arguments: pytest.fail("a trial was run"))
    scheduler = {**POPULATION["scheduler"], "interval": 4}
    overrides = {**IN_STEPS, "stages.pretrain.watch.every": 2, "stages.pretrain.watch.images": 20}
    with pytest.raises(UserError) as caught:
        search_quietly(make_plan(tmp_path, **{**POPULATION, "scheduler": scheduler, "overrides": overrides}))
    assert str(caught.value) == (
        "scheduler.interval: 4 is not valid: pretrain.watch_knn is known every 6 steps, 2 epochs "
        "(stages.pretrain.watch.every); valid: a multiple of that"
    )


def test_population_exchanges_networks_twice(tmp_path: Path, without_ray: None) -> None:
    plan = make_plan(tmp_path, promote={"name": "digits"}, **{**POPULATION, "trials": 2})
    result, lines = search_quietly(plan)
    assert [trial.state for trial in result.trials] == ["done"] * 2
    assert [[part.end for part in trial.parts] for trial in result.trials] == [[2, 4]] * 2
    assert lines.count("continues from trial") == 2
    assert sum(trial.parts[1].origin is not None for trial in result.trials) == 1
    runs = named_runs(plan)
    for trial in result.trials:
        epochs = [epochs for epochs, _ in trial.seen]
        assert epochs == pytest.approx([1, 2, 3, 4, 5, 6]), "those of a whole training, whichever trial began it"
        copied = trial.parts[1].origin is not None
        assert trial.parts[0].values != trial.parts[1].values or not copied
        origin = trial if trial.origin is None else result.trials[trial.origin]
        assert trial.seen[3][1] == origin.parts[1].value
        run = runs[f"trial {trial.name}"]
        children = [child for child in find_child_runs(plan, run) if child.info.run_name == "pretrain seed 0"]
        changes = copied + (trial.origin is not None)
        assert sorted(child.info.status for child in children) == ["FINISHED"] + ["KILLED"] * changes
        assert run.data.metrics[f"space.{LR}"] == trial.parts[1].values[LR]
    assert not list(find_folder(plan).glob("trials/*/handed/*")), "copied checkpoints are removed after their use"
    again, _ = search_quietly(plan)
    assert [*map(comparable_fields, again.trials)] == [*map(comparable_fields, result.trials)]
    assert again.promoted == "models:/digits@best"


@pytest.mark.parametrize("after", [1, 2, 4])
def test_killed_population_ends_as_one_that_was_not_killed(
    finished_pair: Finished, tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """It is killed after so many of its six segments, in the middle of a round or after an exchange.

    The search does not see the end of the segment after these.
    """
    whole = finished_pair.result.trials
    assert whole[0].origin is not None or whole[1].origin is not None
    plan = make_plan(tmp_path, **PAIR)

    def run_until_killed(source: TrialSource, *arguments: Any) -> None:
        for segment in range(after + 1):
            begun = source.begin_trial()
            assert begun
            run_trial(begun[1], lambda report: None)
            if segment == after:
                raise KeyboardInterrupt
            source.end_trial(begun[0], "")

    with monkeypatch.context() as patch:
        patch.setattr(tune, "run_trials", run_until_killed)
        with pytest.raises(KeyboardInterrupt):
            run_search(plan, Console(quiet=True))
    result, _ = search_quietly(plan)
    assert [*map(comparable_fields, result.trials)] == [*map(comparable_fields, whole)]


def test_population_continues_without_a_failed_trial(tmp_path: Path, without_ray: None) -> None:
    result, _ = search_quietly(
        make_plan(tmp_path, **{**POPULATION, "objectives": PAIR["objectives"], "space": RATES, "seed": 1})
    )
    assert {trial.state for trial in result.trials} == {"done", "failed"}
    assert all(len(trial.parts) == 2 for trial in result.trials if trial.state == "done")


def wait_for(running: command.Command, is_reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 900
    while time.monotonic() < end and running.process.is_alive():
        if is_reached():
            return
        time.sleep(0.2)
    running.process.kill()
    raise AssertionError(f"the search did not come to that: {running.wait(timeout=5)}")


@pytest.mark.fault(8, "a search is killed, under Ray")
@pytest.mark.ray
def test_search_killed_on_ray_resumes_its_trials(tmp_path: Path, ray_free: None) -> None:
    """One trial of four fails on purpose."""
    changes: dict[str, Any] = {
        "space": {**RATES, PERIOD: {"choice": [1, 2]}},
        "algorithm": "random",
        "trials": 4,
        "seed": 3,
        "overrides": {"stages.pretrain.epochs": 30, "stages.pretrain.checkpoint_every": 3},
        "concurrency": 2,
    }
    plan = make_plan(tmp_path, **changes)
    running = command.start(tmp_path / "out.txt", "search", str(tmp_path / "search.yaml"), has_small_ray=True)

    def is_in_the_middle() -> bool:
        ended = len(list(find_folder(plan).glob(f"trials/*/{OUTCOME_FILE}")))
        begun = len(list(find_folder(plan).glob("trials/*/pretrain-seed0-*/checkpoints/*")))
        return ended >= 1 and begun > ended

    wait_for(running, is_in_the_middle)
    running.send(signal.SIGKILL)
    running.wait()
    before = {row["number"]: row for row in read_ledger(plan)["trials"] if row["state"] != "running"}
    ids = {name: run.info.run_id for name, run in named_runs(plan).items() if name.startswith("trial")}
    result, lines = search_quietly(plan)
    assert [trial.number for trial in result.trials] == [0, 1, 2, 3]
    assert "resume where they were stopped" in lines
    for number, row in before.items():
        assert result.trials[number].ended == row["ended"], "a trial that had ended was run again"
    after = {name: run for name, run in named_runs(plan).items() if name.startswith("trial")}
    assert len(after) == 4
    assert len([run for run in find_runs(plan) if run.info.run_name.startswith("trial")]) == 4
    assert all(after[name].info.run_id == run_id for name, run_id in ids.items())
    assert {trial.state for trial in result.trials} == {"done", "failed"}
    for trial in result.trials:
        assert after[f"trial {trial.name}"].info.status == ("FINISHED" if trial.state == "done" else "FAILED")
        assert (trial.values[LR] == 1e38) == (trial.state == "failed")


@pytest.mark.fault(15, "trials with workers of their own, under Ray")
@pytest.mark.ray
def test_stopped_trial_with_workers_leaves_no_placement_group(
    tmp_path: Path, ray_free: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials run one after the other, each with its own trainer. The second is worse, and is asked to stop."""
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
    finish = module.SearchRunner.finish_search

    def finish_and_look(self: Any) -> SearchResult:
        import ray

        groups.extend(group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED")
        return finish(self)

    monkeypatch.setattr(module.SearchRunner, "finish_search", finish_and_look)
    plan = make_plan(tmp_path, "scale.workers=1", "scale.cpus=3", "scale.cpus_per_worker=0.5", **changes)
    result, _ = search_quietly(plan)
    assert [trial.state for trial in result.trials] == ["done", "stopped"]
    assert result.trials[1].reason.startswith("behind others at 1 epochs: loss ")
    assert groups == [], "neither that of a trial's process nor that of its trainer"
    assert named_runs(plan)["trial 001"].info.status == "KILLED"
    assert {run.info.status for run in find_runs(plan)} == {"FINISHED", "KILLED"}


@pytest.mark.ray
def test_population_on_ray_equals_one_without_ray(
    tmp_path: Path, ray_free: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of its three trials run at a time; they wait for each other."""
    changes: dict[str, Any] = {**POPULATION, "trials": 3, "concurrency": 2}
    result, _ = search_quietly(make_plan(tmp_path, "scale.cpus=2", **changes))
    assert [trial.state for trial in result.trials] == ["done"] * 3
    assert sum(trial.parts[1].origin is not None for trial in result.trials) == 1
    monkeypatch.setattr(tune, "run_trials", run_in_turn)
    expected, _ = search_quietly(make_plan(tmp_path, "scale.cpus=2", name="without-ray", **changes))
    assert [*map(comparable_fields, expected.trials)] == [*map(comparable_fields, result.trials)]
