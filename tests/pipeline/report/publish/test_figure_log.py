"""Figures are files, listed in order and logged; their pixels are those of `Figure.savefig`."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.report.figures import draw_comparison, draw_confusion
from firstlight.pipeline.report.image_figures import draw_filters
from firstlight.pipeline.report.publish.figure_log import FIGURE_DPI, FigureLog, save_figure
from firstlight.pipeline.tracking.figures import FIGURES_INDEX, list_figures


class Tracking:
    """Keeps what it is given to log."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, str, str]] = []

    def log_figure(self, run_id: str, file: Path, title: str) -> None:
        self.logged.append((run_id, file.name, title))


def test_figures_are_listed_in_order_and_logged(tmp_path: Path) -> None:
    tracking: Any = Tracking()
    figure_log = FigureLog(tracking, "run", tmp_path)
    figure_log.add("z", Figure(figsize=(1, 1)), "last of the alphabet")
    figure_log.add("a", Figure(figsize=(1, 1)), "first", "what is to be seen")
    assert tracking.logged == [("run", "z.png", "last of the alphabet"), ("run", "a.png", "first")]
    found = list_figures(tmp_path)
    assert [(file.name, entry.title, entry.alt) for file, entry in found] == [
        ("z.png", "last of the alphabet", "last of the alphabet"),
        ("a.png", "first", "what is to be seen"),
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file, _ in found)


def test_missing_figures_are_not_listed_and_a_damaged_index_is_named(tmp_path: Path) -> None:
    assert list_figures(tmp_path) == []
    tracking: Any = Tracking()
    figure_log = FigureLog(tracking, "run", tmp_path)
    figure_log.add("a", Figure(figsize=(1, 1)), "a")
    figure_log.add("b", Figure(figsize=(1, 1)), "b")
    (tmp_path / "figures" / "a.png").unlink()
    assert [entry.name for _, entry in list_figures(tmp_path)] == ["b"]
    (tmp_path / "figures" / FIGURES_INDEX).write_text('[{"name": "b"')
    with pytest.raises(UserError, match=rf"^{tmp_path}/figures/index\.json: is damaged: .*; delete this file"):
        list_figures(tmp_path)
    again = FigureLog(tracking, "run", tmp_path)
    again.add("b", Figure(figsize=(1, 1)), "drawn again")
    assert [entry.title for _, entry in list_figures(tmp_path)] == ["drawn again"]


@pytest.mark.parametrize("kind", ["a matrix of numbers", "bars and a heading", "no layout"])
def test_saved_pixels_are_those_of_savefig(kind: str, tmp_path: Path) -> None:
    def draw() -> Figure:
        if kind == "no layout":
            return draw_filters({"seed 0": [np.random.default_rng(0).random((4, 3, 5, 5))]}, False)
        if kind == "bars and a heading":
            row = {"stage": "evaluate", "measure": "kNN", "against": "random weights"}
            return draw_comparison([{**row, "pretrained": [0.4, 0.6], "baseline": [0.3, 0.2]}])
        return draw_confusion(np.random.default_rng(0).integers(0, 9, (12, 12)).tolist(), [*"abcdefghijkl"], "title")

    expected = io.BytesIO()
    draw().savefig(expected, dpi=FIGURE_DPI, format="png")
    save_figure(draw(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as found, Image.open(expected) as wanted:
        pixels, alpha = np.split(np.asarray(wanted), [3], axis=2)
        assert np.array_equal(np.asarray(found), pixels)
        assert (alpha == 255).all()
        assert found.info["dpi"] == wanted.info["dpi"]
