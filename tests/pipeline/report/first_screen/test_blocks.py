"""The blocks of the first screen become part of a page: words, one picture and commands, before the contents."""

from pathlib import Path

from firstlight.pipeline.report.first_screen.blocks import Headline, NextStep, NextSteps
from firstlight.pipeline.report.first_screen.opening import draw_gains
from firstlight.pipeline.report.html_page import Page, PageSection, Text, render_page
from tests.support.judged_rows import ALIKE, HIGH, compared, judged


def test_first_screen_stands_before_the_contents(tmp_path: Path) -> None:
    chart = draw_gains(judged(compared(HIGH), compared(ALIKE, label="<b>probe</b>")), 60)
    assert chart is not None
    steps = NextSteps([NextStep("Run it again.", "firstlight run a & b"), NextStep("Look at it.")], "/here")
    opening = [Headline("It helps.", ("By a lot.",), "good"), chart, steps]
    page = Page("run", "a run", "what it is", [PageSection("Results", [Text("more")])], opening=opening)
    html = render_page(page)
    places = [html.index(text) for text in ("It helps.", "By a lot.", "+40.00 [", "What next", "what it is", "<nav")]
    assert places == sorted(places)
    assert html.count('class="interval"') == 2
    assert "&lt;b&gt;probe&lt;/b&gt;" in html
    assert "<span>firstlight run a &amp; b</span>" in html
    assert "Commands are for the folder /here" in html
    without = render_page(Page("run", "a run", "", [], opening=[NextSteps([NextStep("Look at it.")], "/here")]))
    assert "Commands are for" not in without
