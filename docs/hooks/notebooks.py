"""Notebooks of the documentation: each is run, and becomes a page of the site with what it shows.

A notebook is stored without outputs. It runs in an empty folder, and a cell that fails ends the build.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import nbclient
import nbformat
from nbconvert import MarkdownExporter

# The longest times of a cell and of the start, in seconds. On a machine that does nothing else a whole notebook takes a
# minute.
CELL_TIMEOUT_S, STARTUP_TIMEOUT_S = 1200, 300
# Links to files of the run, which the site does not have.
LOCAL_LINK = re.compile(r'<a href="[^"]*" target="_blank">([^<]*)</a>')
# The colours of a terminal in texts.
COLOUR_CODE = re.compile(r"\x1b\[[\d;]*m")


def run_notebook(file: Path, folder: Path) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of its cells. `folder`: where it runs and writes.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    book = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(
        book, timeout=CELL_TIMEOUT_S, startup_timeout=STARTUP_TIMEOUT_S, resources=resources
    ).execute()
    return book


def render_notebook(file: Path) -> tuple[str, dict[str, bytes]]:
    """Runs a notebook, and returns its page in Markdown, and the pictures of the page by their names.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
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
