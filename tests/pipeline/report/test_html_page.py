"""Pages are self-contained, escape all text, and are readable in a browser: phone and desktop, light and dark."""

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from firstlight.pipeline.report.html_page import (
    Bars,
    Cell,
    Facts,
    Fold,
    Gallery,
    Group,
    Notes,
    Page,
    PageSection,
    Picture,
    Table,
    Text,
    Tree,
    render_page,
)
from tests.support.browser import chromium, look

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
    return Page(
        text,
        "a page",
        text,
        [PageSection("First things", blocks), PageSection("Nothing", [])],
        "finished",
        "good",
        text,
    )


@pytest.mark.fault(55, "markup in names")
def test_all_text_is_escaped(tmp_path: Path) -> None:
    html = render_page(example(tmp_path, HOSTILE))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "{{ 7 * 7 }}" in html, "text is no template"
    assert 'onerror=alert(2)"' not in html
    assert html.count("&#34;quoted&#34;") >= 20


def test_page_is_self_contained(tmp_path: Path) -> None:
    html = render_page(example(tmp_path))
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
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
    assert (found["broken"], found["nameless"], found["small"], found["headless"], found["scripts"]) == (0, 0, 0, 0, 0)
    assert found["overflow"] == 0
    assert found["headings"] == [1, 2, 3], "no level is left out"


@BROWSER
def test_browser_finds_the_faults_of_a_bad_page(tmp_path: Path) -> None:
    """Without this, the tests above could pass with measurements of nothing."""
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
