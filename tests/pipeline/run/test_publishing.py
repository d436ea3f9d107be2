"""One parent run for one recipe, and how the open runs end."""

from pathlib import Path

import pytest
from rich.console import Console

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.run.publishing import ParentRun, RunPublisher
from tests.support import recipes

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
