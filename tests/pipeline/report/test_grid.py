"""Grids of images place images, captions and labels, and show names as they are."""

import numpy as np
import pytest

from firstlight.pipeline.report.grid import GRID_GAP, GridFigure, display_names


def test_names_fit_on_one_line_and_stay_in_legends() -> None:
    assert display_names(["cat", "_hidden", "a\nb\x00", "y" * 33]) == [
        "cat",
        " _hidden",
        "a b ",
        "y" * 31 + "\N{HORIZONTAL ELLIPSIS}",
    ]


def test_cells_lie_beside_each_other_with_the_first_column_apart() -> None:
    grid = GridFigure(1, 3, 1.0, "title", apart=0.5)
    for column in range(3):
        grid.draw_image(0, column, np.zeros((4, 4, 3), np.uint8))
    lefts = [image.get_extent()[0] for image in grid.axis.get_images()]
    assert np.diff(lefts) == pytest.approx([1.0 + GRID_GAP + 0.5, 1.0 + GRID_GAP])


def test_label_ends_before_the_first_column_and_caption_stands_over_its_cell() -> None:
    grid = GridFigure(2, 2, 1.0, "title", left=0.8)
    grid.draw_row_label(1, "cat")
    grid.draw_caption(1, 1, "dog")
    x, y = grid._cell_corner(1, 1)
    title, label, caption = grid.axis.texts
    assert (title.get_text(), label.get_text(), caption.get_text()) == ("title", "cat", "dog")
    assert label.get_position()[0] < 0.8
    assert caption.get_position()[0] == pytest.approx(x)
    assert caption.get_position()[1] < y
