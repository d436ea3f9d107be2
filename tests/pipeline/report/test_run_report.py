"""The report of a run: its content, hostile names as text, and its look in a browser."""

import json
import re
import shutil
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from firstlight.pipeline.config.load import load_recipe, parse_recipe
from firstlight.pipeline.config.recipe import Recipe
from firstlight.pipeline.report.html_page import strip_credentials
from firstlight.pipeline.report.page_parts import RECIPE_FILE, REPORT_FILE, SUMMARY_FOLDER
from firstlight.pipeline.report.score_table import score_cells
from firstlight.pipeline.run.auto_scale import resolve_scale
from firstlight.pipeline.run.runner import run_recipe
from firstlight.pipeline.tracking.figures import list_figures
from tests.support import recipes
from tests.support.browser import chromium, look

BROWSER = pytest.mark.skipif(chromium() is None, reason="there is no chromium to open pages with")
DESCRIPTION = 'Small <script>alert(1)</script> & "quoted"'
EXPECTED = [{"stage": "evaluate", "measure": "knn", "paper": 61.5, "against": 50.0, "source": "table 1"}]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Three stages with two seeds, finished, with the paper's number for one of the measures."""
    storage = tmp_path_factory.mktemp("reported")
    recipe = recipes.recipe(
        storage, seeds=[0, 1], description=DESCRIPTION, expected=EXPECTED, stages__pretrain__watch={"every": 1}
    )
    run_recipe(recipe, Console(quiet=True))
    return recipe


def html(recipe: Recipe) -> str:
    return (recipe.storage / recipe.name / REPORT_FILE).read_text("utf-8")


def words(text: str) -> str:
    """Returns the text of a page that a reader sees."""
    return " ".join(re.sub(r"<[^>]*>", " ", text[text.index("<body>") :]).split())


def test_report_has_the_table_of_the_terminal(ran: Recipe, tmp_path: Path) -> None:
    text = words(html(ran))
    found = run_recipe(ran, Console(quiet=True)).rows
    assert len(found) == 3
    for row in found:
        shown = score_cells(ran, row)
        for heading in ("measure", "pretrained", "baseline", "gain", "pretraining", "paper", "difference"):
            assert shown[heading] in text, heading
    assert "61.5 (50)" in text
    assert "There is no verdict on pretraining (2 seeds)" in text
    assert "2 seeds cannot tell a gain from chance: a verdict needs 3." in text
    assert "seeds=[0,1,2]" in text


def test_report_has_recipe_data_timings_and_lineage(ran: Recipe) -> None:
    page, folder = html(ran), ran.storage / ran.name
    text = words(page)
    assert page.count("<script") == 1, "the page's own"
    assert "Small &lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quoted&#34;" in page
    for section in (
        "Results",
        "Warnings and notes",
        "Stages",
        "Data",
        "Time",
        "Lineage",
        "What was run",
        "Run it again",
    ):
        assert f">{section}</h2>" in page
    for file in folder.glob("*-seed*/mlflow.json"):
        assert f"run {json.loads(file.read_text())['run_id']}" in text, file
    assert "110 to train on, 10 held out of these, 60 to test on" in text
    assert "each epoch leaves out 14 of 110 images" in text
    assert "110 images of 8 x 8 are held decoded" in text, "a note of a worker"
    assert "Noise As Targets" in text
    for part in ("forward", "backward", "tables", "assignment", "optimizer", "checkpoint", "looks", "evaluation"):
        assert re.search(rf'data-head="{part}" class="number">\s*[\d.]+', page), part


def test_report_contains_all_figures_of_all_seeds(ran: Recipe) -> None:
    folder, page = ran.storage / ran.name, html(ran)
    found = [
        picture
        for stage in (*folder.glob("*-seed*"), *folder.glob("prepare-*"), folder / SUMMARY_FOLDER)
        for picture in list_figures(stage)
    ]
    assert len(found) == 35
    assert page.count("data:image/png;base64,") == len(found)
    assert page.count("Pictures of seed 1") == 3, "folded, for each stage"
    assert len(page) < 8_000_000


def test_saved_recipe_equals_the_one_that_was_run(ran: Recipe) -> None:
    assert load_recipe(ran.storage / ran.name / RECIPE_FILE) == resolve_scale(ran)[0]


def test_report_of_an_unfinished_recipe_says_so(ran: Recipe, tmp_path: Path) -> None:
    shutil.copytree(ran.storage, tmp_path / "copy")
    raw = {**ran.dump(), "storage": str(tmp_path / "copy"), "tracking": {"uri": None}}
    raw["stages"] = {**raw["stages"], "more": {**raw["stages"]["evaluate"], "knn_k": 3}}
    run_recipe(parse_recipe(raw), Console(quiet=True), only="pretrain")
    text = words(html(parse_recipe(raw)))
    assert "6 of 8 parts done" in text
    assert "Not finished: seeds 0, 1." in text
    assert "kNN (k=5)" in text, "what was finished before is told"
    assert "kNN (k=3)" not in text


def test_credentials_in_addresses_are_removed() -> None:
    assert (
        strip_credentials("uri: https://me:secret@host:5000/x and s3://bucket/a@b")
        == "uri: https://host:5000/x and s3://bucket/a@b"
    )


@BROWSER
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light"), (360, "light"), (1280, "dark")])
def test_report_is_whole_and_readable_in_a_browser(ran: Recipe, width: int, scheme: Literal["light", "dark"]) -> None:
    seen = look(ran.storage / ran.name / REPORT_FILE, width, scheme)
    assert seen.complaints == []
    assert seen.requests == []
    found = seen.measured
    assert found["texts"] > 200
    assert found["images"] == 35
    assert found["faint"] == []
    assert (
        found["overflow"],
        found["broken"],
        found["nameless"],
        found["small"],
        found["headless"],
        found["scripts"],
    ) == (0, 0, 0, 0, 0, 1)
