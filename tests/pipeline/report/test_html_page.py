"""Pages are self-contained, escape all text, and are readable in a browser: phone and desktop, light and dark."""

import base64
import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.report.first_screen.blocks import GainBar, GainChart, Headline, NextStep, NextSteps
from firstlight.pipeline.report.html_page import (
    Bars,
    Cell,
    Facts,
    Fold,
    Gallery,
    Group,
    MapPoint,
    Notes,
    Page,
    PageSection,
    Picture,
    PointMap,
    Strip,
    StripItem,
    Table,
    Text,
    Tree,
    render_page,
)
from tests.support.browser import Action, chromium, look, use

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'names' {{ 7 * 7 }}"


def png(folder: Path, name: str, width: int = 300, height: int = 120, noise: bool = False) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255 if noise else 2, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder / f"{name}.png"


def example(folder: Path, text: str = "cats & dogs", noise: bool = False) -> Page:
    """All kinds of blocks, with `text` wherever there is text."""
    narrow, wide = (Picture(png(folder, f"p{width}", width, noise=noise), text, text) for width in (300, 1400))
    long = "averylongwordwithoutaplacetobreakit" * 8
    blocks = [
        Text(text),
        Text(text, "quiet"),
        Text(f"firstlight run {long}", "code"),
        Notes([text, long]),
        Notes([text], "error"),
        Table(
            text,
            ("measure", "score", "verdict"),
            [[Cell(text, remark=text), "1.0 ± 0.1", Cell("helps", "good")], [long, "2", Cell("hurts", "bad")]],
            [1],
        ),
        Facts([(text, long), ("seeds", "0, 1")]),
        Gallery([narrow, narrow, wide]),
        Bars(text, ("data", "forward"), [(text, "3.0 s", [("data", 0.25), ("forward", 0.75)])]),
        Tree(text, "run 1", [Tree("below", long, [Tree("deep")])]),
        Fold(text, [Gallery([narrow]), Text(text)]),
        Group(text, [Text(text)]),
    ]
    bar = GainBar(text, text, "+7.80 [+2.3, +13.3]", "helps", "good", 50.0, 20.0, 80.0, (40.0, 60.0))
    opening = [
        Headline(text, [text], "good"),
        GainChart(text, [bar, replace(bar, verdict="no clear difference", tone="unsure")], [(10.0, "0")], 10.0, [bar]),
        NextSteps([NextStep(text, f"firstlight run {long}")], long),
    ]
    return Page(
        text,
        "a page",
        text,
        [PageSection("First things", blocks), PageSection("Nothing", [])],
        "finished",
        "good",
        text,
        opening,
    )


@pytest.mark.fault(55, "markup in names")
def test_all_text_is_escaped(tmp_path: Path) -> None:
    html = render_page(example(tmp_path, HOSTILE))
    assert html.count("<script") == html.count("</script>") == 1, "the page's own"
    assert "<img src=x" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "{{ 7 * 7 }}" in html, "text is no template"
    assert 'onerror=alert(2)"' not in html
    assert html.count("&#34;quoted&#34;") >= 20


def test_page_is_self_contained(tmp_path: Path) -> None:
    html = render_page(example(tmp_path))
    markup = html[: html.index("<script>")]
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", markup)
    assert "url(" not in html
    assert "@import" not in html
    assert html.count("data:image/png;base64,") == 4
    assert "default-src 'none'" in html
    assert "<h2" in html
    assert "Nothing" not in html, "a section without blocks"


def test_many_pictures_are_scaled_to_a_bound_and_the_page_says_so(tmp_path: Path) -> None:
    whole = render_page(example(tmp_path, noise=True))
    assert "scaled" not in whole
    pictures = sum(
        file.stat().st_size
        for file in (tmp_path / "p300.png", tmp_path / "p300.png", tmp_path / "p300.png", tmp_path / "p1400.png")
    )
    small = render_page(example(tmp_path, noise=True), largest=pictures // 2)
    assert len(small) < 0.7 * len(whole)
    assert "Pictures are scaled to 71%" in small
    assert "in MLflow they have their full size" in small
    tiny = render_page(example(tmp_path, noise=True), largest=pictures // 20)
    assert "Folded pictures are in MLflow only" in tiny
    assert tiny.count("data:image/png;base64,") == 3


BROWSER = pytest.mark.skipif(chromium() is None, reason="there is no chromium to open pages with")


@BROWSER
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_is_whole_and_readable_in_a_browser(tmp_path: Path, width: int, scheme: Literal["light", "dark"]) -> None:
    file = tmp_path / "page.html"
    file.write_text(render_page(example(tmp_path, HOSTILE)))
    seen = look(file, width, scheme)
    assert seen.complaints == []
    assert seen.requests == []
    found = seen.measured
    assert found["texts"] > 30
    assert found["faint"] == []
    assert found["images"] == 4
    assert (found["broken"], found["nameless"], found["small"], found["headless"], found["scripts"]) == (0, 0, 0, 0, 1)
    assert found["overflow"] == 0
    assert found["headings"] == [1, 2, 2, 3], "no level is left out"
    plain = look(file, width, scheme, scripted=False).measured
    unchanged = {key: found[key] for key in ("faint", "images", "broken", "overflow", "headings")}
    assert {key: plain[key] for key in unchanged} == unchanged, "the page is whole without its script"


@BROWSER
def test_browser_finds_the_faults_of_a_bad_page(tmp_path: Path) -> None:
    """This test excludes that the tests above pass with measurements of nothing."""
    file = tmp_path / "bad.html"
    body = (
        '<p style="color:#bbb;font-size:10px">faint</p><div style="width:2000px">wide</div>'
        '<img src="missing.png"><table><tr><td>1</table>'
    )
    file.write_text(
        f'<!doctype html><body style="background:#fff">{body}<script>console.error("no"); throw Error("x")</script>'
    )
    seen = look(file, 360, "light")
    found = seen.measured
    assert found["faint"][0][0] == "faint"
    assert (found["broken"], found["nameless"], found["small"], found["headless"], found["scripts"]) == (1, 1, 1, 1, 1)
    assert found["overflow"] > 1000
    assert len(seen.complaints) >= 3
    assert any(url.endswith("missing.png") for url in seen.requests)


def test_marks_that_change_the_direction_of_text_are_shown_as_escapes(tmp_path: Path) -> None:
    html = render_page(example(tmp_path, "invoice\u202egpj.exe \x1b[2J \u2066x\ud800"))
    assert not set(html) & set("\u202e\u2066\x1b\ud800")
    assert html.count(r"invoice\u202egpj.exe \x1b[2J \u2066x\ud800") > 20
    html.encode()


def test_policy_names_the_hash_of_the_one_script(tmp_path: Path) -> None:
    html = render_page(example(tmp_path))
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}';" in html
    assert "unsafe-inline" not in html.partition("script-src")[2].partition('"')[0]
    assert not re.search(r"fetch|XMLHttpRequest|eval|innerHTML|https?:|import", script)


SORTED: list[tuple[str, list[str]]] = [
    ("alpha", ["10.5 ± 0.2", "+7.80 [+2.3, +13.3]", "12 %", "1 min 05 s", "1,200"]),
    ("seed 10", ["9.25 ± 0.9", "-1.50", "9 %", "59.0 s", "90"]),
    ("seed 9", ["", "+7.79 [+2.0, +9.0]", "100 %", "1 h 00 min", "–"]),
    ("beta", ["110 ± 1", "", "1.5 %", "2 min 00 s", "800"]),
]


@pytest.fixture
def sortable(tmp_path: Path) -> Path:
    rows: list[list[str | Cell]] = [[Cell(name, remark="zzz"), *cells] for name, cells in SORTED]
    heads = ("name", "score", "gain", "share", "time", "images")
    pictures = [Picture(png(tmp_path, f"w{width}", width), f"picture {width}", "squares") for width in (300, 1400)]
    strip = Strip([StripItem([tiny(), tiny()], "a pair")])
    blocks = [Table("scores", heads, rows, range(1, 6)), Gallery(pictures), strip]
    file = tmp_path / "sortable.html"
    file.write_text(render_page(Page("x", "y", "", [PageSection("z", blocks)])))
    return file


def tiny() -> str:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


NAMES: Action = (
    "read",
    "[...document.querySelectorAll('tbody th')].map(h => h.firstChild.textContent.trim()).join(' ')",
)
STATES: Action = ("read", "[...document.querySelectorAll('thead th')].map(h => h.getAttribute('aria-sort')).join(' ')")
WRITTEN = "alpha seed 10 seed 9 beta"


@BROWSER
@pytest.mark.parametrize(
    ("column", "orders"),
    [
        (1, ["alpha beta seed 9 seed 10", "seed 10 seed 9 beta alpha"]),
        (2, ["beta alpha seed 10 seed 9", "seed 10 alpha beta seed 9"]),
        (3, ["alpha seed 9 seed 10 beta", "seed 10 seed 9 alpha beta"]),
        (4, ["seed 9 alpha seed 10 beta", "beta seed 10 alpha seed 9"]),
        (5, ["seed 9 beta alpha seed 10", "seed 10 alpha beta seed 9"]),
        (6, ["alpha beta seed 10 seed 9", "seed 10 beta alpha seed 9"]),
    ],
)
def test_click_on_a_header_sorts_by_value_and_the_third_restores(
    sortable: Path, column: int, orders: list[str]
) -> None:
    click: Action = ("click", f"th:nth-child({column}) .sort")
    seen = use(sortable, 1280, [NAMES, click, NAMES, STATES, click, NAMES, click, NAMES, STATES])
    assert seen.complaints == []
    before, first, states, second, third, last = seen.values
    assert (before, first, second, third) == (WRITTEN, *orders, WRITTEN)
    expected = ["none"] * 6
    assert last.split() == expected
    expected[column - 1] = "ascending" if column == 1 else "descending"
    assert states.split() == expected


@BROWSER
def test_header_is_reached_and_used_by_the_keyboard(sortable: Path) -> None:
    focus: Action = ("read", "document.querySelector('th:nth-child(3) .sort').focus()")
    seen = use(sortable, 1280, [focus, ("press", "Enter"), NAMES, STATES])
    assert seen.values[1] == "alpha seed 9 seed 10 beta"
    assert seen.values[2].split()[2] == "descending"


@BROWSER
def test_phone_sorts_by_a_list_of_columns(sortable: Path) -> None:
    choose = """(() => { const s = document.querySelector('.sorter select'); const o = [...s.options].find(
        o => o.text === 'score, smallest first'); s.value = o.value; s.dispatchEvent(new Event('change'));
        return s.checkVisibility(); })()"""
    back = """(() => { const s = document.querySelector('.sorter select'); s.value = '';
        s.dispatchEvent(new Event('change')); })()"""
    seen = use(sortable, 390, [("read", choose), NAMES, ("read", back), NAMES])
    assert seen.values == [True, "seed 10 alpha beta seed 9", None, WRITTEN]
    (hidden,) = use(sortable, 1280, [("read", "document.querySelector('.sorter').checkVisibility()")]).values
    assert hidden is False, "headers are there"


VIEWER: Action = (
    "read",
    """(() => { const d = document.querySelector('dialog'); if (!d || !d.open) return null;
    const widths = [...d.querySelectorAll('img')].map(i => Math.round(i.clientWidth));
    return [d.querySelector('p').textContent, widths]; })()""",
)


@BROWSER
def test_click_enlarges_a_picture_and_escape_closes_it(sortable: Path) -> None:
    # A dialog tells that it has closed in a task of its own.
    told = """new Promise(done => { const wait = () => document.activeElement.className === 'zoom'
        ? done(document.activeElement.getAttribute('aria-label')) : setTimeout(wait, 20); wait(); })"""
    focused: Action = ("read", told)
    actions: list[Action] = [
        VIEWER,
        ("click", ".card img"),
        VIEWER,
        ("press", "ArrowRight"),
        VIEWER,
        ("press", "Escape"),
    ]
    actions += [VIEWER, focused, ("press", "Enter"), VIEWER, ("click", ".stage img"), VIEWER]
    seen = use(sortable, 1280, actions)
    assert seen.complaints == []
    before, first, second, closed, opener, again, full = seen.values
    assert before is closed is None
    assert first[0] == "picture 300"
    assert first[1][0] > 900, "small pictures grow to the window"
    assert second[0] == "picture 1400"
    assert 1150 < second[1][0] < 1280, "a picture that is wider than the window fits into it"
    assert opener == "Enlarge: picture 1400", "the reader is where the picture is"
    assert again == second
    assert full[1] == [1400]


@BROWSER
def test_phone_shows_the_full_size_and_toggles_it(sortable: Path) -> None:
    size: Action = ("click", ".viewer [name=size]")
    seen = use(
        sortable,
        390,
        [("click", "figure.wide .card img"), VIEWER, size, VIEWER, ("click", ".viewer [name=close]"), VIEWER],
    )
    full, whole, closed = seen.values
    assert full[1] == [1400]
    assert 300 < whole[1][0] < 390
    assert closed is None


@BROWSER
def test_images_of_a_pair_are_enlarged_side_by_side(sortable: Path) -> None:
    seen = use(sortable, 1280, [("click", ".strip img"), VIEWER])
    text, widths = seen.values[0]
    assert text == "a pair"
    assert widths == [150, 150], "five times their size"


@BROWSER
def test_tab_reaches_one_point_of_a_map_and_arrows_the_others(tmp_path: Path) -> None:
    points = [MapPoint(x, 0.5, 0, tiny(), f"point {x}") for x in (0.5, 0.1, 0.9)]
    file = tmp_path / "map.html"
    file.write_text(render_page(Page("x", "y", "", [PageSection("z", [PointMap("map", ["a"], points)])])))
    text: Action = ("read", "document.activeElement.textContent.trim()")
    focus: Action = ("read", "document.querySelector('.map [tabindex=\"0\"]').focus()")
    count: Action = ("read", "document.querySelectorAll('.map [tabindex=\"0\"]').length")
    seen = use(file, 1280, [count, focus, text, ("press", "ArrowRight"), text, ("press", "ArrowRight"), text, count])
    assert seen.values == [1, None, "point 0.5", "point 0.9", "point 0.9", 1]
