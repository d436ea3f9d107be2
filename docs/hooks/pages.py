"""Pages of the site that stand elsewhere in the project, and links to files of the project, for mkdocs."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

# mkdocs loads this file alone.
sys.path.insert(0, str(Path(__file__).parent))
from notebooks import render_notebook

ROOT = Path(__file__).parents[2]
# Pages of the site, and the files of the project that they are.
PROJECT_PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
# Generated pages: their title, and the modules that they document.
API_PAGES = {
    "api/python.md": (
        "Python",
        ["firstlight.pipeline.first_runs", "firstlight.pipeline.api", "firstlight.pipeline.image_encoder"],
    ),
    "api/contracts.md": (
        "Contracts",
        [
            "firstlight.tasks.pretrain.method",
            "firstlight.tasks.downstream.task",
            "firstlight.pipeline.data.sources.source",
            "firstlight.pipeline.stages.stage_kind",
        ],
    ),
    "api/methods.md": ("Methods", "tasks/pretrain"),
    "api/tasks.md": ("Tasks", "tasks/downstream"),
}
# Modules of these folders that are no method and no task.
OTHER_MODULES = ("__init__", "method", "task", "knn", "probe", "retrieval", "starting_weights")
# The folder of the notebooks in `docs`. Each is also a file of the site, to download.
NOTEBOOKS = "notebooks"
# Links to source files, and the pages that document them.
SOURCE_LINK = re.compile(r"\]\(\.\./tasks/(pretrain|downstream)/(\w+)\.py\)")
SOURCE_PAGES = {"pretrain": "api/methods.md", "downstream": "api/tasks.md"}
# Other links out of `docs`.
OTHER_LINK = re.compile(r"\[([^\]]*)\]\((?:\.\./)?(?:conf|pipeline|tests|tasks|LICENSE)[^)]*\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that stand elsewhere, those of the Python modules, and those of the notebooks, which it runs."""
    for page, source in PROJECT_PAGES.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, page, content=_localize_links(text)))
    for page, (title, modules) in API_PAGES.items():
        text = f"# {title}\n\n" + "".join(f"::: {module}\n\n" for module in _list_modules(modules))
        files.append(File.generated(config, page, content=text))
    for notebook in sorted((ROOT / "docs" / NOTEBOOKS).glob("*.ipynb")):
        text, pictures = render_notebook(notebook)
        for name, content in {f"{notebook.stem}.md": text, **pictures}.items():
            files.append(File.generated(config, f"{NOTEBOOKS}/{name}", content=content))
    return files


def _list_modules(modules: list[str] | str) -> list[str]:
    if isinstance(modules, list):
        return modules
    names = sorted(file.stem for file in (ROOT / modules).glob("*.py") if file.stem not in OTHER_MODULES)
    return [f"firstlight.{modules.replace('/', '.')}.{name}" for name in names]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links to files of the project into links to pages of the site, or into code."""
    return _localize_links(markdown) if not page.file.src_uri.startswith("api/") else markdown


def _localize_links(text: str) -> str:
    for page, source in PROJECT_PAGES.items():
        text = re.sub(rf"\]\((?:\.\./)?{re.escape(source)}(#[^)]*)?\)", rf"]({page}\1)", text)
    text = SOURCE_LINK.sub(_link_module, text)
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", text)
    return OTHER_LINK.sub(r"\1", text)


def _link_module(link: re.Match[str]) -> str:
    folder, module = link.groups()
    return f"]({SOURCE_PAGES[folder]}#firstlight.tasks.{folder}.{module})"
