"""The charts of the stages show the numbers that they are given."""

import numpy as np
import pytest

from firstlight.pipeline.report import figures
from firstlight.pipeline.report.scores.arm_scores import ArmScores


def test_maps_side_by_side_have_the_points_of_each_class() -> None:
    labels = np.array([0, 1, 1, -1])
    points = np.arange(8.0).reshape(4, 2)
    figure = figures.draw_embedding_map({"a": (points, ("x", "y")), "b": (-points, ("x", "y"))}, labels, ["cat", "dog"])
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["a", "b"]
    sizes = [[len(line.get_xdata()) for line in axis.lines] for axis in figure.axes]
    assert sizes == [[1, 2, 1]] * 2


def test_many_classes_are_counted_without_names() -> None:
    by_class = {f"class {k}": [k, 2 * k] for k in range(300)}
    figure = figures.draw_class_counts(by_class, ["train", "test"])
    assert figure.get_size_inches()[0] < 12
    train, test = figure.axes[0].lines
    assert train.get_ydata().tolist() == list(range(299, -1, -1))
    assert max(test.get_ydata()) == 598


def test_a_dollar_in_a_class_name_is_no_formula() -> None:
    figure = figures.draw_class_counts({r"$\bad{$": [1, 2], "_x": [3, 4]}, ["train", "test"])
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [r"$\bad{$", " _x"]


def test_numbers_of_the_size_map_are_plain() -> None:
    images = {
        "sizes": [[20, 20, 1], [21, 20, 4000], [24, 26, 12]],
        "width": [32, 64],
        "height": [32, 90],
        "modes": {"RGB": 4013},
        "formats": {"JPEG": 4013},
    }
    figure = figures.draw_store_statistics(images, 0)
    figure.canvas.draw()
    texts = [
        label.get_text()
        for axis in figure.axes
        for side in (axis.xaxis, axis.yaxis)
        for label in (*side.get_ticklabels(which="major"), *side.get_ticklabels(which="minor"))
    ]
    assert "1,000" in texts
    assert not [text for text in texts if "$" in text]


def test_comparison_has_a_bar_for_each_arm_and_a_dot_for_each_seed() -> None:
    scores = {"pretrained": (0.8, 0.82), "given": (0.9, 0.92), "random": (0.4, 0.41)}
    measures = [ArmScores("evaluate", name, 100.0, scores) for name in ("kNN", "probe")]
    figure = figures.draw_arm_comparison(measures)
    (axis,) = figure.axes
    widths = [bar.get_width() for bar in axis.patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx([81.0, 91.0, 40.5] * 2)
    assert [len(line.get_xdata()) for line in axis.lines] == [2] * 6
    assert [label.get_text() for label in axis.get_yticklabels()] == ["kNN\nevaluate", "probe\nevaluate"]
    colours = [bar.get_facecolor() for bar in axis.patches]
    assert len(set(colours[:3])) == 3
    assert colours[:3] == colours[3:]
