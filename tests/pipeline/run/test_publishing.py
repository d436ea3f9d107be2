"""One parent run for one recipe, and how the open runs end."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.first_screen.headline import compose_headline
from firstlight.pipeline.run.publishing import ParentRun, RunPublisher
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.tracking.client import DESCRIPTION_TAG, TrackingClient
from tests.support import recipes
from tests.support.recipe_runs import runs_of

QUIET = Console(quiet=True)


def publisher_of(storage: Path, parent: ParentRun | None = None, epochs: int = 2) -> RunPublisher:
    recipe = recipes.recipe(storage, stages__pretrain__epochs=epochs)
    return RunPublisher(recipe, parent.folder if parent else storage / "small", QUIET, parent, None)


def test_the_same_recipe_has_one_parent_run_and_a_changed_one_another(tmp_path: Path, digits: Store) -> None:
    first = publisher_of(tmp_path)
    assert first.known_parent(digits) is None
    run_id = first.start_parent(digits)
    assert first.start_parent(digits) == run_id
    again = publisher_of(tmp_path)
    assert again.known_parent(digits) == run_id
    assert again.start_parent(digits) == run_id
    assert publisher_of(tmp_path, epochs=3).known_parent(digits) is None


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "KILLED"), (ValueError("x"), "FAILED")])
def test_open_runs_end_as_killed_or_failed_with_the_report(
    tmp_path: Path, digits: Store, error: BaseException, status: str
) -> None:
    publisher = publisher_of(tmp_path)
    publisher.store = digits
    run_id = publisher.start_parent(digits)
    report = tmp_path / "report.html"
    report.write_text("known so far")
    publisher.close_failed(error, report)
    client = publisher.tracking.client
    assert client.get_run(run_id).info.status == status
    assert "report.html" in [file.path for file in client.list_artifacts(run_id)]


def test_a_nested_run_has_the_tags_and_parameters_of_its_parent(tmp_path: Path, digits: Store) -> None:
    parent = ParentRun(tmp_path / "trial", {"firstlight.trial": "3"}, {"trial.lr": 0.5})
    publisher = publisher_of(tmp_path, parent)
    run = publisher.tracking.client.get_run(publisher.start_parent(digits))
    assert run.data.tags["firstlight.trial"] == "3"
    assert run.data.params["trial.lr"] == "0.5"
    assert run.data.params["store"] == digits.hash
    assert publisher.known_parent(digits) == run.info.run_id


@pytest.mark.fault(8, "killed while publishing")
@pytest.mark.usefixtures("undrawn_figures")
def test_recipe_that_is_killed_while_it_publishes_logs_every_number_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command dies after the numbers of each run were logged, before its folder says so."""
    recipe = recipes.recipe(tmp_path, stages__embed={"kind": "embed"}, **recipes.QUICK)
    finish, killed = TrackingClient.finish_run, set[str]()

    def finish_or_die(tracking: TrackingClient, run_id: str, status: str = "FINISHED", **named: Any) -> None:
        if status == "FINISHED" and run_id not in killed:
            killed.add(run_id)
            raise KeyboardInterrupt
        finish(tracking, run_id, status, **named)

    monkeypatch.setattr(TrackingClient, "finish_run", finish_or_die)
    for _ in range(20):
        try:
            rows = run_recipe(recipe, QUIET).rows
            break
        except KeyboardInterrupt:
            continue
    found = runs_of(recipe)
    assert len(killed) == len(found) == 6, "every run was interrupted once"
    client = TrackingClient(recipe).client
    headline = compose_headline(recipe, rows)
    description = " ".join((f"**{headline.text}**", *headline.details))
    assert found[recipe.name].data.tags[DESCRIPTION_TAG].startswith(description)
    for name, run in found.items():
        assert run.info.status == "FINISHED"
        for key in run.data.metrics:
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, key)]
            assert len(steps) == len(set(steps)), f"{name}: {key}"
