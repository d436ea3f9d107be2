"""Notebooks of the documentation: each is run, and becomes a page of the site with what it shows.

A notebook is stored without outputs. It runs in an empty folder, and a cell that fails ends the build.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import nbclient
import nbformat
from nbconvert import MarkdownExporter

# The longest times of a cell and of the start, in seconds. On a machine that does nothing else a whole notebook takes a
# minute.
CELL_TIMEOUT_S, STARTUP_TIMEOUT_S = 1200, 300
# The environment variable with smaller sizes of notebooks, for tests: JSON, {notebook: {text of a cell: other text}}.
SIZES_VARIABLE = "NOTEBOOK_SIZES"
# Links to files of the run, which the site does not have.
LOCAL_LINK = re.compile(r'<a href="[^"]*" target="_blank">([^<]*)</a>')
# The colours of a terminal in texts.
COLOUR_CODE = re.compile(r"\x1b\[[\d;]*m")


def run_notebook(file: Path, folder: Path) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of its cells. `folder`: where it runs and writes.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
        ValueError: the notebook lacks a size that the environment replaces.
    """
    book = nbformat.read(file, as_version=4)
    replace_sizes(book, json.loads(os.environ.get(SIZES_VARIABLE, "{}")).get(file.stem, {}))
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(
        book, timeout=CELL_TIMEOUT_S, startup_timeout=STARTUP_TIMEOUT_S, resources=resources
    ).execute()
    return book


def replace_sizes(book: nbformat.NotebookNode, sizes: Mapping[str, str]) -> None:
    """Replaces each text of `sizes` in the one code cell that has it, once.

    Raises:
        ValueError: the text stands nowhere, or more than once.
    """
    for text, other in sizes.items():
        cells = [cell for cell in book.cells if cell.cell_type == "code" and text in cell.source]
        if len(cells) != 1 or cells[0].source.count(text) != 1:
            raise ValueError(f"{text!r} stands in {len(cells)} cells of the notebook, or more than once; valid: once")
        cells[0].source = cells[0].source.replace(text, other)


def render_notebook(file: Path) -> tuple[str, dict[str, bytes]]:
    """Runs a notebook, and returns its page in Markdown, and the pictures of the page by their names.

    Raises:
        nbclient.exceptions.CellExecutionError, ValueError: as `run_notebook`.
    """
    with TemporaryDirectory(prefix="notebook-") as name:
        folder = Path(name).resolve()
        book = run_notebook(file, folder)
    resources = {"unique_key": file.stem, "output_files_dir": f"{file.stem}_files"}
    text, found = MarkdownExporter().from_notebook_node(book, resources)
    # What the cells say of the folder that is gone.
    text = COLOUR_CODE.sub("", text.replace(f"{folder}/", "").replace(str(folder), "."))
    text = LOCAL_LINK.sub(r"<code>\1</code>", text)
    text = text.replace(".ipynb)", ".md)")
    title, rest = text.lstrip().split("\n", 1)
    download = f'<p><a href="{file.name}" download>Download this notebook</a></p>'
    pictures = {path: bytes(data) for path, data in found["outputs"].items()}
    return f"{title}\n\n{download}\n{rest}", pictures
