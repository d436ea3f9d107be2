"""The result of a run as a notebook shows it: its headline, its tables and the report."""

from html.parser import HTMLParser
from pathlib import Path

from firstlight.pipeline.report.scores.result_view import render_result
from firstlight.pipeline.stages.score_rows import score_rows
from tests.support import recipes
from tests.support.stage_results import evaluated, finish_arms, finished, with_given


class _Tags(HTMLParser):
    """The tags that are open, and whether each was closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.is_well_formed = list[str](), True
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open += [] if tag == "br" else [tag]

    def handle_endtag(self, tag: str) -> None:
        self.is_well_formed &= self.open.pop() == tag


def test_table_has_a_line_for_each_measure_and_the_verdict_a_colour(tmp_path: Path) -> None:
    recipe = recipes.recipe(tmp_path, seeds=[0, 1, 2])
    instances = [finished(tmp_path, "evaluate", seed, evaluated(0.01 * seed + 0.001 * seed**2)) for seed in range(3)]
    rows = score_rows(recipe, instances)
    (tmp_path / "report <1>.html").write_text("")
    shown = render_result(recipe, rows, tmp_path / "report <1>.html")
    assert shown.count("<tr>") == 1 + len(rows)
    assert "<strong>There is no verdict on pretraining (equal gains)" in shown
    assert "report%20%3C1%3E.html" in shown
    assert "report &lt;1&gt;.html</a>" in shown
    tags = _Tags(shown)
    assert tags.is_well_formed
    assert tags.open == []


def test_weights_that_are_given_have_two_tables(tmp_path: Path) -> None:
    recipe = with_given(tmp_path)
    shown = render_result(recipe, score_rows(recipe, finish_arms(tmp_path, "evaluate")), tmp_path / "none.html")
    assert shown.count("<table") == 2
    assert 'color: #43a047; font-weight: bold">' in shown
    assert "Report:" not in shown


def test_run_without_scores_says_so(tmp_path: Path) -> None:
    shown = render_result(recipes.recipe(tmp_path), [], tmp_path / "none.html")
    assert "<strong>Nothing is measured yet.</strong>" in shown
    assert "<table" not in shown
