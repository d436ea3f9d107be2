"""Parts of reports: errors, scores with their verdicts, data, and no password."""

from dataclasses import replace
from pathlib import Path

import pytest

from firstlight.pipeline.data.store import Store
from firstlight.pipeline.report import page_parts
from firstlight.pipeline.report.html_page import Cell, Facts, Notes, Page, PageSection, Table, Text, render_page
from firstlight.pipeline.stages.score_rows import score_rows
from firstlight.pipeline.train.context import StageContext
from tests.support import recipes
from tests.support.browser import chromium, look
from tests.support.stage_results import evaluated, finish_arms, finished, with_given


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyboardInterrupt(), "resumes it"),
        (ValueError("one\n  two"), "one two"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_error_is_described_on_one_line(error: BaseException, text: str) -> None:
    described = page_parts.describe_error(error)
    assert text in described
    assert "\n" not in described


def test_blocks_of_errors_and_warnings_exist_only_with_content(tmp_path: Path) -> None:
    assert page_parts.error_blocks(None) == []
    assert page_parts.error_blocks("broken") == [Notes(["broken"], "error")]
    assert page_parts.warning_blocks([]) == [Text("None.", "quiet")]
    assert page_parts.warning_blocks(["careful"]) == [Notes(["careful"])]
    assert page_parts.figure_blocks(tmp_path) == []


def test_scores_have_a_coloured_verdict_and_name_their_baseline(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, seeds=[0, 1, 2])
    results = [evaluated(seed / 10) for seed in (0, 1, 2)]
    results[2]["pretrained"]["knn"]["test"] += 0.01
    rows = score_rows(recipe, [finished(tmp_path, "evaluate", seed, results[seed]) for seed in (0, 1, 2)])
    (table,) = page_parts.score_blocks(recipe, rows)
    assert isinstance(table, Table)
    cells = dict(zip(table.heads, table.rows[0], strict=True))
    assert cells["verdict"] == Cell("helps", "good")
    baseline = cells["baseline"]
    assert isinstance(baseline, Cell)
    assert baseline.remark == "random weights"
    assert table.heads[0] not in [table.heads[k] for k in table.numbers]


def test_three_arms_have_two_tables_with_a_coloured_verdict_for_each_pair(tmp_path: Path) -> None:
    recipe = with_given(tmp_path)
    rows = score_rows(recipe, finish_arms(tmp_path, "evaluate") + finish_arms(tmp_path, "finetune"))
    scores, compared = page_parts.score_blocks(recipe, rows)
    assert isinstance(scores, Table)
    assert isinstance(compared, Table)
    assert scores.heads == ["measure", "pretrained", "given", "random or scratch"]
    assert scores.rows[2] == [
        Cell("classify, 40 labels", remark="finetune"),
        *("83.00 ± 1.00", "81.00 ± 1.00", "41.00 ± 1.00"),
    ]
    assert compared.heads == ["measure", "comparison", "gain", "verdict"]
    words = ["pretrained against given", "pretrained against random", "given against random"]
    assert [line[1] for line in compared.rows[:3]] == words
    tones = {"helps": "good", "no clear difference": "unsure"}
    for row, line in zip(rows, compared.rows, strict=True):
        assert line[0] == Cell(row.label, remark=row.stage)
        assert row.verdict is not None
        assert line[-1] == Cell(row.verdict.text, tones[row.verdict.text])  # type: ignore[arg-type]
    assert {line[-1] for line in compared.rows} == {Cell("helps", "good"), Cell("no clear difference", "unsure")}


@pytest.mark.skipif(chromium() is None, reason="there is no chromium to open pages with")
@pytest.mark.parametrize("width", [360, 1280])
def test_tables_of_three_arms_are_readable_in_a_browser(tmp_path: Path, width: int) -> None:
    recipe = with_given(tmp_path)
    rows = score_rows(recipe, finish_arms(tmp_path, "evaluate") + finish_arms(tmp_path, "finetune"))
    sections = [PageSection("Results", page_parts.score_blocks(recipe, rows))]
    (tmp_path / "page.html").write_text(render_page(Page("photos", "a run", "", sections)), "utf-8")
    seen = look(tmp_path / "page.html", width, "light")
    assert seen.complaints == []
    found = {key: seen.measured[key] for key in ("faint", "overflow", "small", "headless")}
    assert found == {"faint": [], "overflow": 0, "small": 0, "headless": 0}
    assert seen.measured["texts"] > 60


def test_data_has_the_counts_of_the_splits_and_the_hash_of_the_store(tmp_path: Path, digits: Store) -> None:
    context = StageContext.create(recipes.recipe(tmp_path), digits, on_ray=False)
    facts, *rest = page_parts.data_blocks(context.recipe.dataset, digits, context.splits, tmp_path)
    assert isinstance(facts, Facts)
    values = dict(facts.rows)
    train, val, test = (len(ids) for ids in (context.splits.train, context.splits.val, context.splits.test))
    assert values["images"] == f"{train} to train on, {val} held out of these, {test} to test on"
    assert values["sha256"] == digits.hash
    assert rest == [], "no image is damaged, and there is no figure"
    told = replace(
        digits, source={**digits.source, "reading": ["read 3 files", "no labels"]}, splits={"train": 9, "val": 9}
    )
    facts, *_ = page_parts.data_blocks(context.recipe.dataset, told, context.splits, tmp_path)
    assert isinstance(facts, Facts)
    assert ("read as", "read 3 files") in facts.rows
    assert ("", "no labels") in facts.rows
    assert dict(facts.rows)["images"] == f"{train} to train on, {val} held out, {test} to test on"


def test_passwords_in_addresses_are_left_out_of_configs_and_commands() -> None:
    fold = page_parts.resolved_block("recipe", {"address": "https://me:secret@host/x"})
    assert "secret" not in str(fold)
    assert "host/x" in str(fold)
    assert "secret" not in str(page_parts.mlflow_blocks("https://me:secret@host", "All"))
    assert "secret" not in page_parts.footer_text("https://me:secret@host")
