"""The documentation builds as a site: no link is broken, notebooks run, and every public name is on a page."""

import json
import os
import re
from pathlib import Path

import pytest

import firstlight as fl
from firstlight.tasks.downstream import TASKS
from firstlight.tasks.pretrain import METHODS
from tests.support import mlflow_tables
from tests.support.clean_process import run_in_clean_process
from tests.support.forked_kernels import fork_kernels
from tests.support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# The sizes with which the notebooks run here, each in place of one of theirs. A slow test runs them as they stand.
SIZES = {
    "own_photographs": {
        "[:100]": "[:40]",
        "[40, 340, 560, 990]": "[4, 134, 256, 390]",
        '"encoder.width=16", epochs=4': '"encoder.width=16", "seeds=[0]", epochs=1',
    },
    "few_labels": {
        "[:100]": "[:40]",
        '"encoder.width=16",': '"encoder.width=16",\n    "seeds=[0]",',
        "finetune.epochs=15": "finetune.epochs=2",
        "    epochs=4": "    epochs=1",
        "9?.png": "3?.png",
    },
    "own_method": {
        "seeds: [0, 1, 2]": "seeds: [0]",
        "max_train: 800, max_test: 400": "max_train: 200, max_test: 100",
        "epochs: 4": "epochs: 1",
    },
    "search": {"trials=6": "trials=2", "epochs: 3": "epochs: 1", "name: digits}": "name: digits, max_train: 400}"},
}
# Notebooks run while the site is built.
pytestmark = [pytest.mark.timeout(1600), pytest.mark.xdist_group("docs")]


def build_site(folder: Path, sizes: dict[str, dict[str, str]]) -> tuple[int, str]:
    """Returns the exit code of `mkdocs build`, and what it printed."""
    printed = folder.with_name(f"{folder.name}-printed.txt")
    variables = {"NO_MKDOCS_2_WARNING": "1", "NOTEBOOK_SIZES": json.dumps(sizes)}
    options = (folder, printed, mlflow_tables.current_template)
    code = run_in_clean_process(run_mkdocs, *options, environment=variables, timeout_s=1500)
    return code, printed.read_text("utf-8")


def run_mkdocs(folder: Path, printed: Path, template: Path | None) -> None:
    from mkdocs.__main__ import cli

    # The output goes to a file, as a process that a notebook leaves behind would keep a pipe open.
    with open(printed, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    with fork_kernels(len(NOTEBOOKS), template):
        cli(["build", "--strict", "--quiet", "--site-dir", str(folder)])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    code, printed = build_site(folder, SIZES)
    assert code == 0, printed
    return folder


def test_every_page_of_the_documentation_is_there(site: Path) -> None:
    pages = {page.stem for page in site.glob("*.html")} - {"404"}
    assert pages == {"index", "contributing", "security", *(page.stem for page in (ROOT / "docs").glob("*.md"))}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_has_run_and_its_page_shows_what_it_found(site: Path, notebook: Path) -> None:
    check_page(site, notebook)


@pytest.mark.slow
def test_notebooks_run_as_they_stand(tmp_path: Path) -> None:
    code, printed = build_site(tmp_path, {})
    assert code == 0, printed
    for notebook in NOTEBOOKS:
        check_page(tmp_path, notebook)


def test_size_that_a_notebook_lacks_ends_the_build(tmp_path: Path) -> None:
    code, printed = build_site(tmp_path, {NOTEBOOKS[0].stem: {"epochs=none": "epochs=1"}})
    assert code != 0
    assert "'epochs=none' stands in 0 cells of the notebook" in printed


def check_page(site: Path, notebook: Path) -> None:
    page = (site / "notebooks" / f"{notebook.stem}.html").read_text("utf-8")
    assert len(list((site / "notebooks" / f"{notebook.stem}_files").glob("*.png"))) == 1
    assert f'src="{notebook.stem}_files/' in page
    assert (site / "notebooks" / notebook.name).read_bytes() == notebook.read_bytes()
    # The only bar is that of the one cell that trains, in its last state.
    assert page.count('<pre style="margin: 0') == 1
    assert ("best: trial" if notebook.stem == "search" else "✓") in page
    assert ("firstlight-result" in page) == (notebook.stem != "search")
    verdict = re.search(r">(helps|hurts|no clear difference|[\w ]+: no verdict)<", page)
    assert (verdict is not None) == (notebook.stem != "search")
    assert "/notebook-" not in page
    assert "Warning:" not in page
    assert not re.search(r'href="file:', page)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_is_stored_without_outputs(notebook: Path) -> None:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
    assert cells[0]["source"][0].startswith("# ")


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
