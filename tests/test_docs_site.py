"""The documentation builds as a site: no link is broken, and every public name is on a page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import firstlight as fl
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.pretrain import METHODS
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_of_the_documentation_is_there(site: Path) -> None:
    pages = {page.stem for page in site.glob("*.html")} - {"404"}
    assert pages == {"index", "contributing", "security", *(page.stem for page in (ROOT / "docs").glob("*.md"))}


def test_python_pages_have_every_name_of_the_api(site: Path) -> None:
    text = (site / "api/python.html").read_text("utf-8")
    documented = {match.rsplit(".", 1)[1] for match in re.findall(r'id="(firstlight\.pipeline\.[\w.]+)"', text)}
    elsewhere = {"METHODS", "TASKS", "ENCODERS", "UserError", "FineTunedModel"}
    assert set(fl.__all__) - documented == elsewhere


def test_methods_and_tasks_have_their_page(site: Path) -> None:
    for page, registry in (("methods", METHODS), ("tasks", TASKS)):
        text = (site / f"api/{page}.html").read_text("utf-8")
        for entry in registry.values():
            assert f'id="{entry.__module__}.{entry.__name__}"' in text


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text("utf-8"))
        assert not loaded, page
