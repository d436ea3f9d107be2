import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from firstlight.pipeline.errors import UserError
from firstlight.pipeline.tracking.figures import FIGURES_INDEX, FigureLog, list_figures


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


@pytest.mark.parametrize(
    "index", [{}, 3, [1], [{"name": "b"}], [{"name": "../../secret", "title": "", "alt": ""}], [{"name": 1}]]
)
def test_index_of_another_shape_is_named(tmp_path: Path, index: Any) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "figures" / FIGURES_INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"^{tmp_path}/figures/index\.json: is damaged: "):
        list_figures(tmp_path)
