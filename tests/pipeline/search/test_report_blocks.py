"""Warnings in the report of a search."""

from pathlib import Path
from typing import Any

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report.html_page import Notes
from firstlight.pipeline.search.ledger import OTHER_CODE_NOTE, SearchState, Trial
from firstlight.pipeline.search.report_blocks import SearchReport, warn_at_range_ends, warnings_blocks
from tests.support.searches import LR, PERIOD, done_trial, make_plan


def make_report(folder: Path, store: Store, trials: list[Trial], **changes: Any) -> SearchReport:
    plan = make_plan(folder, **changes)
    state = SearchState(folder / "search", store.hash)
    state.trials = trials
    best = trials[0] if trials[0].state == "done" else None
    return SearchReport(plan, state, store, "run", "sqlite:///mlflow.db", best)


@pytest.mark.parametrize(
    ("dimension", "value", "end"),
    [
        ({"loguniform": [0.01, 1.0]}, 0.99, "upper"),
        ({"loguniform": [0.01, 1.0]}, 0.0101, "lower"),
        ({"loguniform": [0.01, 1.0]}, 0.1, None),
        ({"loguniform": [0.001, 1.0]}, 0.02, None),
        ({"uniform": [0.1, 1.0]}, 0.12, "lower"),
        ({"randint": [1, 9]}, 9, "upper"),
        ({"choice": [3, 1, 2]}, 1, "lower"),
        ({"choice": [3, 1, 2]}, 2, None),
        ({"choice": [1, 2]}, 2, None),
    ],
)
def test_best_value_at_an_end_of_its_range_is_reported(
    tmp_path: Path, digits: Store, dimension: dict[str, Any], value: float, end: str | None
) -> None:
    key = PERIOD if isinstance(value, int) else LR
    report = make_report(tmp_path, digits, [done_trial(0, {key: value}, 0.5)], space={key: dimension})
    lines = list(warn_at_range_ends(report))
    assert [f"at the {end} end" in line for line in lines] == ([True] if end else [])


def test_warnings_name_failures_one_seed_and_other_code(tmp_path: Path, digits: Store) -> None:
    values = {LR: 0.1, PERIOD: 2}
    failed = [Trial(k, values, state="failed", reason="the loss is not finite") for k in (1, 2)]
    report = make_report(tmp_path, digits, [done_trial(0, values, 0.5), *failed])
    (notes,) = warnings_blocks(report, report.plan.budget_recipe())
    assert isinstance(notes, Notes)
    assert "2 trials failed: the loss is not finite" in notes.lines
    assert any("each trial has one seed" in line for line in notes.lines)
    assert OTHER_CODE_NOTE not in notes.lines
    report.state.trials[1].code = "an earlier version"
    (notes,) = warnings_blocks(report, report.plan.budget_recipe())
    assert isinstance(notes, Notes)
    assert OTHER_CODE_NOTE in notes.lines
