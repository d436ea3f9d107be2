"""The report of a search: what it says, that it repeats what was done, and how it looks in a real browser."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from firstlight.pipeline.config.load import load_recipe, split_override
from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.page_parts import RECIPE_FILE
from firstlight.pipeline.search.ledger import SearchState, Trial, find_best_trial
from firstlight.pipeline.search.plan import load_plan
from firstlight.pipeline.search.report import SEARCH_FILE, format_overrides, write_search_report
from firstlight.pipeline.search.report_blocks import SearchReport
from tests.support.blank_figures import save_blank
from tests.support.browser import chromium, look
from tests.support.searches import LR, PERIOD, make_plan, make_trials

BROWSER = pytest.mark.skipif(chromium() is None, reason="there is no chromium to open pages with")
TWO = [{"measure": "evaluate.knn"}, {"measure": "pretrain.loss", "mode": "min"}]
HOSTILE = "<script>alert(1)</script> " + "x" * 300


def make_report(folder: Path, store: Store, count: int = 24, seeds: int = 2, **changes: Any) -> SearchReport:
    """Returns the report of a search of which `count` trials have ended. They were never run."""
    plan = make_plan(folder, **{"objectives": TWO, "trials": 24, "description": HOSTILE[:26], **changes})
    state = SearchState(folder / "runs" / plan.search.name / plan.fingerprint(), store.hash)
    state.trials = make_trials(plan.search, count, seeds)
    best = find_best_trial(state.trials, plan.search.objectives[0])
    promoted = "models:/digits@best" if best else None
    return SearchReport(plan, state, store, "0123456789abcdef", "sqlite:///runs/mlflow.db", best, promoted)


def write_without_figures(report: SearchReport) -> Path:
    with save_blank():
        return write_search_report(report)


def visible_text(file: Path) -> str:
    """Returns what a reader sees of a page."""
    text = file.read_text("utf-8")
    body = re.sub(r"<[^>]*>", " ", text[text.index("<body>") :])
    return " ".join(body.replace("&#39;", "'").replace("&#34;", '"').split())


def test_page_names_the_space_the_best_and_all_trials(tmp_path: Path, digits: Store) -> None:
    report = make_report(tmp_path, digits)
    text = visible_text(write_without_figures(report))
    best = report.best
    assert best is not None
    score = f"evaluate.knn {best.means[0]:.4g} ± 0.0071"
    assert f"Trial {best.name} is the best of the {len(report.done)} finished trials: {score}" in text
    for words in (
        "loguniform 0.01 to 1",
        "choice 1, 2, 3",
        "optuna, seed 0",
        "models:/digits@best",
        digits.hash,
        "run 0123456789abcdef",
        "The Pareto set",
        "behind others at 1 epochs: watch_knn 0.5",
        "finished: 24 trials",
    ):
        assert words in text, words
    for trial in report.state.trials:
        assert f"{trial.name} {trial.state}" in text
    failed = sum(trial.state == "failed" for trial in report.state.trials)
    assert f"{failed} trials failed: behind others" in text


def test_page_contains_the_figures(tmp_path: Path, digits: Store) -> None:
    report = make_report(tmp_path, digits, objectives=[{"measure": "evaluate.knn"}])
    page = write_without_figures(report).read_text("utf-8")
    assert page.count("data:image/png;base64,") == 3
    for title in ("each trial and the best so far", "What decides", "All trials through their settings"):
        assert title in page


def test_page_without_a_finished_trial(tmp_path: Path, digits: Store) -> None:
    report = make_report(tmp_path, digits, 0)
    report.state.trials = [Trial(k, {LR: 0.1, PERIOD: 1}, state="failed", reason=HOSTILE) for k in range(3)]
    file = write_without_figures(replace(report, error="none of the 3 trials has finished"))
    assert file.read_text("utf-8").count("<script") == 1, "the page's own"
    text = visible_text(file)
    assert "stopped: 3 of 24 trials ended" in text
    assert "none of the 3 trials has finished" in text
    assert "3 trials failed: " in text
    report.state.trials = []
    assert "No trial has finished." in visible_text(write_without_figures(report))


def test_written_files_are_the_search_and_its_recipe(tmp_path: Path, digits: Store) -> None:
    report = make_report(tmp_path, digits)
    folder = write_without_figures(report).parent
    again = load_plan(folder / SEARCH_FILE)
    assert again.search == report.plan.search.model_copy(update={"recipe": RECIPE_FILE})
    assert again.fingerprint() == report.plan.fingerprint(), "they resume this search"
    assert load_recipe(folder / RECIPE_FILE) == report.plan.full_recipe({})


@pytest.mark.parametrize("values", [{LR: 1.5e-05, PERIOD: 3}, {LR: 0.30000000000000004, PERIOD: 1}])
def test_command_of_the_best_setting_gives_its_recipe(tmp_path: Path, digits: Store, values: dict[str, Any]) -> None:
    space = {LR: {"loguniform": [1e-05, 1.0]}, PERIOD: {"choice": [1, 2, 3]}}
    report = make_report(tmp_path, digits, 1, space=space)
    folder = write_without_figures(report).parent
    words = tuple(word for override in format_overrides(values) for word in shlex.split(override))
    assert load_recipe(folder / RECIPE_FILE, words) == report.plan.full_recipe(values)


def test_values_of_any_type_survive_a_command_line() -> None:
    values = {"a.b": "it's", "a.c": [1, 2], "a.d": None, "a.e": True, "a.f": "true"}
    words = [word for override in format_overrides(values) for word in shlex.split(override)]
    assert {".".join(key): value for key, value in map(split_override, words)} == values


def test_lineage_names_the_promoted_encoder(tmp_path: Path, digits: Store) -> None:
    report = make_report(tmp_path, digits, 3)
    best = report.best
    assert best is not None
    best.encoder = "fedcba"
    folder = report.state.trial_folder(best)
    folder.mkdir(parents=True)
    (folder / "mlflow.json").write_text(json.dumps({"run_id": "abcdef"}))
    text = visible_text(write_without_figures(report))
    assert f"trial {best.name} run abcdef encoder, models:/digits@best runs:/fedcba/encoder" in text
    assert "trial 001 no run" in text


@BROWSER
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light"), (360, "light"), (1280, "dark")])
def test_page_is_readable_in_a_browser(page: Path, width: int, scheme: Literal["light", "dark"]) -> None:
    seen = look(page, width, scheme)
    assert seen.complaints == []
    assert seen.requests == []
    found = seen.measured
    assert found["texts"] > 200
    assert found["images"] == 6
    assert found["faint"] == []
    for fault in ("overflow", "broken", "nameless", "small", "headless"):
        assert found[fault] == 0, fault


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, digits: Store) -> Path:
    """A page with all that there can be, and a very long word in a reason."""
    report = make_report(tmp_path_factory.mktemp("page"), digits, overrides={"stages.pretrain.epochs": 1})
    next(trial for trial in report.state.trials if trial.state == "failed").reason = HOSTILE
    return write_search_report(report)
